"""The file of `--web.config.file`, in the format of Prometheus's exporter-toolkit: TLS, passwords, response headers.

It is read again when it or a certificate changes. A file that is wrong leaves the one before it in force.
Format: docs/web-configuration.md of prometheus/exporter-toolkit; docs/web-config.md says where this differs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import ssl
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from shoal.families import Family, Metric
from shoal.settings import SettingsError, closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["METRICS", "Config", "WebConfig", "allowed"]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

RELOADED = Metric(
    "shoal_web_config_last_reload_successful",
    "gauge",
    "1 if the web configuration in force is the one in its files, 0 if those were wrong and an older one stays in"
    " force. Absent without --web.config.file.",
    "the file of --web.config.file",
)
RELOADED_AT = Metric(
    "shoal_web_config_last_reload_success_timestamp_seconds",
    "gauge",
    "When the web configuration in force was read. Absent without --web.config.file.",
    "the file of --web.config.file",
)
METRICS = (RELOADED, RELOADED_AT)
"""What is exported about the web configuration."""

# Seconds between two looks at the files. A change is taken when it was there at two of them, as a program that writes
# a file, or a certificate and then its key, is seldom done at once: half a file may well be a file without passwords.
_INTERVAL = 2.0
_LARGEST_FILE = 1 << 20

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_AUTH_TYPES = {
    "NoClientCert": ssl.CERT_NONE,
    # Python's ssl cannot ask for a certificate without checking it. As nothing is made of one that is not checked,
    # not to ask for it comes to the same.
    "RequestClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
# Those of TLS 1.3 cannot be chosen, neither in Go nor here.
_SUITES_13 = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
_SUITES = {
    f"TLS_ECDHE_{key}_WITH_{cipher}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for cipher, openssl in (
        ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    )
}
_CURVES = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1", "X25519": "X25519"}
_HEADERS: dict[str, tuple[str, ...]] = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}
_TOP_KEYS = ("tls_server_config", "http_server_config", "basic_auth_users")
_HTTP_KEYS = ("http2", "headers")
_TLS_KEYS = (
    *("cert", "cert_file", "key", "key_file"),
    *("client_auth_type", "client_ca", "client_ca_file", "client_allowed_sans"),
    *("min_version", "max_version", "cipher_suites", "prefer_server_cipher_suites", "curve_preferences"),
)
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# bcrypt, as htpasswd -B and others write it. A cost of 18 takes 13 s; with more, no scrape would ever be in time.
_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-8])\$[./A-Za-z0-9]{53}")
# What may be shown of a key that nobody knows: it is no secret that slipped out of its place.
_SHOWN = re.compile(r"[A-Za-z_][\w.-]{0,39}", re.ASCII)


class _WrongError(Exception):
    """What is wrong with the file, as the end of a sentence that begins with its name. Never shows a value of it."""


@dataclass(frozen=True, slots=True)
class Config:
    """What the file asks for, checked."""

    tls: ssl.SSLContext | None
    """None is plain HTTP."""
    allowed_sans: frozenset[str] | None
    """The subject alternative names of which a client's certificate needs one; None is any."""
    headers: Mapping[str, str]
    """What every response says beside its own headers."""
    users: Mapping[bytes, bytes]
    """{name: bcrypt hash}; without any, everyone may ask."""


class WebConfig:
    """The configuration in force, and what it takes to follow its files."""

    def __init__(self, path: str) -> None:
        """Read the file. Blocks; raises `SettingsError` with a sentence that names the file, the key and what is right.

        Relative names in the file are relative to its directory, as for the toolkit.
        """
        self._path = path
        self._files = _Files()
        self.current = _load(path, self._files)
        self._successful = True
        self._read_at = time.time()

    def families(self) -> list[Family]:
        """Return how the last reading went."""
        return [Family(RELOADED, [((), int(self._successful))]), Family(RELOADED_AT, [((), self._read_at)])]

    async def watch(self, use: Callable[[ssl.SSLContext | None], None]) -> None:
        """Read the files again whenever they change, for ever, and call `use` with what connections now need."""
        before = self._files.seen
        while True:
            await asyncio.sleep(_INTERVAL)
            now = await asyncio.to_thread(self._files.look)
            if now != self._files.seen and now == before:
                await self._reload(use)
                now = self._files.seen
            before = now

    async def _reload(self, use: Callable[[ssl.SSLContext | None], None]) -> None:
        files = _Files()
        try:
            config = await asyncio.to_thread(_load, self._path, files)
        except SettingsError as error:
            detail = str(error)
        except Exception as error:  # noqa: BLE001  (whatever it is, the configuration in force stays in force)
            # Its text might have a part of the file in it.
            detail = type(error).__name__
        else:
            use(config.tls)
            self.current, self._files = config, files
            self._successful, self._read_at = True, time.time()
            logger.info("web configuration read again", extra={"file": self._path})
            return
        self._files = files
        self._successful = False
        logger.error("web configuration is wrong, the one before it stays in force", extra={"detail": detail})


_Stamp = tuple[int, ...] | None


class _Files:
    """Reads files, and remembers what each looked like, to tell whether one has changed."""

    def __init__(self) -> None:
        self.seen: dict[str, _Stamp] = {}
        """{path: device, inode, size and times when it was read, None for one that could not be}."""

    def read(self, path: str, key: str) -> bytes:
        """Return the content of a file that `key` names. Raises `_WrongError`."""
        self.seen[path] = None
        try:
            # Should it be a pipe, nobody waits for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                state = os.fstat(file.fileno())
                self.seen[path] = _stamp(state)
                if not stat.S_ISREG(state.st_mode):
                    raise _WrongError(f"{key} should name a regular file, and {path} is none")
                content = file.read(_LARGEST_FILE + 1)
        except OSError as error:
            raise _WrongError(f"{key} cannot be read: {path}: {error.strerror}") from None
        except ValueError:
            raise _WrongError(f"{key} is no name of a file") from None
        if len(content) > _LARGEST_FILE:
            raise _WrongError(f"{key} should name a file of at most 1 MiB, and {path} is larger")
        return content

    def look(self) -> dict[str, _Stamp]:
        """Return what the files look like now."""
        found: dict[str, _Stamp] = {}
        for path in self.seen:
            try:
                found[path] = _stamp(os.stat(path))
            except OSError:
                found[path] = None
        return found


def _stamp(state: os.stat_result) -> _Stamp:
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _load(path: str, files: _Files) -> Config:
    try:
        top = _Section(_document(files.read(path, "the file")), "", _TOP_KEYS)
        http = top.below("http_server_config", _HTTP_KEYS)
        tls, allowed_sans = _tls(top.below("tls_server_config", _TLS_KEYS), os.path.dirname(path), files)
        config = Config(
            tls,
            allowed_sans,
            _headers(http.below("headers", tuple(_HEADERS))),
            _users(top.below("basic_auth_users")),
        )
        if http.choice("http2", _SWITCH, default=False):
            logger.warning("http_server_config.http2 is true, and there is HTTP/1.1 only", extra={"file": path})
    except _WrongError as error:
        raise SettingsError(f"web configuration file {path}: {error}") from None
    return config


def _document(content: bytes) -> yaml.Node | None:
    """Return the file's root node. Nodes keep a key that is given twice, which a dict would lose."""
    try:
        return yaml.compose(content.decode(), yaml.BaseLoader)
    except UnicodeDecodeError:
        raise _WrongError("it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        # What a message quotes is from the file.
        why = f": {problem}" if problem and not re.search("['\"]", problem) else ""
        raise _WrongError(f"it is not YAML{f', line {mark.line + 1}' if mark else ''}{why}") from None
    except RecursionError:
        raise _WrongError("it is nested too deeply") from None


class _Section:
    """The keys and values below one key of the file. Every method raises `_WrongError`, naming the key in full."""

    def __init__(self, node: yaml.Node | None, name: str, known: tuple[str, ...] = ()) -> None:
        """Look at the keys below `name`, which are all to be known ones, if there is a set of them."""
        self.name = name
        self.nodes: dict[str, yaml.Node] = {}
        if _is_empty(node):
            return
        if not isinstance(node, yaml.MappingNode):
            raise _WrongError(f"{name or 'it'} should have keys and values below it")
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _WrongError(f"line {line} should have a name for its key")
            # A secret that slipped out of its place may stand where a key does.
            shown = self.key(key.value) if _SHOWN.fullmatch(key.value) else f"in line {line}"
            if known and key.value not in known:
                near = closest(key.value, known) or f"; there are {', '.join(known)}"
                raise _WrongError(f"there is no key {shown}{near}")
            if key.value in self.nodes:
                raise _WrongError(f"key {shown} is given twice")
            self.nodes[key.value] = value

    def key(self, name: str) -> str:
        """Return the full name of a key below this one."""
        return f"{self.name}.{name}" if self.name else name

    def below(self, name: str, known: tuple[str, ...] = ()) -> _Section:
        return _Section(self.nodes.get(name), self.key(name), known)

    def text(self, name: str) -> str:
        return _text(self.nodes.get(name), self.key(name))

    def texts(self, name: str) -> list[str]:
        node = self.nodes.get(name)
        if _is_empty(node):
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise _WrongError(f"{self.key(name)} should be a list")
        return [_text(one, self.key(name)) for one in node.value]

    def choice(self, name: str, allowed: Mapping[str, _T], *, default: _T) -> _T:
        text = self.text(name)
        if text and text not in allowed:
            words = ("true", "false") if allowed is _SWITCH else tuple(allowed)
            raise _WrongError(f"{self.key(name)} should be one of {', '.join(words)}")
        return allowed[text] if text else default


def _is_empty(node: yaml.Node | None) -> bool:
    """Tell whether a key has no value, as in `headers:` with nothing behind it."""
    return node is None or (
        isinstance(node, yaml.ScalarNode) and not node.style and node.value in ("", "~", "null", "Null", "NULL")
    )


def _text(node: yaml.Node | None, key: str) -> str:
    if node is None or _is_empty(node):
        return ""
    if not isinstance(node, yaml.ScalarNode):
        raise _WrongError(f"{key} should be one value")
    return str(node.value)


def _headers(section: _Section) -> dict[str, str]:
    found = {name: text for name in section.nodes if (text := section.text(name))}
    for name, text in found.items():
        if _HEADERS[name] and text not in _HEADERS[name]:
            raise _WrongError(f"{section.key(name)} should be {' or '.join(_HEADERS[name])}")
        if not (text.isascii() and text.isprintable()):
            raise _WrongError(f"{section.key(name)} should be one line of ASCII characters")
    return found


def _users(section: _Section) -> dict[bytes, bytes]:
    for name, node in section.nodes.items():
        key = section.key(name) if _SHOWN.fullmatch(name) else f"{section.name}, line {node.start_mark.line + 1}"
        if not name or ":" in name:
            raise _WrongError(f"{key} should begin with a user's name, without a colon in it")
        if not _HASH.fullmatch(section.text(name)):
            raise _WrongError(f"{key} should be a bcrypt hash of a cost from 4 to 18, such as htpasswd -nBC 10 prints")
    return {name.encode(): section.text(name).encode() for name in section.nodes}


def _tls(section: _Section, directory: str, files: _Files) -> tuple[ssl.SSLContext | None, frozenset[str] | None]:
    """Return the context for connections, and the names of which a client needs one."""
    if not section.nodes:
        return None, None

    def pem(name: str) -> tuple[str, bytes]:
        """Return the key that it was given by, and what stands inline or in the file."""
        inline, path = section.text(name), section.text(f"{name}_file")
        key = section.key(f"{name}_file")
        if inline and path:
            raise _WrongError(f"{section.key(name)} and {key} cannot be combined; use one of them")
        if not path:
            return section.key(name) if inline else key, inline.encode()
        content = files.read(os.path.join(directory, path), key)
        if not content.strip():
            raise _WrongError(f"{key} should name a file in PEM format, and {path} is empty")
        return key, content

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = section.choice("min_version", _VERSIONS, default=ssl.TLSVersion.TLSv1_2)
    context.maximum_version = section.choice("max_version", _VERSIONS, default=ssl.TLSVersion.TLSv1_3)
    if context.minimum_version > context.maximum_version:
        raise _WrongError(f"{section.key('min_version')} should not be above max_version")
    _suites(context, section)
    _curve(context, section)
    _certificate(context, pem("cert"), pem("key"))
    context.verify_mode = section.choice("client_auth_type", _AUTH_TYPES, default=ssl.CERT_NONE)
    _client_ca(context, *pem("client_ca"))
    return context, _allowed_sans(context, section)


def _suites(context: ssl.SSLContext, section: _Section) -> None:
    if not section.choice("prefer_server_cipher_suites", _SWITCH, default=True):
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    names, known = section.texts("cipher_suites"), (*_SUITES, *_SUITES_13)
    for name in names:
        if name not in known:
            near = closest(name, known) or f"; there are {', '.join(known)}"
            raise _WrongError(f"{section.key('cipher_suites')} has a name that is none of Go's secure suites{near}")
    chosen = [_SUITES[name] for name in names if name in _SUITES]
    if chosen:
        context.set_ciphers(":".join(chosen))
    elif names and context.maximum_version == ssl.TLSVersion.TLSv1_2:
        raise _WrongError(f"{section.key('cipher_suites')} should have a suite of TLS 1.2, as max_version is TLS12")
    elif names:
        context.minimum_version = ssl.TLSVersion.TLSv1_3


def _curve(context: ssl.SSLContext, section: _Section) -> None:
    names, key = section.texts("curve_preferences"), section.key("curve_preferences")
    if not names:
        return
    if len(names) > 1 or names[0] not in _CURVES:
        raise _WrongError(f"{key} should be left out or have one of {', '.join(_CURVES)}: Python's ssl takes one")
    context.set_ecdh_curve(_CURVES[names[0]])


def _certificate(context: ssl.SSLContext, cert: tuple[str, bytes], key: tuple[str, bytes]) -> None:
    for name, content in (cert, key):
        if not content:
            raise _WrongError(f"{name} is missing; TLS needs a certificate and its key")

    def no_password() -> str:
        raise _WrongError(f"{key[0]} is encrypted, and there is nobody to ask for its password")

    try:
        # Python's ssl reads files only, so these are some, in memory.
        with _in_memory(cert[1]) as cert_file, _in_memory(key[1]) as key_file:
            context.load_cert_chain(cert_file, key_file, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _WrongError(f"{key[0]} is not the key of {cert[0]}") from None
        # OpenSSL does not say which of the two it could not read.
        if _has_certificate(cert[1]):
            raise _WrongError(f"{key[0]} should be a private key in PEM format{_why(error)}") from None
        raise _WrongError(f"{cert[0]} should be a certificate in PEM format{_why(error)}") from None
    except OSError as error:
        # Without memfd_create, or without a /proc of this process's own.
        raise _WrongError(f"{cert[0]} cannot be given to OpenSSL by /proc/self/fd: {error.strerror}") from None


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Give the name of a file with this content that is on no disk."""
    with os.fdopen(os.memfd_create("shoal-pem"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _has_certificate(content: bytes) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError):
        return False
    return True


def _client_ca(context: ssl.SSLContext, key: str, content: bytes) -> None:
    if context.verify_mode == ssl.CERT_NONE and content:
        raise _WrongError(f"{key} needs client_auth_type RequireAndVerifyClientCert or VerifyClientCertIfGiven")
    if context.verify_mode == ssl.CERT_NONE:
        return
    if not content:
        raise _WrongError(f"{key} is missing; it has the certificates that those of clients are checked against")
    try:
        context.load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise _WrongError(f"{key} should be certificates in PEM format{_why(error)}") from None
    # As in Go, each that is named is trusted, whoever signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _allowed_sans(context: ssl.SSLContext, section: _Section) -> frozenset[str] | None:
    if "client_allowed_sans" not in section.nodes:
        return None
    names, key = section.texts("client_allowed_sans"), section.key("client_allowed_sans")
    if not names:
        raise _WrongError(f"{key} should have at least one name")
    if context.verify_mode != ssl.CERT_REQUIRED:
        raise _WrongError(f"{key} needs client_auth_type RequireAndVerifyClientCert")
    return frozenset(map(_canonical, names))


def _why(error: Exception) -> str:
    """Return the reason that OpenSSL gives, in its words; there is nothing of the file in it."""
    reason = getattr(error, "reason", None)
    return f" (OpenSSL: {reason.replace('_', ' ').lower()})" if reason else ""


def _canonical(name: str) -> str:
    """Return an IP address as everyone writes it, and any other name as it is."""
    try:
        return str(ipaddress.ip_address(name.strip()))
    except ValueError:
        return name


def allowed(certificate: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Tell whether a client's certificate, as `ssl.SSLSocket.getpeercert` describes it, has one of these names."""
    for kind, name in certificate.get("subjectAltName", ()):
        if (kind in ("DNS", "email", "URI") and name in names) or (kind == "IP Address" and _canonical(name) in names):
            return True
    return False
