"""The fault lab: `python -m tests.lab run [FAILURE]...`, `list`, or `demo FAILURE`.

Starts the node in namespaces of its own, and clears away the cgroups of a run that was killed, which is all that can be
left of one. Two runs at a time share nothing: each has its own network, processes, mounts and cgroups.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.lab import inside
from tests.lab.faults import load
from tests.lab.features import IN_VM
from tests.lab.node import cgroup_mount, mount, remove_cgroups
from tests.lab.report import Report
from tests.lab.stack import PORTS, PROGRAMS, REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Sequence

_PREFIX: Final = "shoallab"
_TOOLS: Final = (*PROGRAMS, "ip", "ss", "nstat", "nft", "conntrack", "sysctl", "nsenter", "setpriv", "unshare")
# With --kill-child the first process, and with it all others, ends when unshare does; unshare ends when we do.
_UNSHARE: Final = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_ENTER_CGROUP: Final = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
_MS_BIND: Final = 4096
_NOT_GOOD: Final = 1
"""The exit status of a run that found something wrong, and wrote a report of it."""


def main() -> int:
    """Do what the command line says and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument("command", choices=("run", "list", "demo"))
    parser.add_argument("failures", nargs="*", metavar="FAILURE", help="all of them by default")
    parser.add_argument("--output", type=Path, default=REPOSITORY / ".lab", help="where the report goes (.lab)")
    parser.add_argument("--interval", type=int, default=5, help="seconds between scrapes (5)")
    parser.add_argument("--patience", type=float, default=480, help="seconds to wait for a page (480)")
    parser.add_argument("--resolve-within", type=float, default=1200, help="seconds to wait for its end (1200)")
    parser.add_argument("--tries", type=int, choices=(1, 2), default=1, help="2 tries once more what fails (1)")
    parser.add_argument("--inside", metavar="CGROUP", help=argparse.SUPPRESS)
    parser.add_argument("--doors", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    known = {fault.name: fault for fault in load()}
    if unknown := set(arguments.failures) - known.keys():
        parser.error(f"there is no failure {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if arguments.command == "list":
        sys.stdout.writelines(f"{one.number:2} {one.name}: {one.title} ({one.alert})\n" for one in known.values())
        return 0
    if arguments.command == "demo" and len(arguments.failures) != 1:
        parser.error(f"say which failure to show: {', '.join(known)}")
    if arguments.inside:
        return _inside(arguments)
    if wrong := _missing():
        sys.stderr.write(f"lab: {wrong}\n")
        return 2
    if arguments.command == "run":
        Report.forget(arguments.output)
    status = _outside(arguments, sys.argv[1:])
    return _try_again(arguments) if status == _NOT_GOOD and arguments.tries > 1 else status


def _try_again(arguments: argparse.Namespace) -> int:
    """Run once more what was not as it should be, put both reports together, and return the exit status.

    For CI: a wait on a machine that has other work may be too short once. What is wrong is so twice.
    """
    first = Report.read(arguments.output)
    names = first.failed if first else arguments.failures
    if first and not names:
        # Something about the run as a whole, which no second try mends.
        return _NOT_GOOD
    sys.stdout.write(f"\nOnce more: {', '.join(names) or 'all'}\n\n")
    sys.stdout.flush()
    output = arguments.output / "second" if first else arguments.output
    options = [f"--{name}={getattr(arguments, name)}" for name in ("interval", "patience")]
    options += [f"--resolve-within={arguments.resolve_within}", f"--output={output}"]
    status = _outside(arguments, ["run", *names, *options])
    second = Report.read(output)
    if not first or not second:
        return status
    both = first.tried_again(second)
    both.write(arguments.output)
    sys.stdout.write(f"\n{both.markdown()}\n{both.line}\n")
    return 0 if both.good else _NOT_GOOD


def _missing() -> str:
    """Say in a sentence what the lab cannot do without, or nothing."""
    if os.geteuid():
        return "must be root, to make namespaces and cgroups"
    # Debian keeps some of them where only root's path looks.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in _TOOLS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} must be installed: tests/packages.sh does it on Debian"
    try:
        cgroup_mount()
    except FileNotFoundError as error:
        return str(error)
    return ""


def _outside(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Make the namespaces, run this program in them, and clear away what outlives them."""
    cgroups = cgroup_mount()
    _clear_away()
    top = cgroups / f"{_PREFIX}{os.getpid()}.slice"
    arguments.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        command = ["setpriv", "--pdeathsig", "KILL", "--"]
        if IN_VM:
            # The virtual machine is the node; only its own mounts and processes are to be told from the machine's.
            command += _UNSHARE
        else:
            top.mkdir()
            stack.callback(remove_cgroups, top)
            command += ["sh", "-c", _ENTER_CGROUP, str(top), *_UNSHARE, "--net", "--cgroup"]
        command += [sys.executable, "-m", "tests.lab", *words, "--inside", str(cgroups if IN_VM else top)]
        doors = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        if arguments.command == "demo":
            command += ["--doors", ",".join(str(door.fileno()) for door in doors)]
            for name, door in zip(PORTS, doors, strict=True):
                if name != "webhook":
                    sys.stdout.write(f"{name}: http://127.0.0.1:{door.getsockname()[1]}/\n")
            sys.stdout.flush()
        # In a session of its own: an interrupt from the terminal comes to this process alone, which passes it on.
        process = subprocess.Popen(
            command, cwd=REPOSITORY, pass_fds=[door.fileno() for door in doors], start_new_session=True
        )
        stack.callback(process.kill)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _interrupt_inside(process.pid))
        status = process.wait()
        return status if status >= 0 else 128 - status


def _clear_away() -> None:
    """Remove the cgroups of runs that were killed."""
    for left in cgroup_mount().glob(f"{_PREFIX}*.slice"):
        if not Path("/proc", left.name.removeprefix(_PREFIX).removesuffix(".slice")).exists():
            remove_cgroups(left)


def _interrupt_inside(unshare: int) -> None:
    """Tell the process inside to clear up, once; unshare itself waits for it whatever it is sent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for pid in Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split():
        os.kill(int(pid), signal.SIGTERM)


def _inside(arguments: argparse.Namespace) -> int:
    """Be process 1 of the node."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not IN_VM:
        # The kernel refuses to mount cgroup v2 where it is mounted, in whichever cgroup namespace.
        mount(arguments.inside, cgroup_mount(), "", _MS_BIND)
    pace = inside.Pace(arguments.interval, arguments.patience, arguments.resolve_within)
    try:
        if arguments.command == "demo":
            doors = [socket.socket(fileno=int(number)) for number in arguments.doors.split(",")]
            return inside.demo(arguments.failures[0], pace, doors=doors)
        return inside.main(arguments.failures, pace, output=arguments.output.resolve())
    except KeyboardInterrupt:
        sys.stderr.write("lab: interrupted; everything is cleared away\n")
        return 130
    except RuntimeError as error:
        sys.stderr.write(f"lab: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
