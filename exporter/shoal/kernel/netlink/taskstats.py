"""Delay accounting: for how long the threads of a process waited, and for what, by generic netlink.

The family TASKSTATS answers for one process at a time with struct taskstats of include/uapi/linux/taskstats.h, and
says in its first field which version of it. Every request needs CAP_NET_ADMIN in the initial user namespace, and
names the process as the asker's own PID namespace does. Since 2.6.19; the members are in the machine's byte order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

from shoal.kernel.files import ParseError, Reason, Unavailable, read
from shoal.kernel.netlink.core import NetlinkSocket, Subsystem, attributes, open_socket
from shoal.kernel.sysctls import read_sysctl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shoal.kernel.netlink.core import SocketOpener

__all__ = ["TaskStats", "TaskStatsSocket", "check_accounting", "parse_family_id", "parse_taskstats"]

_FILE: Final = "netlink taskstats"
_NANO: Final = 1_000_000_000

# struct genlmsghdr: cmd, version, two bytes of padding
_GENL_HEADER: Final = struct.Struct("=BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
_U16: Final = struct.Struct("=H")
_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")

# include/uapi/linux/genetlink.h
_GENL_ID_CTRL: Final = 0x10
_CTRL_CMD_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID: Final = 1
_CTRL_ATTR_FAMILY_NAME: Final = 2

# include/uapi/linux/taskstats.h
_NAME: Final = b"TASKSTATS\0"
_TASKSTATS_CMD_GET: Final = 1
_TASKSTATS_CMD_ATTR_TGID: Final = 2
_TASKSTATS_TYPE_STATS: Final = 3
_TASKSTATS_TYPE_AGGR_TGID: Final = 5

# Where each total stands in the struct, in bytes. A version has all of an older one in the same places, but for 15.
_OFFSETS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "run_queue": 24,
        "block_io": 40,
        "swap_in": 56,
        "reclaim": 320,
        "thrashing": 336,
        "compaction": 360,
        "copy_on_write": 408,
        "irq": 424,
    }
)
# Version 15 (6.14) put a maximum and a minimum behind each total, which moved everything after them; 16 took them back
# to the end, and 17 is longer again.
_OFFSETS_15: Final[Mapping[str, int]] = MappingProxyType(
    {
        "run_queue": 24,
        "block_io": 56,
        "swap_in": 88,
        "reclaim": 368,
        "thrashing": 400,
        "compaction": 440,
        "copy_on_write": 504,
        "irq": 536,
    }
)
# In every version the count stands before its total.
_COUNT: Final = -8
_INTERLEAVED: Final = 15
_OLDEST: Final = 9
_SINCE: Final[Mapping[str, int]] = MappingProxyType({"compaction": 11, "copy_on_write": 13, "irq": 14})
_LAST_WITHOUT_SWITCH: Final = 10


@dataclass(frozen=True, slots=True)
class TaskStats:
    """What the threads of one process, ended ones included, have waited since it started: seconds.

    None where this kernel's struct is too old to have it. All but `run_queue` are 0 where delay accounting is off
    (`kernel.task_delayacct`), and count from then on for processes that start after it was switched on. A page that
    is waited for can count twice: `swap_in` and `thrashing` waits end in the block layer and are in `block_io` too.
    """

    version: int
    """TASKSTATS_VERSION of the kernel: 9 in 4.20, 10 in 5.10, 13 in 6.1, 14 in 6.12, 16 in 6.18."""
    run_queue: float
    """cpu_delay_total: runnable, and waiting for a CPU. Counted without delay accounting too."""
    block_io: float
    """blkio_delay_total: waiting for block I/O that was asked for synchronously."""
    swap_in: float
    """swapin_delay_total: waiting for a page to come from swap."""
    reclaim: float
    """freepages_delay_total: reclaiming memory on its own account."""
    thrashing: float
    """thrashing_delay_total: waiting for a page that had been evicted shortly before."""
    block_io_waits: int
    """blkio_count: how many waits `block_io` is the sum of."""
    compaction: float | None
    """compact_delay_total: compacting memory for a large page. Version 11; not in 5.10."""
    copy_on_write: float | None
    """wpcopy_delay_total: copying a page that was shared until it was written. Version 13; in 6.1."""
    irq: float | None
    """irq_delay_total: interrupted by interrupts. Version 14; in 6.12. Stays 0 without CONFIG_IRQ_TIME_ACCOUNTING."""


def parse_family_id(message: bytes) -> int:
    """Return the number of the family that CTRL_CMD_GETFAMILY was asked for. Raises `ParseError`."""
    found = attributes(message, _GENL_HEADER.size, "netlink nlctrl", 1)
    family = found.get(_CTRL_ATTR_FAMILY_ID, b"")
    if len(family) != _U16.size:
        raise ParseError("netlink nlctrl", 1, "CTRL_ATTR_FAMILY_ID of 2 bytes")
    (number,) = _U16.unpack(family)
    return int(number)


def parse_taskstats(message: bytes) -> TaskStats:
    """Decode the answer to TASKSTATS_CMD_GET for a thread group (without netlink header).

    Raises `ParseError`, and `Unavailable` for a version that is too old.
    """
    group = attributes(message, _GENL_HEADER.size, _FILE, 1).get(_TASKSTATS_TYPE_AGGR_TGID)
    if group is None:
        raise ParseError(_FILE, 1, "TASKSTATS_TYPE_AGGR_TGID")
    stats = attributes(group, 0, _FILE, 1).get(_TASKSTATS_TYPE_STATS, b"")
    if len(stats) < _U16.size:
        raise ParseError(_FILE, 1, f"struct taskstats, found {len(stats)} bytes")
    (version,) = _U16.unpack_from(stats)
    if version < _OLDEST:
        raise Unavailable(Reason.NOT_IN_KERNEL, f"struct taskstats is of version {version}, older than {_OLDEST}")
    offsets = _OFFSETS_15 if version == _INTERLEAVED else _OFFSETS
    totals: dict[str, float] = {}
    for name, offset in offsets.items():
        if version < _SINCE.get(name, _OLDEST):
            continue
        if len(stats) < offset + _U64.size:
            raise ParseError(_FILE, 1, f"{name} at byte {offset} of version {version}, found {len(stats)} bytes")
        totals[name] = _U64.unpack_from(stats, offset)[0] / _NANO
    return TaskStats(
        version=version,
        run_queue=totals["run_queue"],
        block_io=totals["block_io"],
        swap_in=totals["swap_in"],
        reclaim=totals["reclaim"],
        thrashing=totals["thrashing"],
        block_io_waits=_U64.unpack_from(stats, offsets["block_io"] + _COUNT)[0],
        compaction=totals.get("compaction"),
        copy_on_write=totals.get("copy_on_write"),
        irq=totals.get("irq"),
    )


def check_accounting(proc: str, version: int) -> None:
    """Raise `Unavailable` unless this kernel, of that version of the struct, is counting delays now.

    Since 5.14 it does so only when told: by kernel.task_delayacct or the boot parameter `delayacct`. Before it did
    unless it was booted with `nodelayacct`, and had no sysctl, so that version 10 without a sysctl is taken to be such
    a kernel; a later one without it was built without CONFIG_TASK_DELAY_ACCT.
    """
    try:
        on = read_sysctl(proc, "kernel/task_delayacct") != 0
    except Unavailable as error:
        if error.reason is not Reason.NOT_IN_KERNEL:
            raise
        if version > _LAST_WITHOUT_SWITCH:
            raise Unavailable(Reason.NOT_IN_KERNEL, "this kernel was built without delay accounting") from None
        on = b"nodelayacct" not in read(f"{proc}/cmdline").split()
    if not on:
        raise Unavailable(Reason.DISABLED, "delay accounting is off: kernel.task_delayacct, or a boot parameter")


class TaskStatsSocket:
    """Asks for one process after another over one socket, for the length of one `with`."""

    __slots__ = ("_family", "_netlink")

    def __init__(self, *, opener: SocketOpener = open_socket) -> None:
        """Open the socket and look the family up. Raises `Unavailable` (NOT_IN_KERNEL without CONFIG_TASKSTATS)."""
        self._netlink = NetlinkSocket(Subsystem.GENERIC, opener=opener)
        try:
            request = _GENL_HEADER.pack(_CTRL_CMD_GETFAMILY, 1, 0) + _attribute(_CTRL_ATTR_FAMILY_NAME, _NAME)
            self._family = parse_family_id(self._netlink.request(_GENL_ID_CTRL, request))
        except BaseException:
            self._netlink.__exit__()
            raise

    def __enter__(self) -> Self:
        """Return itself; the socket is already open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._netlink.__exit__()

    def read(self, pid: int) -> TaskStats:
        """Return the totals of a thread group, by the id that the asker's own PID namespace has for it.

        Raises `Vanished` when it has ended, `Unavailable` (NO_PERMISSION without CAP_NET_ADMIN) or `ParseError`.
        """
        request = _GENL_HEADER.pack(_TASKSTATS_CMD_GET, 1, 0) + _attribute(_TASKSTATS_CMD_ATTR_TGID, _U32.pack(pid))
        return parse_taskstats(self._netlink.request(self._family, request))


def _attribute(kind: int, value: bytes) -> bytes:
    padding = -len(value) % 4
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(padding)
