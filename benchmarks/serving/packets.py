"""A network namespace of one's own, with a way out that swallows and counts every packet.

`enter` must be called by a process with one thread. Loopback works; every other address is routed
to one end of a pair, so a packet that somebody sends is seen, and goes nowhere. What loopback
carries is seen, too: a resolver may listen there.
"""

import ctypes
import os
import socket
import struct
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SINK = "sink0"
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_ETH_P_ALL, _IPV4, _IPV6 = 0x0003, 0x0800, 0x86DD
_OUTGOING = 4  # PACKET_OUTGOING
_TCP, _UDP, _ICMPV6 = 6, 17, 58
# Neighbours, routers and multicast groups: the kernel says these of itself when a link comes up.
_HOUSEKEEPING = range(130, 144)


def enter() -> None:
    """Move this process into a namespace whose only way out is the sink.

    Raises:
        OSError: not permitted here.
    """
    as_root = os.geteuid() == 0
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET | (0 if as_root else _CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace")
    if not as_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    for words in (
        "link set lo up",
        f"link add {SINK} type veth peer name {SINK}-end",
        f"link set {SINK} arp off",
        f"link set {SINK}-end up",
        f"address add 192.0.2.1/24 dev {SINK}",
        f"-6 address add 2001:db8::1/64 dev {SINK} nodad",
        f"link set {SINK} up",
        f"route add default dev {SINK}",
        f"-6 route add default dev {SINK}",
    ):
        _ip(words)


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
    if done.returncode != 0 and "-6" not in words:  # a kernel may have no IPv6
        raise OSError(f"`ip {words}`: {done.stderr.strip()}")


@dataclass(slots=True)
class Count:
    """What was seen since the last `taken`."""

    out: Counter[str] = field(default_factory=Counter)  # by whereto
    aside: Counter[str] = field(default_factory=Counter)  # on loopback, to other ports than ours


class Tap:
    """Looks at every packet of this namespace while it is open."""

    def __init__(self, *ports: int) -> None:
        """`ports` of loopback are those that are expected."""
        self._ports = set(ports)
        self._count = Count()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._open = True
        self._thread = threading.Thread(target=self._look, name="tap")
        self._thread.start()

    def expect(self, port: int) -> None:
        """One more port of loopback that is ours."""
        self._ports.add(port)

    def taken(self) -> Count:
        """What was seen, and from now on anew."""
        with self._lock:
            count, self._count = self._count, Count()
        return count

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()
        self._socket.close()

    def _look(self) -> None:
        while self._open:
            try:
                frame, (device, kind, direction, *_) = self._socket.recvfrom(1 << 16)
            except TimeoutError:
                continue
            if direction == _OUTGOING:  # loopback shows each packet twice
                self._note(device, kind, frame[14:])

    def _note(self, device: str, kind: int, packet: bytes) -> None:
        whereto, ports = _addressed(kind, packet)
        with self._lock:
            if device == SINK and whereto is not None:
                self._count.out[whereto] += 1
            elif device == "lo" and ports and not self._ports.intersection(ports):
                self._count.aside[f"{whereto}:{ports[1]}"] += 1


def _addressed(kind: int, packet: bytes) -> tuple[str | None, tuple[int, ...]]:
    """Where a packet goes, and its ports; nothing for what the kernel says of itself."""
    if kind == _IPV4 and len(packet) >= 20:
        protocol, offset = packet[9], (packet[0] & 15) * 4
        whereto = socket.inet_ntop(socket.AF_INET, packet[16:20])
    elif kind == _IPV6 and len(packet) >= 40:
        protocol, offset = packet[6], 40
        whereto = socket.inet_ntop(socket.AF_INET6, packet[24:40])
        if protocol in (0, _ICMPV6) and _is_housekeeping(protocol, packet):
            return None, ()
    else:
        return (None, ()) if kind in (_IPV4, _IPV6) else (f"ethertype {kind:#06x}", ())
    has_ports = protocol in (_TCP, _UDP) and len(packet) >= offset + 4
    return whereto, struct.unpack("!HH", packet[offset : offset + 4]) if has_ports else ()


def _is_housekeeping(protocol: int, packet: bytes) -> bool:
    """Multicast reports stand behind a header of hop-by-hop options."""
    place = 40 if protocol == _ICMPV6 else 40 + 8 * (packet[41] + 1)
    return len(packet) > place and packet[place] in _HOUSEKEEPING


def plant() -> None:
    """A packet that must be seen, and a question to a resolver on loopback that must be, too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"planted", ("192.0.2.99", 53))
        sender.sendto(b"planted", ("127.0.0.53", 53))
