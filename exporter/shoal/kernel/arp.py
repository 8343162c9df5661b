"""ARP requests, asked on the link itself: RFC 826 over AF_PACKET. Needs CAP_NET_RAW.

The kernel hears the answers too, and treats them as those to a request of its own (net/ipv4/arp.c): the first one that
comes after an entry has rested for a second (locktime) becomes the entry, unless it is permanent.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from shoal.kernel.files import Reason, Unavailable, unavailable_from

__all__ = ["BROADCAST", "check_permission", "open_arp", "parse_answer", "read_answers", "request"]

BROADCAST: Final = b"\xff" * 6

# Constants are those of include/uapi/linux/{if_ether,if_arp}.h.
_ETH_P_ARP: Final = 0x0806
_ETH_P_IP: Final = 0x0800
_ARPHRD_ETHER: Final = 1
_ARPOP_REQUEST: Final = 1
_ARPOP_REPLY: Final = 2
# ar_hrd, ar_pro, ar_hln, ar_pln, ar_op, then sender's MAC and IP, target's MAC and IP; big-endian
_PACKET: Final = struct.Struct(">HHBBH6s4s6s4s")
_MAC_BYTES: Final = 6
_IP_BYTES: Final = 4
_PACKET_BYTES: Final = 64


def open_arp(device: str) -> socket.socket:
    """Return a socket that hears the ARP packets of one device from now on.

    Raises `Unavailable`: NO_PERMISSION without CAP_NET_RAW, NOT_IN_KERNEL when the device is no Ethernet.
    """
    opened = _open()
    try:
        opened.settimeout(0)
        opened.bind((device, _ETH_P_ARP))
        hardware = opened.getsockname()[3]
    except OSError as error:
        opened.close()
        raise Unavailable(Reason.NOT_READABLE, f"no ARP on {device}: {error.strerror}") from None
    if hardware != _ARPHRD_ETHER:
        opened.close()
        raise Unavailable(Reason.NOT_IN_KERNEL, f"no ARP on {device}, which is no Ethernet")
    return opened


def check_permission() -> None:
    """Raise what `open_arp` would raise for want of CAP_NET_RAW, before any device is known."""
    _open().close()


def request(link: socket.socket, source: bytes, target: bytes, to: bytes = BROADCAST) -> None:
    """Ask who has `target`, telling that `source` (an address of this host) does; both are 4 bytes.

    `to` is the MAC address to ask, everybody by default. Raises `Unavailable` when it cannot be sent.
    """
    device, _, _, _, mac = link.getsockname()
    packet = _PACKET.pack(
        _ARPHRD_ETHER, _ETH_P_IP, _MAC_BYTES, len(target), _ARPOP_REQUEST, mac, source, bytes(_MAC_BYTES), target
    )
    try:
        link.sendto(packet, (device, _ETH_P_ARP, 0, 0, to))
    except OSError as error:
        raise Unavailable(Reason.NOT_READABLE, f"no ARP request on {device}: {error.strerror}") from None


def _open() -> socket.socket:
    try:
        return socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    except OSError as error:
        raise unavailable_from(error, "a packet socket") from None


def parse_answer(packet: bytes) -> tuple[bytes, bytes] | None:
    """Return (IP, MAC) of the sender of an ARP reply, None for anything else. Padding after it is passed over."""
    if len(packet) < _PACKET.size:
        return None
    *kind, mac, address, _, _ = _PACKET.unpack_from(packet)
    # With addresses of other lengths, what stands in these places is something else.
    if kind != [_ARPHRD_ETHER, _ETH_P_IP, _MAC_BYTES, _IP_BYTES, _ARPOP_REPLY]:
        return None
    return address, mac


def read_answers(link: socket.socket, target: bytes, most: int) -> set[bytes]:
    """Return the MAC addresses that have answered for `target`, from the first `most` packets heard. Never waits."""
    macs: set[bytes] = set()
    for _ in range(most):
        try:
            packet = link.recv(_PACKET_BYTES)
        except OSError:
            # Nothing more is there; or the device went down, and nothing more will come.
            break
        answer = parse_answer(packet)
        if answer and answer[0] == target:
            macs.add(answer[1])
    return macs
