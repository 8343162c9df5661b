"""One server watched: a connection that is kept, a PING five times a second, and its numbers when someone asks."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from shoal.kernel.files import Reason, Unavailable
from shoal.redis.client import Client, in_own_thread, open_client, prepare
from shoal.redis.errors import Down, DownReason, ErrorReply, MalformedReply
from shoal.redis.info import LatencyEvent, number, parse_config, parse_info, parse_latency

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.redis.client import Prepared
    from shoal.redis.targets import Target

__all__ = ["Reading", "Server"]

logger = logging.getLogger(__name__)

_PING_SECONDS = 0.2
# How long a server may take to log in and to answer a PING before it counts as down.
_SILENCE_SECONDS = 5.0
# How long a scrape waits for INFO. With `always` two flushes stand before an answer, that of the turn of the server's
# loop in which the question comes in and that of the turn which answers it, and on a slow disk each took 0.7 s.
_READ_SECONDS = 2.0
_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 10.0
# While an answer is awaited, the loop wakes this often to see whether it is the exporter itself that was late.
_WATCH_SECONDS = 0.02
# A timer this late is how timers are.
_SLACK_SECONDS = 0.01
_PARAMETERS = ("appendfsync", "no-appendfsync-on-rewrite", "latency-monitor-threshold", "dir")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server told at one scrape; `config` and `latency` may be refused to this user.

    `pid` is the process that it says, or the kernel says, that it is; to be checked before it is believed.
    """

    info: dict[str, str]
    config: dict[str, str] | Unavailable
    latency: dict[str, LatencyEvent] | Unavailable
    pid: int | None


class Server:
    """Keeps a connection to one server, connects again when it ends, and measures how long it takes to answer.

    `observe` is called with the seconds that each PING took. PINGs are sent when they are due, whether or not the
    ones before were answered, so that a stall of two seconds is ten slow PINGs and not one. The time in which the
    exporter itself could not run (its own CPU limit, say) is no stall of the server: it is left out, and summed in
    `own_delay`.
    """

    def __init__(self, target: Target, observe: Callable[[float], None], proc: str, password_file: str) -> None:
        """Remember what to watch; `run` does it. `proc` is where proc is mounted, for `password_file` see `Login`."""
        self.target = target
        self.own_delay = 0.0
        self._observe = observe
        self._proc = proc
        self._password_file = password_file
        self._client: Client | None = None
        self._down = Down(DownReason.TIMEOUT, "not connected yet")
        self._tried = asyncio.Event()
        self._preparation: asyncio.Future[Prepared] | None = None
        self._refused: dict[str, Unavailable] = {}
        self._unanswered: deque[tuple[float, float]] = deque()
        self._awake = 0.0

    async def run(self) -> NoReturn:
        """Connect, PING, and connect again, until cancelled."""
        retry = _FIRST_RETRY_SECONDS
        while True:
            client = None
            try:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    client = await self._open()
                self._up(client)
                retry = _FIRST_RETRY_SECONDS
                await self._ping_until_down(client)
            except TimeoutError:
                self._lost(Down(DownReason.TIMEOUT, f"no answer within {_SILENCE_SECONDS:g} s"))
            except Down as down:
                self._lost(down)
            except Exception as error:  # noqa: BLE001  (a watcher that ended would never see the server come back)
                self._lost(Down(DownReason.ERROR, f"{type(error).__name__}: {error}"))
            finally:
                if client:
                    await client.close(self._down)
            await asyncio.sleep(retry)
            retry = min(2 * retry, _LAST_RETRY_SECONDS)

    async def read(self) -> Reading:
        """Ask for the server's numbers. Raises `Down`, at once if it is known to be down, else within two seconds."""
        try:
            async with asyncio.timeout(_READ_SECONDS):
                await self._tried.wait()
                if self._client is None:
                    raise self._down.with_traceback(None)
                return await self._read(self._client)
        except TimeoutError:
            raise Down(DownReason.TIMEOUT, f"no answer to INFO within {_READ_SECONDS:g} s") from None
        except MalformedReply as error:
            raise Down(DownReason.PROTOCOL, str(error)) from None

    async def _open(self) -> Client:
        # What hangs is waited for again at the next attempt, not begun anew, so that threads do not pile up.
        self._preparation = self._preparation or in_own_thread(partial(prepare, self.target, self._password_file))
        await asyncio.wait({self._preparation})
        preparation, self._preparation = self._preparation, None
        client = await open_client(self.target, preparation.result(), self._proc)
        try:
            await client.send("PING")
        except ErrorReply as error:
            if (down := _refusal(error)).reason is DownReason.AUTH:
                await client.close(down)
                raise down from None
        except BaseException:
            await client.close(self._down)
            raise
        return client

    def _up(self, client: Client) -> None:
        logger.info("redis server answers", extra={"server": self.target.name})
        self._client = client
        self._refused = {}
        self._tried.set()

    def _lost(self, down: Down) -> None:
        if self._client or not self._tried.is_set() or self._down.reason is not down.reason:
            logger.warning(
                "redis server is down",
                extra={"server": self.target.name, "reason": down.reason.value, "detail": str(down)},
            )
        self._client = None
        self._down = down
        self._tried.set()

    async def _ping_until_down(self, client: Client) -> NoReturn:
        now = asyncio.get_running_loop().time
        self._unanswered.clear()
        due = self._awake = now()
        while True:
            if now() >= due:
                self._ping(client)
                # PINGs that the exporter was too late for are not made up for.
                due = max(due + _PING_SECONDS, now())
            self._awake = min(due, now() + _WATCH_SECONDS) if self._unanswered else due
            await asyncio.wait({client.ended}, timeout=self._awake - now())
            if client.ended.done():
                raise client.ended.result()
            self.own_delay, self._awake = self._late(), now()
            if self._unanswered and self._waited(*self._unanswered[0]) > _SILENCE_SECONDS:
                for sent in self._unanswered:
                    self._observe(self._waited(*sent))
                raise Down(DownReason.TIMEOUT, f"no answer to PING within {_SILENCE_SECONDS:g} s")

    def _ping(self, client: Client) -> None:
        self._unanswered.append((asyncio.get_running_loop().time(), self._late()))
        client.send("PING").add_done_callback(partial(self._answered, client))

    def _answered(self, client: Client, reply: asyncio.Future[object]) -> None:
        error = reply.exception()
        if isinstance(error, Down) or not self._unanswered:
            return
        # An error is an answer too, such as MISCONF of a server that cannot write its append-only file.
        self._observe(self._waited(*self._unanswered.popleft()))
        if error is None and reply.result() != b"PONG":
            # A reply was skipped or sent twice, and every later one would be taken for another's.
            client.give_up(Down(DownReason.PROTOCOL, "PING is not answered by PONG"))

    def _waited(self, sent: float, late_then: float) -> float:
        """Return for how long a PING has been on its way while the exporter was there to see it come back."""
        elapsed = asyncio.get_running_loop().time() - sent
        return max(0.0, elapsed - (self._late() - late_then))

    def _late(self) -> float:
        """Return the time that the exporter was late so far, with what it is late now."""
        late = asyncio.get_running_loop().time() - self._awake
        return self.own_delay + (late if late > _SLACK_SECONDS else 0.0)

    async def _read(self, client: Client) -> Reading:
        # All at once: a server that stalls at every turn of its loop answers them in one.
        asked = client.send("INFO")
        parameters = [self._ask(client, "CONFIG", "GET", parameter) for parameter in _PARAMETERS]
        latest = self._ask(client, "LATENCY", "LATEST")
        try:
            info = parse_info(await asked)
        except ErrorReply as error:
            raise _refusal(error) from None
        if number(info, "loading"):
            raise Down(DownReason.LOADING, "it reads its data")
        config: dict[str, str] | Unavailable
        latency: dict[str, LatencyEvent] | Unavailable
        try:
            config = {}
            for parameter in parameters:
                config |= parse_config(await self._allowed(parameter, "CONFIG"))
        except Unavailable as error:
            config = error
        try:
            latency = parse_latency(await self._allowed(latest, "LATENCY"))
            if isinstance(config, dict) and number(config, "latency-monitor-threshold") == 0:
                latency = Unavailable(Reason.DISABLED, f"the latency monitor of {self.target.name} is off")
        except Unavailable as error:
            latency = error
        pid = client.local_pid or (number(info, "process_id") if client.same_host else None)
        return Reading(info, config, latency, pid)

    def _ask(self, client: Client, *words: str) -> asyncio.Future[object] | None:
        """Send a command that this user may not be allowed; not again once it was refused, as servers log that."""
        return None if words[0] in self._refused else client.send(*words)

    async def _allowed(self, reply: asyncio.Future[object] | None, command: str) -> object:
        """Return the reply to such a command. Raises `Unavailable` if it was refused, now or before."""
        if reply is None:
            raise self._refused[command].with_traceback(None)
        try:
            return await reply
        except ErrorReply as error:
            reason = Reason.NO_PERMISSION if str(error).startswith("NOPERM") else Reason.DISABLED
            self._refused[command] = Unavailable(reason, f"{self.target.name} refuses {command}: {error}")
            raise self._refused[command] from None


def _refusal(error: ErrorReply) -> Down:
    """Say what a server means that answers what it should answer anyone with an error."""
    reasons = {"NOPERM": DownReason.AUTH, "DENIED": DownReason.AUTH, "BUSY": DownReason.BUSY}
    return Down(reasons.get(str(error).partition(" ")[0], DownReason.ERROR), str(error))
