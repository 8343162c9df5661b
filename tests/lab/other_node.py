"""Another node, as far as Prometheus knows: its exporter fails, and then is gone. A monitor must not fail silently.

This is none of the fourteen failures, and the exporter's own: a collector hangs, as the directory by which the kubelet
names pods is on a file system whose server does not answer. node_exporter beside it proves that the node is up.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from tests.lab.stack import OTHER_PORTS, running, wait_until_it_listens

from shoal.collectors import available_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["ALERTS", "other_node"]

ALERTS: Final = ("ShoalCollectorFailing", "ShoalExporterDown")
"""What must come of it, in this order."""

_HANGS: Final = "listen_queue"
_WORKS: Final = "redis_aof"
# A file system of FUSE whose server reads no request, in a mount namespace of the exporter's own.
_MOUNT: Final = (
    "exec 3<>/dev/fuse"
    ' && mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 nobody "$0/var/log/pods" && exec "$@"'
)


@contextmanager
def other_node(directory: Path) -> Iterator[ExitStack]:
    """Start both exporters of the other node; what is given ends Shoal's when it is closed."""
    root = directory / "other"
    (root / "var/log/pods").mkdir(parents=True)
    commands = {
        "node_exporter": [
            "prometheus-node-exporter",
            f"--web.listen-address=127.0.0.1:{OTHER_PORTS['node_exporter']}",
            "--web.disable-exporter-metrics",
            "--collector.disable-defaults",
            "--collector.uname",
        ],
        "exporter": [
            *("unshare", "--mount", "sh", "-c", _MOUNT, str(root)),
            *(sys.executable, "-m", "shoal", f"--path.rootfs={root}"),
            f"--web.listen-address=127.0.0.1:{OTHER_PORTS['exporter']}",
            *(f"--no-collector.{name}" for name in available_names() if name not in {_HANGS, _WORKS}),
        ],
    }
    with ExitStack() as stays, ExitStack() as goes:
        for name, command in commands.items():
            log = directory / f"other-{name}.log"
            process = (goes if name == "exporter" else stays).enter_context(running(command, log))
            wait_until_it_listens(name, OTHER_PORTS[name], process, log)
        yield goes
