"""Accepts connections: so many at once, of which the oldest idle one goes first, with the TLS of that moment.

asyncio's own server takes whatever comes, until no descriptor is left to read /proc with.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from aiohttp.web_protocol import RequestHandler

    _Connected = tuple[asyncio.Transport, RequestHandler]

__all__ = ["ListenError", "Listener", "joined"]

# An exporter that watches listen queues should not overflow its own when many ask at once.
_BACKLOG = 1024
# Two hundred scrapes at once are answered. Each connection is a descriptor, and with what is written and not yet read
# up to 0.2 MiB.
_MOST = 256
# At most this part of the process's descriptors, as the collectors need the rest.
_SHARE = 4
# Seconds to wait when the kernel has no descriptor or memory for another connection; who comes stays in the backlog.
_PAUSE = 0.5
# Seconds that a client has for the handshake of TLS, and for its end.
_HANDSHAKE = 10.0
_GOODBYE = 0.5
# Bytes that the kernel takes of an answer before they can be sent: 3.7 MB, otherwise, for a client that does not read.
_UNSENT = 1 << 16


class ListenError(Exception):
    """The address cannot be listened on. `str()` is a sentence that says why and what to do."""


class Listener:
    """The sockets that are listened on, and the connections that came of them."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self.tls: ssl.SSLContext | None = None
        """What connections use from now on, those included that wait in the backlog. None is plain TCP."""
        self.refused = 0
        """Connections that were ended, or not begun, because there were too many."""
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._open: dict[socket.socket, asyncio.Task[_Connected | None]] = {}
        """{connection: its handshake, and what it gave}, the oldest first."""
        self._answered: set[RequestHandler] = set()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MOST if descriptors == resource.RLIM_INFINITY else min(_MOST, max(1, descriptors // _SHARE))

    @property
    def addresses(self) -> list[tuple[Any, ...]]:
        """Where it listens, as `socket.getsockname` has it."""
        return [one.getsockname() for one in self._sockets]

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Note whose request is being worked on; what it gets is written after that."""
        self._answered.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._answered.discard(request.protocol)

    async def open(self, server: web.Server, host: str, port: int) -> None:
        """Listen, and give the connections to aiohttp's server. Raises `ListenError`."""
        try:
            # It finds the addresses and binds; accepting is done here.
            bound = await asyncio.get_running_loop().create_server(
                asyncio.Protocol, host or None, port, start_serving=False
            )
            self._sockets = [one.dup() for one in bound.sockets]
            bound.close()
            for one in self._sockets:
                one.settimeout(0)
                # Connections inherit it.
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
                one.listen(_BACKLOG)
        except (OSError, UnicodeError) as error:
            if isinstance(error, UnicodeError):
                reason = "that is no host name"
            elif isinstance(error, socket.gaierror) or not error.errno:
                reason = error.strerror or str(error)
            else:
                # asyncio's own text repeats the address.
                reason = os.strerror(error.errno)
            raise ListenError(
                f"cannot listen on {joined(host, port)}: {reason}; choose another with --web.listen-address"
            ) from None
        self._accepting = [asyncio.create_task(self._accept(one, server)) for one in self._sockets]

    def close(self) -> None:
        """Accept nothing more and end what has not yet begun; aiohttp ends the connections that it has."""
        for task in (*self._accepting, *self._open.values()):
            task.cancel()
        for one in self._sockets:
            one.close()

    async def _accept(self, listening: socket.socket, server: web.Server) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError:
                self._make_room()
                await asyncio.sleep(_PAUSE)
                continue
            self._open = {one: task for one, task in self._open.items() if one.fileno() >= 0}
            if len(self._open) < self._most or self._make_room():
                self._open[connection] = asyncio.create_task(self._begin(connection, server))
            else:
                connection.close()
            # With connections in the backlog sock_accept does not let the loop come round.
            await asyncio.sleep(0)

    async def _begin(self, connection: socket.socket, server: web.Server) -> _Connected | None:
        options: dict[str, Any] = {}
        if self.tls:
            options = {"ssl": self.tls, "ssl_handshake_timeout": _HANDSHAKE, "ssl_shutdown_timeout": _GOODBYE}
        try:
            return await asyncio.get_running_loop().connect_accepted_socket(server, connection, **options)
        except Exception:  # noqa: BLE001  (whatever a client's handshake is, the others are accepted)
            # He is gone without a word, as with asyncio's own server.
            return None

    def _make_room(self) -> bool:
        """End the oldest connection that nobody works for, and tell whether there was one."""
        self.refused += 1
        for connection, task in self._open.items():
            if not task.done():
                task.cancel()
            elif (connected := task.result()) and connected[1] not in self._answered:
                # Not closed, which would wait for a client that does not read.
                connected[0].abort()
            else:
                continue
            del self._open[connection]
            return True
        return False


def joined(host: str, port: int) -> str:
    """Return an address as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
