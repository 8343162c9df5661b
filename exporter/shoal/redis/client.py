"""One connection to a server, over redis-py: opened without blocking, then commands that may overlap."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from redis._parsers import _AsyncRESP2Parser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from shoal.kernel.files import Unavailable, Vanished
from shoal.kernel.namespaces import open_in_namespace
from shoal.redis.errors import Down, DownReason, ErrorReply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shoal.redis.targets import Target, Tls

__all__ = ["Address", "Client", "Prepared", "in_own_thread", "open_client", "prepare"]

_T = TypeVar("_T")

# A server's INFO is about 6 kB in 1 part, CONFIG GET and LATENCY LATEST at most a few hundred parts of a few bytes.
_LARGEST_REPLY = 256 * 1024
_MOST_PARTS = 512
# Of an error, for a log or a page.
_LONGEST_TEXT = 200

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid

Address = tuple[int, Any]
"""A socket's family and its address, which has another shape in each family."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What has to be read or looked up before a connection can be opened."""

    addresses: tuple[Address, ...]
    password: str
    tls: ssl.SSLContext | None


def prepare(target: Target, password_file: str) -> Prepared:
    """Look up the host, read the password (see `Login`) and the certificates. Blocks; raises `Down`."""
    try:
        password = target.login.password(password_file) if target.login else ""
    except (OSError, UnicodeError) as error:
        raise Down(DownReason.AUTH, f"the password cannot be read: {_text(error)}") from None
    try:
        tls = _tls_context(target.tls) if target.tls else None
    except (OSError, ValueError) as error:
        raise Down(DownReason.TLS, f"the certificates cannot be read: {_text(error)}") from None
    if target.path:
        return Prepared(((socket.AF_UNIX, target.path),), password, tls)
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Down(DownReason.UNREACHABLE, f"{target.host} cannot be resolved: {_text(error)}") from None
    return Prepared(tuple((family, address) for family, _, _, _, address in found), password, tls)


def _tls_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca_certs or None)
    # Python 3.13 would refuse certificates that redis-cli takes: those without a key identifier of their authority.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = tls.check_hostname
    if tls.certfile:
        context.load_cert_chain(tls.certfile, tls.keyfile or None)
    return context


def in_own_thread(function: Callable[[], _T]) -> asyncio.Future[_T]:
    """Run a function that may hang in a thread of its own, and return its outcome as a future.

    A name server that does not answer would else keep one of the threads that collectors share, and the process
    from ending.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def deliver(result: _T | None, error: Exception | None) -> None:
        if future.done():
            if isinstance(result, socket.socket):
                result.close()
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # None only if the function returns it
        else:
            _fail(future, error)

    def run() -> None:
        try:
            outcome: tuple[_T | None, Exception | None] = (function(), None)
        except Exception as error:  # noqa: BLE001  (handed to whoever waits)
            outcome = (None, error)
        with suppress(RuntimeError):
            # The loop may have ended meanwhile, and nobody waits any more.
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=run, name="shoal-redis", daemon=True).start()
    return future


class _Reader(asyncio.StreamReader):
    """A stream that ends where a reply is larger than any server's, before it costs the node its memory or time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.begin_reply()

    def begin_reply(self) -> None:
        """Allow one more reply."""
        self._bytes_left = _LARGEST_REPLY
        self._parts_left = _MOST_PARTS

    async def readline(self) -> bytes:
        self._parts_left -= 1
        if self._parts_left < 0:
            raise ValueError("a reply of too many parts")
        line = await super().readline()
        if line.endswith(b"\n") and not line.endswith(b"\r\n"):
            # redis-py would take it for the end of the connection.
            raise ValueError("a line that does not end as the protocol's do")
        return line

    async def readexactly(self, n: int) -> bytes:
        self._bytes_left -= n
        if self._bytes_left < 0:
            raise ValueError("a reply of too many bytes")
        return await super().readexactly(n)


class _Connection(AbstractConnection):
    """redis-py's protocol and login, over a stream that is already open."""

    def __init__(self, name: str, reader: _Reader, writer: asyncio.StreamWriter, user: str, password: str) -> None:
        super().__init__(
            username=user or None,
            password=password or None,
            protocol=2,
            parser_class=_AsyncRESP2Parser,
            driver_info=None,
            socket_timeout=None,
            socket_connect_timeout=None,
        )
        self._name = name
        self._stream = (reader, writer)

    async def _connect(self) -> None:
        self._reader, self._writer = self._stream

    def _host_error(self) -> str:
        return self._name

    def repr_pieces(self) -> list[tuple[str, str]]:
        return [("server", self._name)]


async def open_client(target: Target, prepared: Prepared, proc: str) -> Client:
    """Connect and log in. `proc` is where the process of another network namespace is found. Raises `Down`."""
    loop = asyncio.get_running_loop()
    sock = await _connected(target, prepared.addresses, proc)
    try:
        local_pid = _pid_behind(sock)
        same_host = sock.family == socket.AF_UNIX or _same_host(sock.getsockname()[0], sock.getpeername()[0])
    except OSError as error:
        sock.close()
        raise Down(DownReason.CLOSED, _text(error)) from None
    if target.login is None and not same_host:
        # What a process calls itself must not make the exporter talk to another machine.
        sock.close()
        raise Down(DownReason.UNREACHABLE, f"{target.name} is no address of the server's own network namespace")
    reader = _Reader(loop)
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        transport, _ = await loop.create_connection(
            lambda: protocol, sock=sock, ssl=prepared.tls, server_hostname=target.host if prepared.tls else None
        )
    except OSError as error:
        sock.close()
        raise _down(error) from None
    except BaseException:
        sock.close()
        raise
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    user = target.login.user if target.login else ""
    connection = _Connection(target.name, reader, writer, user, prepared.password)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    except (RedisError, OSError, ValueError, RecursionError) as error:
        raise _down(error) from None
    finally:
        if not connection.is_connected:
            transport.abort()
    return Client(connection, reader, writer, local_pid, same_host=same_host)


async def _connected(target: Target, addresses: Iterable[Address], proc: str) -> socket.socket:
    last = Down(DownReason.UNREACHABLE, f"{target.name} has no address")
    for family, address in addresses:
        sock = await _new_socket(target, family, proc)
        try:
            if family == socket.AF_UNIX:
                # Connects at once or not at all: asyncio would take a full accept queue (EAGAIN) for progress.
                sock.connect(address)
            else:
                await asyncio.get_running_loop().sock_connect(sock, address)
        except OSError as error:
            sock.close()
            last = _down(error)
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last


async def _new_socket(target: Target, family: int, proc: str) -> socket.socket:
    make = partial(socket.socket, family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if target.namespace_of is None:
            return make()
        return await in_own_thread(partial(open_in_namespace, proc, target.namespace_of, make))
    except (Unavailable, Vanished, OSError) as error:
        raise Down(DownReason.UNREACHABLE, _text(error)) from None


def _same_host(local: str, peer: str) -> bool:
    """Tell from a connection's two ends whether it stays in its network namespace: Linux prefers the same address."""
    return local == peer or ipaddress.ip_address(peer.partition("%")[0]).is_loopback


def _pid_behind(sock: socket.socket) -> int | None:
    """Return the process that listens on the other end of a Unix socket, as the kernel tells it (SO_PEERCRED)."""
    if sock.family != socket.AF_UNIX:
        return None
    pid: int = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid or None


class Client:
    """An open connection. Commands may be sent while others wait: the server answers in their order.

    `local_pid` is the process behind a Unix socket. `same_host` tells that the server is in the network namespace of
    this end, and may be the process that its INFO names.
    """

    def __init__(
        self,
        connection: _Connection,
        reader: _Reader,
        writer: asyncio.StreamWriter,
        local_pid: int | None,
        *,
        same_host: bool,
    ) -> None:
        """Begin to receive."""
        self.local_pid = local_pid
        self.same_host = same_host
        self._connection = connection
        self._reader = reader
        self._writer = writer
        self._waiting: deque[asyncio.Future[object]] = deque()
        self._down = Down(DownReason.CLOSED, "the connection was closed here")
        self.ended: asyncio.Task[Down] = asyncio.create_task(self._receive())
        """Done when the connection has ended, with the reason."""

    def send(self, *words: str) -> asyncio.Future[object]:
        """Send a command; the future is its reply, an `ErrorReply`, or the `Down` with which the connection ended."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        if self.ended.done():
            _fail(future, Down(self._down.reason, str(self._down)))
            return future
        self._waiting.append(future)
        self._writer.writelines(self._connection.pack_command(*words))
        return future

    def give_up(self, down: Down) -> None:
        """End the connection because of what was received on it."""
        self._down = down
        self._reader.set_exception(down)

    async def close(self, down: Down) -> None:
        """End the connection, and with this reason everything that waits for a reply."""
        self._down = down
        self.ended.cancel()
        await asyncio.wait({self.ended})
        self._writer.transport.abort()
        await self._connection.disconnect(nowait=True)

    async def _receive(self) -> Down:
        try:
            while True:
                self._reader.begin_reply()
                reply: object
                try:
                    reply = await self._connection.read_response()
                except ResponseError as error:
                    reply = _error_reply(error)
                if not self._waiting:
                    raise ValueError("a reply that nobody asked for")  # noqa: TRY301  (one place ends the connection)
                future = self._waiting.popleft()
                if future.done():
                    continue
                if isinstance(reply, ErrorReply):
                    _fail(future, reply)
                else:
                    future.set_result(reply)
        except Down as down:
            return down
        except (RedisError, OSError, ValueError, RecursionError) as error:
            self._down = _down(error)
            return self._down
        finally:
            for future in self._waiting:
                if not future.done():
                    _fail(future, self._down)


def _fail(future: asyncio.Future[_T], error: Exception) -> None:
    future.set_exception(error)
    # Whoever waited may have given up; asyncio would complain that nobody looked.
    future.exception()


def _error_reply(error: ResponseError) -> ErrorReply:
    # redis-py cuts the code off the texts that it has a class for.
    code = "NOPERM " if isinstance(error, NoPermissionError) else ""
    return ErrorReply(f"{code}{error}"[:_LONGEST_TEXT])


def _down(error: Exception) -> Down:
    """Say what an exception of the connection, the handshake or the protocol means for the server."""
    reason = DownReason.ERROR
    if isinstance(error, AuthenticationError | NoPermissionError) or str(error).startswith("DENIED"):
        reason = DownReason.AUTH
    elif isinstance(error, BusyLoadingError):
        reason = DownReason.LOADING
    elif isinstance(error, ssl.SSLError):
        reason = DownReason.TLS
    elif isinstance(error, RedisConnectionError):
        reason = DownReason.ERROR if "max number of clients" in str(error) else DownReason.CLOSED
    elif isinstance(error, TimeoutError | BlockingIOError):
        reason = DownReason.TIMEOUT
    elif isinstance(error, ConnectionRefusedError | FileNotFoundError):
        reason = DownReason.REFUSED
    elif isinstance(error, ConnectionError):
        reason = DownReason.CLOSED
    elif isinstance(error, OSError):
        reason = DownReason.UNREACHABLE
    elif not isinstance(error, ResponseError):
        reason = DownReason.PROTOCOL
    # What a stranger sent in place of the protocol is not repeated.
    return Down(reason, "it does not speak the Redis protocol" if reason is DownReason.PROTOCOL else _text(error))


def _text(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    return text[:_LONGEST_TEXT]
