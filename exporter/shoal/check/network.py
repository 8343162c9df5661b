"""Failures of the network: queues, filters, tables, ports (2, 3, 9, 11, 12, 13, 14)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.check.alerts import ALERTS, threshold
from shoal.check.finding import OWNER, Finding, percent, ratio, short, summed, within, without
from shoal.check.snapshot import Labels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.check.snapshot import Pair

__all__ = [
    "client_ports",
    "conntrack",
    "crowded_namespaces",
    "listen_queue",
    "neighbours",
    "reverse_path",
    "stale_backends",
    "time_wait_ports",
]


def listen_queue(pair: Pair) -> Iterator[Finding]:
    """Connections that arrive and are refused: by which listener."""
    alert = "ShoalListenQueueOverflow"
    dropping = pair.increase("shoal_listener_drops_total")
    length, limit = pair.last("shoal_listener_accept_queue_length"), pair.last("shoal_listener_accept_queue_limit")
    fill = ratio(pair.lower("shoal_listener_accept_queue_length"), limit)
    for labels, rise in pair.increase5m("shoal_listen_queue_overflows_total").items():
        if rise <= threshold(alert, "netns:shoal_listen_queue_overflows:increase5m"):
            continue
        refused = pair.increase("shoal_listen_queue_overflows_total")[labels]
        # A listener carries its owner where it is known, so the namespace alone is what both have.
        by = {
            listener: drops
            for listener, drops in dropping.items()
            if drops and listener["netns"] == labels["netns"] and labels["pod"] in ("", listener["pod"])
        }
        worst = max(by, key=by.__getitem__, default=None)
        evidence = f"{refused:.0f} connections refused {within(pair)} (ListenOverflows)"
        if worst is None:
            yield Finding(alert, labels, evidence)
        else:
            evidence += f", {by[worst]:.0f} of them by port {worst['port']}"
            # One that has ended since has dropped some, and has no queue any more.
            if worst in length and worst in limit:
                evidence += f", {length[worst]:.0f} in a queue for {limit[worst]:.0f}"
            yield Finding(alert, worst, evidence)
    for labels, full in fill.items():
        if (
            full
            > threshold("ShoalListenQueueNearlyFull", "listener:shoal_listener_accept_queue_length_per_limit:ratio")
            and limit[labels] >= _LEAST_PLACES
            and labels["address"] != "other"
        ):
            yield Finding(
                "ShoalListenQueueNearlyFull",
                labels,
                f"{length[labels]:.0f} wait in a queue for {limit[labels]:.0f}, at both looks",
            )


_LEAST_PLACES = 16


def reverse_path(pair: Pair) -> Iterator[Finding]:
    """Packets dropped by the reverse-path filter, and what makes it likely that they were wanted."""
    dropped = pair.increase("shoal_reverse_path_drops_total")
    strict = pair.last("shoal_reverse_path_devices", mode="strict")
    devices = sum(pair.last("shoal_reverse_path_devices").values())
    for labels, rise in pair.increase5m("shoal_reverse_path_drops_total").items():
        host = labels["netns"] == "host"
        evidence = f"{dropped[labels]:.0f} packets dropped {within(pair)} (IPReversePathFilter)"
        silent = {one: count for one, count in pair.last("shoal_reverse_path_unanswered_peers").items() if count}
        if (
            host
            and silent
            and rise > threshold("ShoalReversePathPeersCutOff", "netns:shoal_reverse_path_drops:increase5m")
        ):
            for device, peers in silent.items():
                yield Finding(
                    "ShoalReversePathPeersCutOff",
                    Labels(labels.as_dict() | device.as_dict()),
                    f"{evidence}; {peers:.0f} peers of this strict device do not answer",
                )
        elif rise > threshold("ShoalReversePathDrops", "netns:shoal_reverse_path_drops:increase5m") and (
            not host
            or (
                devices > threshold("ShoalReversePathDrops", "node:shoal_reverse_path_devices:sum")
                and any(strict.values())
            )
        ):
            more = f"; {sum(strict.values()):.0f} of {devices:.0f} devices are strict" if host else ""
            yield Finding("ShoalReversePathDrops", labels, evidence + more)


def conntrack(pair: Pair) -> Iterator[Finding]:
    """A connection tracking table that is full or nearly so, and who fills it."""
    limit = sum(pair.last("shoal_conntrack_limit").values())
    entries = pair.last("shoal_conntrack_entries")
    full: dict[str, float] = {}
    for labels, count in entries.items():
        full[labels["netns"]] = max(count / limit if limit else 0, full.get(labels["netns"], 0))
    named = {netns for netns in full if netns in ("host", "pod", "container", "unit")}
    by = _filler(pair)
    for labels, rise in pair.increase5m("shoal_conntrack_drop_total").items():
        fullest = full.get(labels["netns"], 0) if labels["netns"] in named else max(full.values(), default=0)
        alert = "ShoalConntrackDrops"
        if rise > threshold(alert, "netns:shoal_conntrack_drop:increase5m") and fullest > threshold(
            alert, "kind:shoal_conntrack_entries_per_limit:max"
        ):
            dropped = pair.increase("shoal_conntrack_drop_total")[labels]
            yield Finding(
                alert, labels, f"{dropped:.0f} packets dropped {within(pair)}, table {percent(fullest)} full{by}"
            )
    for labels, count in entries.items():
        alert = "ShoalConntrackNearlyFull"
        if limit and count / limit > threshold(alert, "netns:shoal_conntrack_entries_per_limit:ratio"):
            yield Finding(alert, labels, f"{count:.0f} entries of {limit:.0f} ({percent(count / limit)}){by}")
    for labels, rise in pair.increase5m("shoal_conntrack_insert_failed_total").items():
        alert = "ShoalConntrackInsertFailed"
        if rise > threshold(alert, "netns:shoal_conntrack_insert_failed:increase5m") and full.get(
            labels["netns"], 0
        ) <= threshold(alert, "kind:shoal_conntrack_entries_per_limit:max"):
            failed = pair.increase("shoal_conntrack_insert_failed_total")[labels]
            yield Finding(alert, labels, f"{failed:.0f} new connections lost a race for one entry {within(pair)}")


def _filler(pair: Pair) -> str:
    """Return who has most of the host's table, from the last dump."""
    owners = {
        one: count for one, count in pair.last("shoal_conntrack_owner_entries").items() if one["netns"] != "other"
    }
    destinations = {
        one: count
        for one, count in pair.last("shoal_conntrack_destination_entries").items()
        if one["destination"] != "other"
    }
    said = ""
    if owners:
        most = max(owners, key=owners.__getitem__)
        name = short(most.only(*OWNER)) if any(most[label] for label in OWNER) else most["netns"]
        said += f"; most, {owners[most]:.0f}, {most['direction']} {name}"
    if destinations:
        most = max(destinations, key=destinations.__getitem__)
        said += f"; {destinations[most]:.0f} to {most['destination']} port {most['destination_port']}"
    return said


def neighbours(pair: Pair) -> Iterator[Finding]:
    """Neighbours that answer from another MAC, or not at all, and tables without room."""
    infos = {labels.only("device", "address"): labels["mac"] for labels in pair.last("shoal_neighbour_info")}
    wrong = pair.increase("shoal_neighbour_verify_mismatches_total")
    answers = pair.last("shoal_neighbour_verify_answering_macs")
    alert = "ShoalNeighbourWrongMac"
    for labels, mismatches in pair.last("shoal_neighbour_verify_mismatches_total").items():
        several = answers.get(labels, 0) > threshold(alert, "neighbour:shoal_neighbour_verify_answering_macs:max")
        # Asked once a minute, so most pairs of scrapes see no new answer; one that was wrong twice still stands.
        if wrong.get(labels, 0) or (several and mismatches > 1):
            yield Finding(
                alert, labels, f"packets go to {infos.get(labels, 'a MAC')} while another MAC answers for the address"
            )
    failing = pair.increase("shoal_neighbours_resolution_failures_total")
    for labels, value in pair.lower("shoal_neighbour_state").items():
        protocol = "ipv6" if ":" in labels["address"] else "ipv4"
        if value and labels["state"] in ("failed", "incomplete") and failing.get(Labels({"protocol": protocol})):
            yield Finding(
                "ShoalNeighbourUnreachable",
                labels.without("state"),
                f"nobody answers for the address ({labels['state']})",
            )
    overflows = pair.increase("shoal_neighbours_table_overflows_total")
    for labels, rise in pair.increase5m("shoal_neighbours_table_overflows_total").items():
        if rise > threshold("ShoalNeighbourTableOverflow", "table:shoal_neighbours_table_overflows:increase5m"):
            yield Finding(
                "ShoalNeighbourTableOverflow", labels, f"{overflows[labels]:.0f} neighbours had no room {within(pair)}"
            )
    most = without(pair.last("shoal_neighbours_table_threshold", level="3"), "level")
    entries = pair.last("shoal_neighbours_table_entries")
    forced = pair.increase("shoal_neighbours_forced_collections_total")
    for labels, full in ratio(entries, most).items():
        alert = "ShoalNeighbourTableNearlyFull"
        if full > threshold(alert, "table:shoal_neighbours_table_entries_per_threshold:ratio") and forced.get(labels):
            yield Finding(
                alert, labels, f"{entries[labels]:.0f} of {most[labels]:.0f} entries, and entries are thrown out"
            )


def stale_backends(pair: Pair) -> Iterator[Finding]:
    """Connections that are still sent to a backend that no rule names any more."""
    if any(age > _OLD_DUMP for age in pair.last("shoal_conntrack_dump_age_seconds").values()):
        return
    gone = {
        labels: count
        for labels, count in pair.last("shoal_conntrack_stale_entries", reason="backend_gone").items()
        if count and labels["destination"] != "other"
    }
    services = summed(gone, "protocol", "destination", "destination_port")
    for labels, count in gone.items():
        service = labels.only("protocol", "destination", "destination_port")
        alert = "ShoalConntrackBackendBlackhole" if services[service] > _MANY else "ShoalConntrackStaleBackend"
        yield Finding(
            alert,
            labels.without("reason"),
            f"{count:.0f} connections still go to {labels['backend']}, which no rule names any more",
        )


_OLD_DUMP = 600
_MANY = 10


def _ports(pair: Pair, *, time_wait: bool) -> Iterator[Finding]:
    """Local ports used up towards one destination, mostly by TIME_WAIT or mostly by connections in use."""
    used, there = pair.last("shoal_ephemeral_ports_used"), pair.last("shoal_ephemeral_ports_available")
    waiting = pair.last("shoal_ephemeral_ports_time_wait")
    name = "TimeWaitPorts" if time_wait else "EphemeralPorts"
    mostly = threshold("ShoalTimeWaitPortsExhausted", "tuple:shoal_ephemeral_ports_time_wait_per_used:ratio")
    for labels, full in ratio(used, there).items():
        closed = waiting.get(labels, 0)
        if (closed > mostly * used[labels]) is not time_wait:
            continue
        for end in ("Exhausted", "NearlyExhausted"):
            if full > threshold(f"ShoalEphemeralPorts{end}", "tuple:shoal_ephemeral_ports_used_per_available:ratio"):
                yield Finding(
                    f"Shoal{name}{end}",
                    labels,
                    f"{used[labels]:.0f} of {there[labels]:.0f} ports from {labels['source']} are taken,"
                    f" {closed:.0f} of them in TIME_WAIT",
                )
                break


# The exporter enters none that has fewer: no range that is any use is in danger.
_WORTH_A_LOOK = 100
_MANY_ARE = ("pod", "container", "unit", "other")


def crowded_namespaces(pair: Pair) -> str:
    """Say which network namespaces, of those that were not entered, have enough sockets to use up ports; "" if none."""
    sockets = dict(pair.last("shoal_tcp_sockets_in_use"))
    if not sockets:
        return "nor are the sockets of network namespaces counted"
    for labels, count in pair.last("shoal_tcp_time_wait_sockets").items():
        sockets[labels] = sockets.get(labels, 0) + count
    # The exporter's own listeners are in the one that it did look into.
    own = {labels["netns"] for labels in pair.last("shoal_listener_accept_queue_limit")} or {"host"}
    crowded = {
        labels: count
        for labels, count in sockets.items()
        # Several may be called so, and one that was looked into says nothing of the others.
        if count >= _WORTH_A_LOOK and (labels["netns"] not in own or labels["netns"] in _MANY_ARE)
    }
    if not crowded:
        return ""
    most = max(crowded, key=crowded.__getitem__)
    if any(most[label] for label in OWNER):
        name = short(most)
    else:
        name = "all without a name" if most["netns"] == "other" else f"network namespace {most['netns']}"
    more = f", and {len(crowded) - 1} more have {_WORTH_A_LOOK} or more" if len(crowded) > 1 else ""
    return f"{name}: {crowded[most]:.0f} TCP sockets{more}"


def client_ports(pair: Pair) -> Iterator[Finding]:
    """Ports held by connections in use, of a client or of masquerading."""
    yield from _ports(pair, time_wait=False)
    there = sum(pair.last("shoal_conntrack_nat_ports_available").values())
    failing = sum(pair.increase5m("shoal_conntrack_insert_failed_total").values())
    for labels, used in pair.last("shoal_conntrack_nat_ports_used").items():
        for alert in ("ShoalMasqueradePortsExhausted", "ShoalMasqueradePortsNearlyExhausted"):
            wanted = ALERTS[alert].thresholds.get("netns:shoal_conntrack_insert_failed:increase5m")
            full = used / there if there else 0
            if full > threshold(alert, "tuple:shoal_conntrack_nat_ports_used_per_available:ratio") and (
                wanted is None or failing > wanted
            ):
                evidence = f"{used:.0f} of {there:.0f} ports for masquerading from {labels['source']} are taken"
                yield Finding(alert, labels, evidence)
                break


def time_wait_ports(pair: Pair) -> Iterator[Finding]:
    """Ports held by connections that are closed."""
    yield from _ports(pair, time_wait=True)
