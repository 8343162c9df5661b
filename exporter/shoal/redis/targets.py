"""Where a server listens and how to log in there, as a person writes it: redis://, rediss:// and unix:// addresses."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["LONGEST_PATH", "PASSWORD_VARIABLE", "Login", "Target", "Tls", "parse_targets"]

PASSWORD_VARIABLE = "SHOAL_REDIS_PASSWORD"  # noqa: S105  (the name of a variable, not what is in it)
"""The environment variable with the password of the servers that name no other."""

LONGEST_PATH = 107
"""The most bytes that the path of a Unix socket can have (struct sockaddr_un)."""

_PORT = 6379
_HIGHEST_PORT = 65535
_SHAPE = "redis://[USER@]HOST[:PORT], rediss://[USER@]HOST[:PORT] or unix://[USER@]/PATH, several separated by commas"
_OPTIONS = "password_file, password_variable; ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_check_hostname for rediss"


@dataclass(frozen=True, slots=True)
class Tls:
    """How to check the server's certificate and which one to show; the names are those of redis-py's addresses.

    Without `ca_certs` the system's authorities count. Without `check_hostname` the name in the certificate does not.
    """

    ca_certs: str = ""
    certfile: str = ""
    keyfile: str = ""
    check_hostname: bool = True


@dataclass(frozen=True, slots=True)
class Login:
    """Whom to log in as and where the password stands, as the address says. Never the password: nothing can show it."""

    user: str = ""
    password_file: str = ""
    password_variable: str = ""

    def password(self, common_file: str) -> str:
        """Read the password, anew at each login so that it can be changed; "" if there is none. Raises `OSError`.

        Where the address does not say, it is in `common_file`, or in the variable if that is "".
        """
        file = self.password_file or ("" if self.password_variable else common_file)
        if not file:
            return os.environ.get(self.password_variable or PASSWORD_VARIABLE, "")
        with open(file, encoding="utf-8") as opened:
            return opened.read().strip("\r\n")


@dataclass(frozen=True, slots=True)
class Target:
    """A server to watch: at `host` and `port`, or at the Unix socket `path`.

    `name` is the label `server`. Without `login` nothing is ever sent that could be a password. `namespace_of` is a
    process whose network namespace the server is to be reached in, None for the exporter's own.
    """

    name: str
    host: str = ""
    port: int = 0
    path: str = ""
    tls: Tls | None = None
    login: Login | None = field(default_factory=Login)
    namespace_of: int | None = None


def parse_targets(text: str) -> tuple[Target, ...]:
    """Return the servers of a list of addresses.

    Options stand behind a question mark: password_file, password_variable, and for rediss:// ssl_ca_certs,
    ssl_certfile, ssl_keyfile, ssl_check_hostname. Raises `ValueError` with what was expected; its text holds nothing
    of the address, in which someone may have written a password.
    """
    targets = tuple(_parse(address) for address in text.replace(",", " ").split())
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise ValueError("a list that names each server once")
    return targets


def _parse(address: str) -> Target:
    try:
        url = urlsplit(address)
        port = url.port or _PORT
        options = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=True)) if url.query else {}
    except ValueError:
        raise ValueError(_SHAPE) from None
    if url.password is not None:
        raise ValueError(
            f"free of passwords, which every process on the node could read there; put it into {PASSWORD_VARIABLE}, or "
            "into a file for redis.password-file or ?password_file="
        )
    login = Login(
        user=unquote(url.username or ""),
        password_file=options.pop("password_file", ""),
        password_variable=options.pop("password_variable", ""),
    )
    tls = _tls(options) if url.scheme == "rediss" else None
    if options:
        raise ValueError(f"an address with the options that there are ({_OPTIONS})")
    path = unquote(url.path)
    if url.scheme == "unix" and not url.hostname and 1 < len(os.fsencode(path)) <= LONGEST_PATH:
        return Target(path, path=path, login=login)
    # A number of a database may follow, as applications write it; what is read here is the same in all of them.
    if url.scheme in ("redis", "rediss") and url.hostname and not path.strip("/0123456789"):
        shown = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return Target(f"{shown}:{port}", url.hostname, port, tls=tls, login=login)
    raise ValueError(_SHAPE)


def _tls(options: dict[str, str]) -> Tls:
    check = options.pop("ssl_check_hostname", "true").lower()
    if check not in ("true", "false"):
        raise ValueError("an address with ssl_check_hostname=true or false")
    return Tls(
        options.pop("ssl_ca_certs", ""),
        options.pop("ssl_certfile", ""),
        options.pop("ssl_keyfile", ""),
        check == "true",
    )
