"""Why a server cannot be read."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Down", "DownReason", "ErrorReply", "MalformedReply"]


class DownReason(StrEnum):
    """Why a server is down as far as the exporter can tell: the values of the label `reason` of shoal_redis_up."""

    REFUSED = "refused"
    """Nothing listens there: the connection was refused, or the Unix socket does not exist."""
    UNREACHABLE = "unreachable"
    """No such host, no route to it, or its network namespace may not be entered."""
    TIMEOUT = "timeout"
    """It does not answer: the process hangs, its accept queue is full, or packets are lost."""
    AUTH = "auth"
    """It wants a password, another one, or the user may not do what is asked (NOAUTH, WRONGPASS, NOPERM, DENIED)."""
    LOADING = "loading"
    """It has started and still reads its data (LOADING)."""
    BUSY = "busy"
    """A script keeps it from answering anything else (BUSY)."""
    TLS = "tls"
    """The handshake failed: no TLS there, or a certificate that is not trusted."""
    PROTOCOL = "protocol"
    """What listens there does not speak the protocol."""
    CLOSED = "closed"
    """The connection ended: the server stopped, or closed it."""
    ERROR = "error"
    """It answers with any other error."""


class Down(Exception):  # noqa: N818  (an answer about the server, not an error of the exporter)
    """A server cannot be read. `reason` is the label value; `str()` is a sentence without any secret."""

    def __init__(self, reason: DownReason, detail: str) -> None:
        """Keep the reason beside a sentence."""
        super().__init__(detail)
        self.reason = reason


class ErrorReply(Exception):  # noqa: N818  (the server's error)
    """The server answered a command with an error, and can be asked others. `str()` is its text."""


class MalformedReply(Exception):  # noqa: N818  (the server's error)
    """A reply that no Redis would give. `str()` says what was expected."""
