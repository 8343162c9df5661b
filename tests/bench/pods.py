"""What a kubelet and containerd call the pods and containers of a full node."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

__all__ = ["SANDBOX", "Pod", "pods"]

SANDBOX: Final = -1
"""The number of the container that only holds the pod's namespaces."""

_NAMESPACES: Final = ("shop", "payments", "media", "kube-system", "batch")
_APPS: Final = ("checkout", "ledger", "thumbnails", "coredns", "reports", "search", "cart")
_CONTAINERS: Final = ("app", "sidecar", "logs", "metrics")


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod and where its parts are."""

    number: int
    containers: int

    @property
    def uid(self) -> str:
        """As the API server makes it up: a UUID."""
        digits = _digits(f"pod {self.number}")
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]))

    @property
    def namespace(self) -> str:
        """The namespace that it is in."""
        return _NAMESPACES[self.number % len(_NAMESPACES)]

    @property
    def name(self) -> str:
        """The name, as a Deployment makes it up."""
        digits = _digits(f"name {self.number}")
        return f"{_APPS[self.number % len(_APPS)]}-{digits[:10]}-{digits[10:15]}"

    @property
    def address(self) -> str:
        """The address of its end of the veth pair."""
        return f"10.244.{self.number + 2 >> 8}.{self.number + 2 & 0xFF}"

    @property
    def netns(self) -> str:
        """Where its network namespace is kept, as CNI has it."""
        return f"/run/netns/cni-{self.uid}"

    def identity(self, container: int) -> str:
        """Return the id of a container; they are numbered from 0."""
        return _digits(f"container {self.number} {container}")

    def cgroup(self, container: int) -> str:
        """Return the path of a container's cgroup, as the systemd driver and containerd name it."""
        pod = f"kubepods-burstable-pod{self.uid.replace('-', '_')}.slice"
        return f"kubepods.slice/kubepods-burstable.slice/{pod}/cri-containerd-{self.identity(container)}.scope"

    def container_name(self, container: int) -> str:
        """Return what the pod calls a container."""
        return _CONTAINERS[container]


def pods(number: int, containers: int) -> list[Pod]:
    """Return so many pods that have so many containers together."""
    return [Pod(each, len(range(each, containers, number))) for each in range(number)]


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
