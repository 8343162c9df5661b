"""Decides who may ask, by password and by client certificate, so that a stranger learns nothing and costs little."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import time
from typing import TYPE_CHECKING

import bcrypt
from aiohttp import hdrs, web

from shoal.web_config import allowed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shoal.web_config import WebConfig

__all__ = ["Guard", "Passwords", "TooManyError"]

# bcrypt looks at no more bytes of a password.
_LONGEST = 72
# Comparisons that may wait for their turn, one of each address.
_WAITING = 8
# After a wrong password the next comparison waits for so many times what the last one took: whoever tries passwords
# gets a tenth of one processor.
_REST = 9
# No password has this hash: nobody can find one whose digest is all zeros.
_NO_DIGEST = b"." * 31


class TooManyError(Exception):
    """Too many passwords wait to be compared."""


class Guard:
    """What stands before every handler. Paths in `open_paths` need no password."""

    def __init__(self, config: WebConfig, open_paths: frozenset[str]) -> None:
        """Guard with what is in force at the moment of each request."""
        self._config = config
        self._open_paths = open_paths
        self._passwords = Passwords()

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Hand the request on, or answer 403, 401 or 429."""
        config = self._config.current
        if config.allowed_sans is not None:
            certificate = request.transport.get_extra_info("peercert") if request.transport else None
            if not allowed(certificate or {}, config.allowed_sans):
                raise web.HTTPForbidden(text="the client's certificate has none of the names that are allowed here\n")
        if config.users and request.path not in self._open_paths:
            try:
                credentials = _credentials(request.headers.get(hdrs.AUTHORIZATION, ""))
                right = credentials and await self._passwords.right(config.users, *credentials, request.remote or "")
            except TooManyError:
                raise web.HTTPTooManyRequests(headers={hdrs.RETRY_AFTER: "1"}) from None
            if not right:
                raise web.HTTPUnauthorized(headers={hdrs.WWW_AUTHENTICATE: 'Basic realm="shoal", charset="UTF-8"'})
        return await handler(request)

    async def prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the configured headers; end a connection whose TLS is no longer that of the configuration."""
        config = self._config.current
        response.headers.update(config.headers)
        if request.transport and request.transport.get_extra_info("sslcontext") is not config.tls:
            response.headers[hdrs.CONNECTION] = "close"
            response.force_close()


def _credentials(header: str) -> tuple[bytes, bytes] | None:
    """Return the name and the password that a header has, None if it has none."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except ValueError:
        return None
    return (user, password) if colon else None


class Passwords:
    """Compares passwords in a worker thread, one at a time, and remembers those that were right."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._known: dict[bytes, bytes] = {}
        """{user: keyed digest of the password and hash that were right}."""
        self._checks: dict[bytes, asyncio.Task[bool]] = {}
        self._addresses: set[str] = set()
        self._turn = asyncio.Lock()
        self._rest_until = 0.0

    async def right(self, users: Mapping[bytes, bytes], user: bytes, password: bytes, address: str) -> bool:
        """Tell whether this is the user's password. Raises `TooManyError` when too many wait, or one of this address.

        What is not remembered takes the same time for every user, whether there is one of this name or not.
        """
        password = password[:_LONGEST]
        # No user has a colon in its name.
        digest = hashlib.blake2b(users.get(user, b"") + user + b":" + password, key=self._key).digest()
        if hmac.compare_digest(self._known.get(user, b""), digest) and user in users:
            return True
        check = self._checks.get(digest)
        if check is None:
            if len(self._checks) >= _WAITING or address in self._addresses:
                raise TooManyError
            check = self._checks[digest] = asyncio.create_task(self._check(users, user, password, digest))
            self._addresses.add(address)
            check.add_done_callback(lambda _: self._ended(digest, address))
        # A client that goes away must not end what others wait for.
        return await asyncio.shield(check)

    def _ended(self, digest: bytes, address: str) -> None:
        del self._checks[digest]
        self._addresses.discard(address)

    async def _check(self, users: Mapping[bytes, bytes], user: bytes, password: bytes, digest: bytes) -> bool:
        async with self._turn:
            await asyncio.sleep(self._rest_until - time.monotonic())
            right, spent = await asyncio.to_thread(_compare, users, user, password)
            if right:
                self._known[user] = digest
            else:
                self._rest_until = time.monotonic() + _REST * spent
            return right


def _compare(users: Mapping[bytes, bytes], user: bytes, password: bytes) -> tuple[bool, float]:
    """Return whether the password is right, and the processor time that it took to find out."""
    began = time.thread_time()
    highest = max(map(_cost, users.values()))
    hashed = users.get(user) or _dummy(highest)
    right = bcrypt.checkpw(password, hashed)
    # A cost of n is 2^n rounds. Those of n, n + 1 and so on up to the highest, together, are as many as the highest.
    for cost in range(_cost(hashed), highest):
        bcrypt.checkpw(password, _dummy(cost))
    return right and user in users, time.thread_time() - began


def _cost(hashed: bytes) -> int:
    return int(hashed[4:6])


def _dummy(cost: int) -> bytes:
    return bcrypt.gensalt(cost) + _NO_DIGEST
