"""Every option once: its flag, its environment variable, its key in the file, its default and its check."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.collectors import available_names
from shoal.kernel.files import Roots
from shoal.redis.targets import PASSWORD_VARIABLE, Target, parse_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["OPTIONS", "Option", "Settings", "SettingsError", "closest", "load_config", "resolve"]

_HIGHEST_PORT = 65535


class SettingsError(Exception):
    """A setting is wrong. `str()` is a sentence that says which, where it was given, and what would be right."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the exporter was asked to do, checked."""

    listen: tuple[str, int]
    """Host and port to listen on; an empty host means all addresses."""
    web_config_file: str
    """The file with TLS and passwords, read by `web_config`; "" for none."""
    roots: Roots
    collectors: tuple[str, ...]
    """The names of the enabled collectors, sorted."""
    enter_namespaces: bool
    """Whether sockets may be opened inside other network namespaces (CAP_SYS_ADMIN)."""
    redis_targets: tuple[Target, ...]
    """The Redis servers to watch. None of them holds a password, only where it stands."""
    redis_password_file: str
    """The file with the password of those that say nothing else; "" for none."""
    redis_discover: bool
    """Whether to watch the Redis servers that are found among the node's processes."""
    neighbours_watch: tuple[str, ...]
    """IP addresses of neighbours to watch beside the next hops, as `ipaddress` writes them (fe80::1%eth0)."""
    neighbours_verify: bool
    """Whether to ask the watched addresses for their MAC address (CAP_NET_RAW)."""
    conntrack_dump_interval: int
    """Seconds between two dumps of the connection tracking table; 0 for none at all."""
    conntrack_dump_entries: int
    """The most entries that a dump looks at."""
    kubernetes_endpoints: bool
    """Whether to watch the cluster's EndpointSlices for the backends that live (a service account)."""
    inodes_walk_interval: int
    """Seconds between two rounds of counting the inodes of writable layers; 0 for none at all."""
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True)
class Option:
    """One option. Its key in the file is the flag without dashes, its variable SHOAL_ and the flag in capitals.

    `check` turns the text into the value and raises `ValueError` with what was expected.
    """

    key: str
    default: str
    metavar: str
    help: str
    check: Callable[[str], Any]
    repeatable: bool = False
    """Whether the flag may be given several times; the texts are then joined by commas."""
    confidential: bool = False
    """Whether a wrong text is not to be shown, as there may be a password in it."""

    @property
    def variable(self) -> str:
        """The environment variable, such as SHOAL_WEB_LISTEN_ADDRESS."""
        return "SHOAL_" + self.key.upper().replace(".", "_").replace("-", "_")


_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([\w.-]*)):([0-9]{1,5})", re.ASCII)


def _address(text: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[3]) > _HIGHEST_PORT:
        raise ValueError("host:port, such as 127.0.0.1:7462, [::1]:7462, or :7462 for all addresses")
    return match[1] or match[2] or "", int(match[3])


def _choice(*allowed: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return text.lower()

    return check


def _whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return check


def _off_or_whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if text != "0" and not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise ValueError(f"0, or a whole number from {least} to {most}")
        return int(text)

    return check


def _switch(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError("true or false")
    return words[text.lower()]


def _directory(text: str) -> str:
    if not os.path.isdir(text):
        raise ValueError("a directory")
    return text.rstrip("/")


def _procfs(text: str) -> str:
    path = _directory(text)
    try:
        begins = Path(path, "stat").read_bytes()[:4]
    except OSError:
        begins = b""
    if begins != b"cpu ":
        raise ValueError("a mounted proc file system (there is no proc's file stat in it)")
    return path


def _neighbours(text: str) -> tuple[str, ...]:
    try:
        found = [ipaddress.ip_address(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError("IP addresses, separated by commas") from None
    for address in found:
        if address.version == 6 and address.is_link_local and not address.scope_id:  # noqa: PLR2004  (IPv6)
            raise ValueError(f"complete: {address} needs its device, such as {address}%eth0")
    return tuple(dict.fromkeys(map(str, found)))


def _text(text: str) -> str:
    return text


OPTIONS: tuple[Option, ...] = (
    Option("config.file", "", "FILE", "YAML file with these options as keys; flags and variables win over it.", _text),
    Option(
        "web.listen-address",
        "127.0.0.1:7462",
        "HOST:PORT",
        "Address to serve on; :7462 is all addresses of this machine.",
        _address,
    ),
    Option(
        "web.config.file",
        "",
        "FILE",
        "YAML file with TLS, passwords and response headers, as other exporters have it; docs/web-config.md.",
        _text,
    ),
    Option("path.procfs", "/proc", "DIR", "Where proc is mounted; the host's, in a container.", _procfs),
    Option("path.sysfs", "/sys", "DIR", "Where sys is mounted; the host's, in a container.", _directory),
    Option("path.rootfs", "/", "DIR", "The root file system; the host's, in a container.", _directory),
    Option(
        "netns.enter",
        "false",
        "BOOLEAN",
        "Look into every pod's network namespace for its listeners and connections; needs CAP_SYS_ADMIN.",
        _switch,
    ),
    Option(
        "redis.target",
        "",
        "ADDRESSES",
        "Redis or Valkey servers to watch, separated by commas or each with a flag of its own: redis://HOST:PORT,"
        " rediss://HOST:PORT or unix:///PATH, with USER@ before it for an ACL user.",
        parse_targets,
        repeatable=True,
        confidential=True,
    ),
    Option(
        "redis.password-file",
        "",
        "FILE",
        f"File with the password of the servers named by redis.target; {PASSWORD_VARIABLE} has it otherwise.",
        _text,
    ),
    Option(
        "redis.discover",
        "false",
        "BOOLEAN",
        "Watch the Redis, Valkey and KeyDB servers among this node's processes, without a password.",
        _switch,
    ),
    Option(
        "neighbours.watch",
        "",
        "ADDRESSES",
        "IP addresses on this node's own networks to watch beside its next hops, separated by commas.",
        _neighbours,
    ),
    Option(
        "neighbours.verify",
        "false",
        "BOOLEAN",
        "Send an ARP request a minute for each watched IPv4 address; needs CAP_NET_RAW. The kernel hears the answers"
        " too, and follows them as those of any ARP request.",
        _switch,
    ),
    Option(
        "conntrack.dump-interval",
        "60",
        "SECONDS",
        "How often to go through the connection tracking table for who fills it, 10 at least; 0 switches it off.",
        _off_or_whole(10, 86400),
    ),
    Option(
        "conntrack.dump-entries",
        "200000",
        "NUMBER",
        "The most entries of the table to look at; of a larger one that many are a sample. A million take 7 s of CPU.",
        _whole(1000, 10_000_000),
    ),
    Option(
        "kubernetes.endpoints",
        "false",
        "BOOLEAN",
        "Watch the cluster's EndpointSlices, to tell which backends of services are gone; needs a service account that"
        " may get, list and watch them.",
        _switch,
    ),
    Option(
        "inodes.walk-interval",
        "300",
        "SECONDS",
        "How often to count the files in containers' writable layers; 0 switches it off.",
        _whole(0, 86400),
    ),
    Option(
        "log.level",
        "info",
        "LEVEL",
        "The least severe messages to log: debug, info, warning or error.",
        _choice("debug", "info", "warning", "error"),
    ),
    Option("log.format", "logfmt", "FORMAT", "logfmt or json, one message a line.", _choice("logfmt", "json")),
    *(Option(f"collector.{name}", "true", "", f"Enable the {name} collector.", _switch) for name in available_names()),
)


def load_config(path: str) -> dict[str, str]:
    """Read a configuration file into {key: text}. Keys may be written `web.listen-address:` or nested.

    Raises `SettingsError` when the file cannot be read, is not YAML, or holds a key that is no option.
    """
    # Imported here because most exporters run without a file, and the parser costs 2 MiB.
    import yaml  # noqa: PLC0415  (only where there is a file to read)

    try:
        # The base loader leaves every value the text that it is in the file, as flags and variables are text.
        content = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)  # noqa: S506  (makes no objects)
    except OSError as error:
        raise SettingsError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"configuration file {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "not readable")
        raise SettingsError(f"configuration file {path}{place} is not YAML: {problem}") from None
    except RecursionError:
        raise SettingsError(f"configuration file {path} is nested too deeply") from None
    values: dict[str, str] = {}
    _flatten(content or {}, "", path, values)
    return values


def _flatten(content: object, key: str, path: str, values: dict[str, str]) -> None:
    """Put what is below `key` into `values`. Ends where no option's key goes on, so that no alias makes it endless."""
    known = [option.key for option in OPTIONS if option.key != "config.file"]
    if key and not any(option == key or option.startswith(f"{key}.") for option in known):
        near = closest(key, known) or f"; there are {', '.join(known)}"
        raise SettingsError(f"configuration file {path}: there is no option {key}{near}")
    if isinstance(content, dict):
        for part, value in content.items():
            _flatten(value, f"{key}.{part}" if key else str(part), path, values)
    elif key not in known:
        should = "have keys below it" if key else "hold keys and values, such as `log.level: debug`"
        raise SettingsError(f"configuration file {path}: {key or 'the file'} should {should}")
    elif not isinstance(content, str):
        raise SettingsError(f"configuration file {path}: {key} should hold one value")
    elif key in values:
        raise SettingsError(f"configuration file {path}: {key} is given twice")
    else:
        values[key] = content


def closest(word: str, known: Sequence[str]) -> str:
    """Return the end of a sentence about an unknown word: what was probably meant, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve(flags: Mapping[str, str], environ: Mapping[str, str] | None = None) -> Settings:
    """Check the options, each taken from the flags {key: text}, else the environment, else the file, else its default.

    Raises `SettingsError`. Variables that are no option are left alone: Kubernetes sets some for a service's name.
    """
    environ = os.environ if environ is None else environ
    file = flags.get("config.file") or environ.get("SHOAL_CONFIG_FILE", "")
    config = load_config(file) if file else {}
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if option.key in flags:
            text, where = flags[option.key], f"--{option.key}"
        elif environ.get(option.variable):
            text, where = environ[option.variable], option.variable
        elif option.key in config:
            text, where = config[option.key], f"{option.key} in {file}"
        else:
            text, where = option.default, f"--{option.key} (by default)"
        try:
            values[option.key] = option.check(text)
        except ValueError as error:
            shown = "not" if option.confidential else f"{text!r}, which is not"
            raise SettingsError(f"{where} is {shown} {error}") from None
    switches = [option.key for option in OPTIONS if option.key.startswith("collector.")]
    collectors = tuple(key.removeprefix("collector.") for key in switches if values[key])
    if not collectors:
        raise SettingsError("every collector is switched off; leave at least one on")
    return Settings(
        listen=values["web.listen-address"],
        web_config_file=values["web.config.file"],
        roots=Roots(values["path.procfs"], values["path.sysfs"], values["path.rootfs"]),
        collectors=collectors,
        enter_namespaces=values["netns.enter"],
        redis_targets=values["redis.target"],
        redis_password_file=values["redis.password-file"],
        redis_discover=values["redis.discover"],
        neighbours_watch=values["neighbours.watch"],
        neighbours_verify=values["neighbours.verify"],
        conntrack_dump_interval=values["conntrack.dump-interval"],
        conntrack_dump_entries=values["conntrack.dump-entries"],
        kubernetes_endpoints=values["kubernetes.endpoints"],
        inodes_walk_interval=values["inodes.walk-interval"],
        log_level=values["log.level"],
        log_format=values["log.format"],
    )
