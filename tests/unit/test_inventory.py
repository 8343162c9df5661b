"""From cgroup paths to pods, containers and units: as each runtime lays them out, and as recorded trees have them."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shoal.inventory import Node, Owner, _identity, build_inventory
from shoal.kernel.cgroups import find_hierarchy, open_cgroup
from shoal.kernel.files import Reason, Roots, Unavailable, Vanished, read

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parent / "fixtures"
UID = "0f8d3c1e-5b7a-4c2d-9e6f-1a2b3c4d5e6f"
STATIC_UID = "5f0c8a3be1d2476f9b8e7d6c5a4b3c2d"
ID = "ef0badbf557b9fb38522b095277dc1a94e8cb3b48cf4aac4dcdbc0e8a811b63d"
OTHER_ID = "5ec70550eacb4c603596f0ef94cfdb941f8522f0cb1dea7b5e9daf9a3c960211"
SLICE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice"


def recorded(kernel: str = "6.1") -> Roots:
    """Return the roots of a recorded node."""
    root = FIXTURES / kernel
    return Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs")


def laid_out(root: Path, *paths: str, names: bool = False) -> Roots:
    """Make a tree of empty cgroups, with the kubelet's names for the pod above if asked for."""
    mount = root / "sys" / "fs" / "cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_bytes(b"cpu memory\n")
    for path in paths:
        (mount / path).mkdir(parents=True)
    if names:
        (root / "var/log/pods" / f"shop_checkout_{UID}" / "api").mkdir(parents=True)
        (root / "var/log/containers").mkdir()
        (root / "var/log/containers" / f"checkout_shop_api-v2-{ID}.log").symlink_to("/nowhere")
    return Roots(f"{root}/proc", f"{root}/sys", str(root))


def owners(roots: Roots) -> set[Owner]:
    """Return the owners of all workloads."""
    return {workload.owner for workload in build_inventory(roots).workloads}


POD = Owner(pod=UID)
CONTAINER = Owner(pod=UID, container=ID[:12])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"{SLICE}/cri-containerd-{ID}.scope", {POD, CONTAINER}),
        (f"{SLICE}/crio-{ID}.scope", {POD, CONTAINER}),
        (f"{SLICE}/crio-{ID}.scope/container", {POD, CONTAINER}),
        (f"{SLICE}/docker-{ID}.scope", {POD, CONTAINER}),
        (f"kubepods/besteffort/pod{UID}/{ID}", {POD, CONTAINER}),
        (f"kubepods/pod{UID}/crio-{ID}", {POD, CONTAINER}),
        (f"kubepods-pod{UID.replace('-', '_')}.slice:cri-containerd:{ID}", {CONTAINER}),
        (f"kubepods/burstable/pod{STATIC_UID}/{ID}", {Owner(pod=STATIC_UID), Owner("", STATIC_UID, ID[:12])}),
        (f"system.slice/docker-{ID}.scope", {Owner(container=ID[:12])}),
        (f"docker/{ID}", {Owner(container=ID[:12])}),
        (f"machine.slice/libpod-{ID}.scope/container", {Owner(container=ID[:12])}),
        (f"machine.slice/libpod-conmon-{OTHER_ID}.scope", set()),
        (f"{SLICE}/crio-conmon-{OTHER_ID}.scope", {POD}),
        (
            f"user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope",
            {Owner(unit="user@1000.service"), Owner(container=ID[:12])},
        ),
        ("system.slice/redis-server.service", {Owner(unit="redis-server.service")}),
        ("system.slice/docker.service/nested", {Owner(unit="docker.service")}),
        ("user.slice/user-1000.slice/user@1000.service/app.slice/a.service", {Owner(unit="user@1000.service")}),
        (f"system.slice/docker-{ID}.scope/system.slice/ssh.service", {Owner(container=ID[:12])}),
        (f"docker/{ID}/docker/{OTHER_ID}", {Owner(container=ID[:12])}),
        (
            f"docker/{ID}/kubelet/kubepods/pod{UID}/{OTHER_ID}",
            {Owner(container=ID[:12]), POD, Owner(pod=UID, container=OTHER_ID[:12])},
        ),
        ("some.slice/made-by-hand", set()),
        (f"kubepods/pod{UID[:-1]}/{ID[:-1]}", set()),
    ],
)
def test_each_runtime_and_driver(tmp_path: Path, path: str, expected: set[Owner]) -> None:
    """The owner is read from the path; what is inside a container, a pod or a unit is theirs and not another's."""
    assert owners(laid_out(tmp_path, path)) == expected


def test_names_come_from_the_kubelets_directories(tmp_path: Path) -> None:
    """Pod and container have their names, and a sandbox, for which there is no log, is no workload."""
    roots = laid_out(
        tmp_path, f"{SLICE}/cri-containerd-{ID}.scope", f"{SLICE}/cri-containerd-{OTHER_ID}.scope", names=True
    )
    assert owners(roots) == {Owner("shop", "checkout"), Owner("shop", "checkout", "api-v2")}


def test_a_restarted_container_is_one_series(tmp_path: Path) -> None:
    """While the old cgroup of a container lingers beside the new one, only the younger carries the name."""
    roots = laid_out(
        tmp_path, f"{SLICE}/cri-containerd-{ID}.scope", f"{SLICE}/cri-containerd-{OTHER_ID}.scope", names=True
    )
    (tmp_path / "var/log/containers" / f"checkout_shop_api-v2-{OTHER_ID}.log").symlink_to("/nowhere")
    workloads = [workload for workload in build_inventory(roots).workloads if workload.owner.container]
    mount = Path(roots.sys, "fs/cgroup")
    inodes = [(mount / SLICE / f"cri-containerd-{identity}.scope").stat().st_ino for identity in (ID, OTHER_ID)]
    assert [workload.cgroup.id for workload in workloads] == [max(inodes)]


def test_a_user_cannot_take_a_pods_series(tmp_path: Path) -> None:
    """A cgroup made deeper down with a pod's name, as a user may below user@.service, does not replace the pod's."""
    inside = f"user.slice/user-1000.slice/user@1000.service/{SLICE}/cri-containerd-{ID}.scope"
    roots = laid_out(tmp_path, f"{SLICE}/cri-containerd-{ID}.scope", inside, names=True)
    mount = Path(roots.sys, "fs/cgroup")
    (mount / f"{SLICE}/cri-containerd-{ID}.scope/cgroup.procs").write_text("1\n")
    (mount / inside / "cgroup.procs").write_text("2\n")
    inventory = build_inventory(roots)
    found = {workload.owner: workload.cgroup.path for workload in inventory.workloads}
    assert found[Owner("shop", "checkout", "api-v2")] == f"/{SLICE}/cri-containerd-{ID}.scope"
    assert inventory.processes()[Owner("shop", "checkout", "api-v2")] == {1}
    assert inventory.owner_of_cgroup((mount / inside).stat().st_ino) == Owner(container=ID[:12])


VICTIM = Owner("shop", "checkout", "api-v2")
HOSTILE_ID = "bad0" * 16
HOSTILE = f"kubepods.slice/kubepods-podbad0bad0_bad0_bad0_bad0_bad0bad0bad0.slice/cri-containerd-{HOSTILE_ID}.scope"


@pytest.mark.parametrize(
    "inside",
    [
        f"{SLICE}/cri-containerd-{ID}.scope",
        f"cri-containerd-{ID}.scope",
        f"pod{UID}/{ID}",
        f"kubepods-pod{UID.replace('-', '_')}.slice:cri-containerd:{ID}",
        f"docker-{OTHER_ID}.scope/kubepods/pod{UID}/{ID}",
        "system.slice/sshd.service",
    ],
)
@pytest.mark.parametrize("cluster", ["", f"docker/{'c1a5' * 16}/kubelet/"], ids=["node", "in a container"])
def test_a_container_cannot_pass_for_another_pod(tmp_path: Path, inside: str, cluster: str) -> None:
    """Whatever it calls the cgroups below its own, sockets, processes and memory in them stay its own."""
    victim, hostile = f"{cluster}{SLICE}/cri-containerd-{ID}.scope", f"{cluster}{HOSTILE}"
    roots = laid_out(tmp_path, victim, f"{hostile}/{inside}", names=True)
    (tmp_path / "var/log/containers" / f"evil_bad_app-{HOSTILE_ID}.log").symlink_to("/nowhere")
    mount = Path(roots.sys, "fs/cgroup")
    (mount / victim / "cgroup.procs").write_text("1\n")
    (mount / hostile / inside / "cgroup.procs").write_text("2\n")
    inventory = build_inventory(roots)
    paths = {workload.owner: workload.cgroup.path for workload in inventory.workloads}
    assert paths[VICTIM] == f"/{victim}"
    evil = inventory.owner_of_cgroup((mount / hostile).stat().st_ino)
    assert evil == Owner(pod="bad0bad0-bad0-bad0-bad0-bad0bad0bad0", container="app")
    assert inventory.owner_of_cgroup((mount / hostile / inside).stat().st_ino) == evil
    assert inventory.processes()[VICTIM] == {1}
    for seen in (f"/{hostile}/{inside}", f"/../cri-containerd-{HOSTILE_ID}.scope/{inside}"):
        assert inventory.owner_of_path(seen) == evil


@pytest.mark.parametrize(
    "inside",
    [
        f"{SLICE}/cri-containerd-{ID}.scope",
        f"cri-containerd-{ID}.scope",
        f"pod{UID}/{ID}",
        f"kubepods-pod{UID.replace('-', '_')}.slice:cri-containerd:{ID}",
        f"kubepods.slice/kubepods-pod{UID[::-1].replace('-', '_')}.slice/cri-containerd-{OTHER_ID}.scope",
    ],
)
@pytest.mark.parametrize(
    "outside",
    [
        f"system.slice/docker-{HOSTILE_ID}.scope",
        f"docker/{HOSTILE_ID}",
        "user.slice/user-1000.slice/user@1000.service",
        "lxc.payload.web",
        "machine.slice/machine-web.scope/payload",
    ],
)
def test_who_is_no_pod_cannot_pass_for_one(tmp_path: Path, inside: str, outside: str) -> None:
    """Where a kubelet has its pods where only root makes cgroups, nothing that is made elsewhere is a pod."""
    roots = laid_out(tmp_path, f"{SLICE}/cri-containerd-{ID}.scope", f"{outside}/{inside}", names=True)
    mount = Path(roots.sys, "fs/cgroup")
    (mount / f"{SLICE}/cri-containerd-{ID}.scope/cgroup.procs").write_text("1\n")
    (mount / outside / inside / "cgroup.procs").write_text("2\n")
    inventory = build_inventory(roots)
    paths = {workload.owner: workload.cgroup.path for workload in inventory.workloads if workload.owner.pod}
    assert paths == {Owner("shop", "checkout"): f"/{SLICE}", VICTIM: f"/{SLICE}/cri-containerd-{ID}.scope"}
    assert inventory.processes()[VICTIM] == {1}
    assert not inventory.owner_of_cgroup((mount / outside / inside).stat().st_ino).pod
    for seen in (f"/{outside}/{inside}", f"/../../{outside}/{inside}"):
        assert not inventory.owner_of_path(seen).pod
    # As the exporter sees the real one, from a cgroup namespace of its own beside it.
    assert inventory.owner_of_path(f"/../cri-containerd-{ID}.scope") == VICTIM


def test_a_runtime_with_another_driver_than_its_kubelet(tmp_path: Path) -> None:
    """The pod's cgroup is the kubelet's, and its containers are in the runtime's unit: all of them are the pod's."""
    inside = f"system.slice/containerd.service/kubepods-pod{UID.replace('-', '_')}.slice:cri-containerd:{ID}"
    roots = laid_out(tmp_path, SLICE, inside, names=True)
    inventory = build_inventory(roots)
    found = {workload.owner for workload in inventory.workloads}
    assert found == {Owner("shop", "checkout"), VICTIM, Owner(unit="containerd.service")}
    for seen in (f"/{inside}", f"/../../{inside}", f"/../{inside.removeprefix('system.slice/')}"):
        assert inventory.owner_of_path(seen) == VICTIM


@pytest.mark.parametrize("place", ["/var/log/pods", "/var/log/containers", f"/{SLICE}", "/run/netns", "/proc/7/cgroup"])
def test_without_a_descriptor_nothing_changes_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """For want of one a pod would have its UID for a name, or its network another's, for one scrape: absent instead."""
    roots = laid_out(tmp_path, f"{SLICE}/cri-containerd-{ID}.scope", names=True)
    (tmp_path / "proc/7/net").mkdir(parents=True)
    (tmp_path / "proc/7/net/netstat").touch()
    (tmp_path / "proc/7/cgroup").write_text(f"0::/{SLICE}/cri-containerd-{ID}.scope\n")
    assert [space.labels for space in Node(roots).network_namespaces()] == [("pod", "shop", "checkout", "", "")]

    def spent(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: str, *arguments: Any, **others: Any) -> Any:
            if str(path).endswith(place):
                raise OSError(errno.EMFILE, "Too many open files")
            return function(path, *arguments, **others)

        return call

    for name in ("listdir", "scandir", "open"):
        monkeypatch.setattr(os, name, spent(getattr(os, name)))
    node = Node(roots)
    with pytest.raises(Unavailable) as caught:
        # Of the cgroups' tree the workloads are asked, as a process tells its path itself.
        _ = (node.network_namespaces(), node.inventory())
    assert caught.value.reason is Reason.NOT_READABLE


def test_owner_of_a_socket_and_of_a_process(tmp_path: Path) -> None:
    """A cgroup id finds its workload, from inside it too; a path is understood from any cgroup namespace."""
    roots = laid_out(tmp_path, f"{SLICE}/cri-containerd-{ID}.scope/below", "system.slice/a.service", names=True)
    inventory = build_inventory(roots)
    api = Owner("shop", "checkout", "api-v2")
    below = Path(roots.sys, "fs/cgroup", SLICE, f"cri-containerd-{ID}.scope", "below")
    assert inventory.owner_of_cgroup(below.stat().st_ino) == api
    assert inventory.owner_of_cgroup(1) == Owner()
    for path in (f"/{SLICE}/cri-containerd-{ID}.scope", f"/../cri-containerd-{ID}.scope/below", f"/../{ID}"):
        assert inventory.owner_of_path(path) == api
    assert inventory.owner_of_path(f"/../../kubepods-burstable-pod{UID}.slice") == Owner("shop", "checkout")
    assert inventory.owner_of_path("/system.slice/a.service") == Owner(unit="a.service")
    assert inventory.owner_of_path("/") == Owner()


CONTAINER_V1 = f"8:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n"
POD_V1 = f"2:memory:/kubepods/burstable/pod{UID}/{ID}\n"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (f"{CONTAINER_V1}0::/docker/{ID}\n", Owner(container=ID[:12])),
        (f"{CONTAINER_V1}0::/\n", Owner(container=ID[:12])),
        (f"{CONTAINER_V1}0::/system.slice/containerd.service\n", Owner(container=ID[:12])),
        (f"{POD_V1}0::/system.slice/containerd.service\n", Owner("shop", "checkout", "api-v2")),
        ("4:memory:/made/by/hand\n1:name=systemd:/\n0::/system.slice/a.service\n", Owner(unit="a.service")),
        (CONTAINER_V1, Owner(container=ID[:12])),
        (POD_V1, Owner("shop", "checkout", "api-v2")),
        ("2:memory:/\n1:name=systemd:/system.slice/a.service\n", Owner(unit="a.service")),
        ("2:memory:/\n", Owner()),
    ],
)
@pytest.mark.parametrize("hierarchies", ["unified", "v1 only"])
def test_owner_of_a_process_beside_v1(tmp_path: Path, rows: str, expected: Owner, hierarchies: str) -> None:
    """Whichever hierarchy the runtime has made a container's cgroup in, and whether or not v2 is mounted at all."""
    roots = laid_out(tmp_path, "system.slice/containerd.service", names=POD_V1 in rows)
    if hierarchies == "v1 only":
        Path(roots.sys, "fs/cgroup/cgroup.controllers").unlink()
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text(rows)
    assert Node(roots).owner_of_process(7) == expected


def test_a_runtimes_unit_does_not_get_its_containers_processes(tmp_path: Path) -> None:
    """Beside v1, what is a container's in v1 and the runtime's unit in v2 is not counted for the unit.

    Where /proc does not say, v2 is believed.
    """
    roots = laid_out(tmp_path, "unified/system.slice/containerd.service", "memory")
    mount = Path(roots.sys, "fs/cgroup")
    (mount / "cgroup.controllers").rename(mount / "unified/cgroup.controllers")
    (mount / "unified/cgroup.controllers").write_bytes(b"\n")
    (mount / "unified/system.slice/containerd.service/cgroup.procs").write_bytes(b"7\n8\n9\n")
    proc = Path(roots.proc)
    for pid, rows in ((7, CONTAINER_V1), (8, "1:name=systemd:/system.slice/containerd.service\n")):
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "cgroup").write_text(f"{rows}0::/system.slice/containerd.service\n")
    (proc / "self").symlink_to(str(os.getpid()))
    assert Node(roots).processes() == {Owner(unit="containerd.service"): {8, 9}}


def test_the_owner_of_a_socket_is_its_container_before_a_unit(tmp_path: Path) -> None:
    """A socket made in a unit belongs to the pod whose network it is in; outside of any pod, to the unit."""
    roots = laid_out(tmp_path, f"{SLICE}/cri-containerd-{ID}.scope", "system.slice/a.service", names=True)
    node = Node(roots)
    mount = Path(roots.sys, "fs/cgroup")
    unit = (mount / "system.slice/a.service").stat().st_ino
    container = (mount / SLICE / f"cri-containerd-{ID}.scope").stat().st_ino
    pod, host = ("pod", "shop", "checkout", "", ""), ("host", "", "", "", "")
    assert node.owner_of_socket(unit, host) == Owner(unit="a.service")
    assert node.owner_of_socket(unit, pod) == Owner("shop", "checkout")
    assert node.owner_of_socket(container, pod) == Owner("shop", "checkout", "api-v2")
    assert node.owner_of_socket(container, host) == Owner("shop", "checkout", "api-v2")
    assert node.owner_of_socket(None, pod) == Owner("shop", "checkout")
    assert node.owner_of_socket(None, host) == Owner()


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_recorded_nodes(kernel: str) -> None:
    """The pods, containers and units that the recording's scenario made are all found, and nothing else."""
    found = owners(recorded(kernel))
    assert Owner("shop", "checkout-7d9c5b6f4-x2x9k", "api") in found
    assert Owner("batch", "reports-0", "report") in found
    assert Owner("payments", "ledger-0", "ledger") in found
    assert Owner("media", "thumbnails-5c8d7f9b6d-q4w8z", "thumbnails") in found
    assert Owner("kube-system", "etcd-node-1", "etcd") in found
    assert {owner.unit for owner in found if owner.unit} == {
        "init.scope", "openvpn.service", "postgresql@15-main.service", "redis-server.service", "user@1000.service"
    }  # fmt: skip
    assert {owner.container for owner in found if owner.container and not owner.pod} == {"d312e6cac7c9", "f898df219775"}


def test_network_namespaces_of_a_recorded_node() -> None:
    """Every namespace is found once and named by who is in it, though the sandbox has the lowest process id."""
    spaces = Node(recorded()).network_namespaces()
    assert len({space.id for space in spaces}) == len(spaces)
    assert {space.labels for space in spaces} == {
        ("host", "", "", "", ""),
        ("pod", "shop", "checkout-7d9c5b6f4-x2x9k", "", ""),
        ("pod", "batch", "reports-0", "", ""),
        ("pod", "payments", "ledger-0", "", ""),
        ("pod", "media", "thumbnails-5c8d7f9b6d-q4w8z", "", ""),
        ("container", "", "", "d312e6cac7c9", ""),
        ("container", "", "", "f898df219775", ""),
        ("unit", "", "", "", "openvpn.service"),
    }


def test_the_node_is_read_once_per_scrape(tmp_path: Path) -> None:
    """Collectors share one walk: what is made afterwards is not in it."""
    roots = laid_out(tmp_path, "system.slice/a.service")
    node = Node(roots)
    before = node.inventory()
    Path(roots.sys, "fs/cgroup/system.slice/b.service").mkdir()
    assert node.inventory() is before
    assert len(Node(roots).inventory().workloads) == 2


def test_a_missing_hierarchy_is_said_to_all_who_ask(tmp_path: Path) -> None:
    """Every collector of a scrape is given the same reason."""
    node = Node(Roots(str(tmp_path), str(tmp_path), ""))
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            node.inventory()
        assert caught.value.reason is Reason.NOT_IN_KERNEL


def test_cgroup_v1_and_hybrid(tmp_path: Path) -> None:
    """Only v1 is a reason of its own; beside v1, v2 is found, without its memory controller."""
    (tmp_path / "fs/cgroup/memory").mkdir(parents=True)
    with pytest.raises(Unavailable) as caught:
        find_hierarchy(str(tmp_path))
    assert caught.value.reason is Reason.CGROUP_V1
    (tmp_path / "fs/cgroup/unified").mkdir()
    (tmp_path / "fs/cgroup/unified/cgroup.controllers").write_bytes(b"\n")
    hierarchy = find_hierarchy(str(tmp_path))
    assert hierarchy.mount == f"{tmp_path}/fs/cgroup/unified"
    assert not hierarchy.memory


def test_a_removed_cgroup_is_not_a_missing_feature(tmp_path: Path) -> None:
    """Inside an open cgroup, a missing file is `Vanished` when the cgroup is gone and `Unavailable` when it is not."""
    directory = tmp_path / "a.service"
    directory.mkdir()
    with pytest.raises(Unavailable), open_cgroup(str(directory)) as fd:
        read("memory.peak", dir_fd=fd)
    with pytest.raises(Vanished), open_cgroup(str(directory)) as fd:  # noqa: PT012  (it goes while it is open)
        directory.rmdir()
        read("memory.peak", dir_fd=fd)
    with pytest.raises(Vanished), open_cgroup(str(directory)):
        pass


def test_a_tree_that_is_torn_down_while_it_is_walked(tmp_path: Path) -> None:
    """What vanishes during the walk is left out, and the rest is there."""
    roots = laid_out(tmp_path, *(f"system.slice/u{number}.service" for number in range(200)))
    mount = Path(roots.sys, "fs/cgroup/system.slice")
    child = os.fork()
    if child == 0:
        for number in range(0, 200, 2):
            shutil.rmtree(mount / f"u{number}.service", ignore_errors=True)
        os._exit(0)
    seen = [{owner.unit for owner in owners(roots)} for _ in range(20)]
    os.waitpid(child, 0)
    for units in seen:
        assert {f"u{number}.service" for number in range(1, 200, 2)} <= units


@pytest.mark.parametrize("hierarchy", ["cgroup v2", "none"])
def test_a_node_is_gone_with_its_scrape(hierarchy: str, tmp_path: Path) -> None:
    """What one scrape has read does not wait for the garbage collector; on large nodes that was 2 MiB a scrape."""
    roots = recorded()
    if hierarchy == "none":
        roots = Roots(roots.proc, str(tmp_path), roots.rootfs)
    node = Node(roots)
    gone = weakref.ref(node)
    gc.disable()
    try:
        for space in node.network_namespaces():
            node.netstat(space)
        with contextlib.suppress(Unavailable):
            node.inventory()
        del node
        assert gone() is None
    finally:
        gc.enable()


def test_what_paths_of_pods_that_are_gone_tell_is_let_go() -> None:
    """It took 3 MiB where pods come and go."""
    for number in range(1000):
        _identity(f"/kubepods/pod{number:032x}")
    for _ in range(32):
        build_inventory(recorded())
    assert _identity.cache_info().currsize < 300
