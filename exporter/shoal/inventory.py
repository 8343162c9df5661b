"""Who owns what: from a cgroup, a process or a network namespace to the pod, container or unit behind it.

Identity comes from the cgroup path alone (pod UID and container id, as each runtime writes them) and names from
the kubelet's own log directories, so no API server and no permission in the cluster is needed.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from shoal.kernel.cgroups import find_hierarchy, read_process_cgroups, read_processes, walk
from shoal.kernel.files import ParseError, Reason, Roots, Unavailable, Vanished, raise_if_exhausted
from shoal.kernel.namespaces import find_network_namespaces, named_namespaces, namespace_id, namespace_inode
from shoal.kernel.netstat import read_netstat
from shoal.kernel.processes import check_pid_namespace, check_processes_visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.kernel.cgroups import Cgroup, Hierarchy

__all__ = [
    "NETNS_LABELS",
    "OWNER_LABELS",
    "Inventory",
    "LabelledNamespace",
    "Node",
    "Owner",
    "Workload",
    "build_inventory",
]

OWNER_LABELS = ("namespace", "pod", "container", "unit")
"""The label names of a workload, in the order of the fields of `Owner`."""

NETNS_LABELS = ("netns", *OWNER_LABELS)
"""The label names of a network namespace."""

_T = TypeVar("_T")

# A container's own cgroup, as the last part of the path: `cri-containerd-<id>.scope`, `crio-<id>.scope`,
# `docker-<id>.scope`, `libpod-<id>.scope` with the systemd driver; `<id>`, `crio-<id>`, `libpod-<id>` with cgroupfs;
# `<slice>:cri-containerd:<id>` where containerd was given a systemd path without its systemd driver.
_CONTAINER = re.compile(r"(?:^|:|^(?:cri-containerd|crio|docker|libpod)-)([0-9a-f]{64})(?:\.scope)?$")
# A pod's: `kubepods-burstable-pod<uid with underscores>.slice` or `pod<uid>`. A static pod's UID is 32 hex digits.
_POD = re.compile(r"(?:^|-)pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice(?::.*)?)?$")
# The last two parts of a path below which root alone makes cgroups, and so a kubelet its pods: slices, `kubepods`
# and, where runtime and kubelet were given different drivers, the runtime's unit. `..`: from a cgroup namespace.
_ROOTS_OWN = re.compile(
    r"/(?:[^/]+\.slice|kubepods|burstable|besteffort|\.\.)$|/(?:system\.slice|\.\.)/[^/]+\.service$"
)
_UNIT = re.compile(r".+\.(?:service|scope)$")
# Helpers of the runtime that live beside a container and are none of its processes.
_HELPER = re.compile(r"^(?:crio|libpod)-conmon-[0-9a-f]{64}(?:\.scope)?$")
_SHORT_ID = 12
# What paths tell is kept, of more than the largest node that the benchmarks build has; after so many inventories all of
# it is let go: what those of pods that are gone told would fill it.
_IDENTITIES = 4096
_KEPT_FOR = 32
_times = count(1)


@dataclass(frozen=True, slots=True)
class Owner:
    """The labels of a workload. Empty ones are left out of the output.

    A container of a pod has namespace, pod and container; a pod as a whole the first two; a container outside
    Kubernetes has the first 12 digits of its id as container; a systemd unit has unit. Where the kubelet's
    directories cannot be read, the pod's UID stands for its name and the short id for the container's.
    """

    namespace: str = ""
    pod: str = ""
    container: str = ""
    unit: str = ""

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """The label values in the order of `OWNER_LABELS`."""
        return (self.namespace, self.pod, self.container, self.unit)


@dataclass(frozen=True, slots=True)
class Workload:
    """A cgroup that has an owner of its own. `whole_pod` tells a pod's cgroup from its containers'."""

    owner: Owner
    cgroup: Cgroup
    whole_pod: bool


@dataclass(frozen=True, slots=True)
class LabelledNamespace:
    """A network namespace with its label values in the order of `NETNS_LABELS`, and a process to read it by."""

    id: int
    pid: int
    labels: tuple[str, str, str, str, str]


@dataclass(frozen=True, slots=True)
class _KubeletNames:
    pods: dict[str, tuple[str, str]] = field(default_factory=dict)
    """{pod UID: (namespace, pod name)}"""
    containers: dict[str, str] = field(default_factory=dict)
    """{container id: container name}"""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The workloads of the node at one moment. Paths are below the cgroup v2 mount point."""

    hierarchy: Hierarchy
    workloads: tuple[Workload, ...]
    _by_id: dict[int, Owner]
    _by_container: dict[str, Owner]
    _names: _KubeletNames
    _paths: tuple[tuple[str, Owner], ...]
    """Every cgroup of a workload, those below its own included."""
    _anywhere: bool
    """Whether what is called a pod is one, wherever it is: see `build_inventory`."""

    def processes(self) -> dict[Owner, set[int]]:
        """Read the process ids of each workload that has any, those in cgroups below its own included.

        A cgroup that vanishes or refuses is left out. Raises `Unavailable` or `ParseError` only when none can be read,
        or when there are processes that the exporter's PID namespace does not show.
        """
        found: dict[Owner, set[int]] = {}
        readable, refused = 0, None
        for path, owner in self._paths:
            try:
                pids = read_processes(self.hierarchy.mount + path)
            except Vanished:
                continue
            except (Unavailable, ParseError) as error:
                refused = error
                continue
            readable += 1
            if 0 in pids:
                raise Unavailable(Reason.NO_PERMISSION, "the exporter is not in the PID namespace of the node")
            if pids:
                found.setdefault(owner, set()).update(pids)
        if refused and not readable:
            raise refused
        return found

    def owner_of_cgroup(self, cgroup_id: int) -> Owner:
        """Return whose cgroup this id (inode) is, descendants of a workload included; an empty `Owner` if nobody's."""
        return self._by_id.get(cgroup_id, Owner())

    def owner_of_path(self, path: str) -> Owner:
        """Return whose process has this path in /proc/<pid>/cgroup.

        Seen from a cgroup namespace of its own the beginning of the path is missing, so the container id in it
        is looked up, and the rest is only what the path itself tells.
        """
        identity = _identity(path, anywhere=self._anywhere)
        # What a container makes below its own cgroup may be called after another's; yet a container may hold pods.
        containers = identity.containers if identity.uid else identity.containers[:1]
        known = next((self._by_container[one] for one in containers if one in self._by_container), None)
        return known or _owner_of(identity, self._names) or Owner()


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a path of a cgroup tells by itself: of its innermost named part, and every container id, outermost first."""

    uid: str
    container: str
    unit: str
    containers: tuple[str, ...]


@lru_cache(maxsize=_IDENTITIES)
def _identity(path: str, *, anywhere: bool = True) -> _Identity:
    """Read a path, the same ones at every scrape. A unit counts only outside containers.

    What is in a container of a pod is that container's, whatever it calls the cgroups that it makes there. If not
    `anywhere`, neither a pod nor a container by whose id one could be found is where others than root make cgroups.
    """
    uid = container = unit = before = ""
    containers = []
    believed = True
    for part in path.strip("/").split("/"):
        if uid and container:
            break
        if believed and (match := _POD.search(part)):
            uid = match[1].replace("_", "-")
            container = unit = ""
        if match := _CONTAINER.search(part):
            if believed:
                containers.append(match[1])
            # A container inside a container is the outer one's affair; inside a pod of its own it is not.
            container, unit = container or match[1], ""
        elif not (uid or container or unit) and _UNIT.match(part) and not _HELPER.match(part):
            unit = part
        believed = anywhere or (believed and bool(_ROOTS_OWN.search(f"/{before}/{part}")))
        before = part
    return _Identity(uid, container, unit, tuple(containers))


def _owner_of(identity: _Identity, names: _KubeletNames) -> Owner | None:
    """Return the owner by the kubelet's names, or None if nobody is named."""
    uid, container, unit = identity.uid, identity.container, identity.unit
    if not (uid or container or unit):
        return None
    if not uid:
        return Owner("", "", container[:_SHORT_ID], unit)
    namespace, pod = names.pods.get(uid, ("", uid))
    return Owner(namespace, pod, names.containers.get(container, container[:_SHORT_ID]), unit)


def _kubelet_names(rootfs: str) -> _KubeletNames:
    """List what the kubelet calls its pods and containers.

    /var/log/pods/<namespace>_<pod>_<uid>/ and /var/log/containers/<pod>_<namespace>_<container>-<id>.log; none of
    the names can hold an underscore. Missing directories give no names.
    """
    names = _KubeletNames()
    for entry in _listing(f"{rootfs}/var/log/pods"):
        namespace, _, rest = entry.partition("_")
        pod, _, uid = rest.partition("_")
        if uid:
            names.pods[uid] = (namespace, pod)
    for entry in _listing(f"{rootfs}/var/log/containers"):
        _, _, last = entry.removesuffix(".log").rpartition("_")
        container, _, identity = last.rpartition("-")
        if container:
            names.containers[identity] = container
    return names


def _listing(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise_if_exhausted(error, directory)
        return []


def build_inventory(roots: Roots) -> Inventory:
    """Walk the cgroup tree once and name what is found. Raises `Unavailable` where there is no cgroup v2.

    A kubelet has all its pods in one place. If there are some where only root makes cgroups, then what is called a pod
    elsewhere is none: a container or a user to whom cgroups are delegated calls them what he likes. If all are
    elsewhere, as where a cluster runs in a container, they are pods.

    Two cgroups can have one name for a moment, as when a container has just been restarted: the shallower, then
    the younger one (the higher id) keeps it, so that no two series have the same labels.
    """
    if not next(_times) % _KEPT_FOR:
        _identity.cache_clear()
    hierarchy = find_hierarchy(roots.sys)
    names = _kubelet_names(roots.rootfs)
    by_container: dict[str, Owner] = {}
    chosen: dict[Owner, tuple[tuple[int, int], Workload]] = {}
    owners: dict[str, Owner | None] = {}
    owned: list[tuple[Cgroup, Owner]] = []
    tree = list(walk(hierarchy.mount))
    anywhere = not any(_identity(cgroup.path, anywhere=False).uid for cgroup in tree)
    for cgroup in tree:
        parent, _, last = cgroup.path.rpartition("/")
        inherited = owners.get(parent)
        own = _owner_of(_identity(cgroup.path, anywhere=anywhere), names)
        owners[cgroup.path] = own
        if own is None:
            continue
        owned.append((cgroup, own))
        if own == inherited:
            continue
        if own.pod and (match := _CONTAINER.search(last)):
            by_container[match[1]] = own
        if own.pod and _is_sandbox(last, names):
            continue
        rank = (-cgroup.path.count("/"), cgroup.id)
        if own not in chosen or rank > chosen[own][0]:
            whole_pod = bool(own.pod) and not own.container
            chosen[own] = (rank, Workload(own, cgroup, whole_pod))
    workloads = tuple(workload for _, workload in chosen.values())
    # What only has a workload's name, such as a user may give to a cgroup below user@.service, has none of its own.
    owned = [(one, own) for one, own in owned if own not in chosen or _is_within(one, chosen[own][1].cgroup)]
    by_id = {one.id: own for one, own in owned}
    of_workloads = tuple((one.path, own) for one, own in owned if own in chosen)
    return Inventory(hierarchy, workloads, by_id, by_container, names, of_workloads, anywhere)


def _is_within(one: Cgroup, other: Cgroup) -> bool:
    return one.path == other.path or one.path.startswith(f"{other.path}/")


def _is_sandbox(part: str, names: _KubeletNames) -> bool:
    """Tell whether this is the container that only holds a pod's namespaces: the kubelet writes no log for it."""
    match = _CONTAINER.search(part)
    return bool(match and names.containers and match[1] not in names.containers)


class Node:
    """The node during one scrape: where to read, and what several collectors need, found once and shared.

    Safe to use from several threads; the first to ask does the work, and an exception is given to all who ask.
    """

    def __init__(self, roots: Roots) -> None:
        """Remember where to read; nothing is read yet."""
        self.roots = roots
        self._inventory: _Once[Inventory] = _Once()
        self._names: _Once[_KubeletNames] = _Once()
        self._processes: _Once[dict[Owner, set[int]]] = _Once()
        self._namespaces: _Once[list[LabelledNamespace]] = _Once()
        self._netstats: dict[int, _Once[dict[str, int]]] = {}

    def inventory(self) -> Inventory:
        """Return the workloads of this node. Raises `Unavailable` where there is no cgroup v2."""
        return self._inventory.get(lambda: build_inventory(self.roots))

    def processes(self) -> dict[Owner, set[int]]:
        """Return the process ids of each workload, as proc knows them. Raises `Unavailable` or `ParseError`."""
        return self._processes.get(self._read_processes)

    def owner_of_process(self, pid: int) -> Owner:
        """Return whose a process is, where there is only cgroup v1 too; an empty `Owner` if nobody's.

        Beside v1, runc before 1.1 makes a container's cgroup in v1 alone and leaves its processes where they were
        started in v2: at the root or in the runtime's unit. So a container or pod of any hierarchy is the owner
        before a unit is. Raises `Unavailable`, `Vanished` or `ParseError`.
        """
        owners = [self._owner_of_path(path) for path in read_process_cgroups(self.roots.proc, pid)]
        return max(owners, key=lambda owner: (bool(owner.container or owner.pod), bool(owner.unit)))

    def owner_of_socket(self, cgroup_id: int | None, netns: tuple[str, ...]) -> Owner:
        """Return whose a socket is, by the cgroup that made it and the labels of the network namespace it is in.

        A container or pod, of either, is the owner before a unit is: beside cgroup v1 an older runtime leaves its
        containers in its own unit of v2.
        """
        inside = Owner(*netns[1:])
        try:
            maker = self.inventory().owner_of_cgroup(cgroup_id or 0)
        except Unavailable:
            return inside
        if maker.container or maker.pod or not any(inside.labels):
            return maker
        return inside

    def _owner_of_path(self, path: str) -> Owner:
        try:
            return self.inventory().owner_of_path(path)
        except Unavailable:
            names = self._names.get(lambda: _kubelet_names(self.roots.rootfs))
            return _owner_of(_identity(path), names) or Owner()

    def network_namespaces(self) -> list[LabelledNamespace]:
        """Return the network namespaces that have processes, labelled. Raises `Unavailable`."""
        return self._namespaces.get(self._label_namespaces)

    def netstat(self, namespace: LabelledNamespace) -> dict[str, int]:
        """Return the counters of this namespace's net/netstat, which the kernel sums over all CPUs at every read.

        Raises `Unavailable`, `Vanished` or `ParseError`.
        """
        reading: _Once[dict[str, int]] = self._netstats.setdefault(namespace.id, _Once())
        return reading.get(lambda: read_netstat(self.roots.proc, namespace.pid))

    def own_network_namespace(self) -> LabelledNamespace | None:
        """Return the namespace that the exporter's own sockets see; None if none of its processes is in this proc.

        None too where proc hides the processes that would tell which one it is. Raises `Unavailable` otherwise.
        """
        # A host's proc mounted into a container has no `self` for it; the identity is the same in every proc.
        own = namespace_id(self.roots.proc, "self") or namespace_id(Roots().proc, "self")
        try:
            return next((space for space in self.network_namespaces() if space.id == own), None)
        except Unavailable as error:
            if error.reason is Reason.NO_PERMISSION:
                return None
            raise

    def own_netns(self) -> str:
        """Return the label `netns` of the namespace that the exporter's own sockets see; "self" if it has no other."""
        own = self.own_network_namespace()
        return own.labels[0] if own else "self"

    def _read_processes(self) -> dict[Owner, set[int]]:
        check_pid_namespace(self.roots.proc)
        check_processes_visible(self.roots.proc)
        inventory = self.inventory()
        processes = inventory.processes()
        if inventory.hierarchy.memory:
            return processes
        # Beside v1, a runtime's unit may hold in v2 what are its containers' processes in v1; they are not the unit's.
        own = {owner: {pid for pid in pids if self._belongs(pid, owner)} for owner, pids in processes.items()}
        return {owner: pids for owner, pids in own.items() if pids}

    def _belongs(self, pid: int, owner: Owner) -> bool:
        try:
            return self.owner_of_process(pid) == owner
        except (Unavailable, Vanished, ParseError):
            # Nothing says otherwise.
            return True

    def _label_namespaces(self) -> list[LabelledNamespace]:
        names = named_namespaces(self.roots.rootfs)
        found = find_network_namespaces(self.roots.proc)
        return [LabelledNamespace(space.id, space.pid, self._netns_labels(space.pid, names)) for space in found]

    def _netns_labels(self, pid: int, names: dict[int, str]) -> tuple[str, str, str, str, str]:
        if pid == 1:
            return ("host", "", "", "", "")
        try:
            owner = self.owner_of_process(pid)
        except (Unavailable, Vanished, ParseError) as error:
            if isinstance(error, Unavailable) and error.reason is Reason.NOT_READABLE:
                # For want of a descriptor, say: a pod's counters would be another's for one scrape.
                raise
            owner = Owner()
        if owner.pod:
            # The containers of a pod share its network, so it belongs to none of them.
            return ("pod", owner.namespace, owner.pod, "", "")
        if owner.container:
            return ("container", "", "", owner.container, "")
        name = names.get(namespace_inode(self.roots.proc, pid) or 0)
        if name:
            return (name, "", "", "", "")
        return ("unit" if owner.unit else "other", *owner.labels)


class _Once(Generic[_T]):
    """Runs a function for the first caller and gives every later one the same result or exception.

    It does not keep the function: what a `Node` keeps may not lead back to it, or the memory of each scrape
    would wait for the garbage collector, which comes round after dozens of scrapes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcome: tuple[_T | None, Exception | None] | None = None

    def get(self, function: Callable[[], _T]) -> _T:
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = (function(), None)
                except Exception as error:  # noqa: BLE001  (kept for every caller, and raised below)
                    error.__context__ = None
                    self._outcome = (None, error.with_traceback(None))
        result, failure = self._outcome
        if failure is not None:
            raise _another(failure)
        return cast(_T, result)


def _another(error: Exception) -> Exception:
    """Return an exception like this one: what is raised collects tracebacks, and what is kept may not have any."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy
