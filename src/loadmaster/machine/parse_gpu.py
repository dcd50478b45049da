"""Captured text to facts about GPUs and memory modules. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# GT/s of a lane, as sysfs prints it, to the PCIe generation.
_GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}

_MEMORY_DEVICE = 17  # SMBIOS structure type


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModule:
    """One populated memory slot of the SMBIOS table."""

    locator: str
    bank: str
    width_bits: int
    speed_mt_s: int


def pcie_generation(speed: str | None) -> int | None:
    """The generation of `16.0 GT/s PCIe`."""
    match = re.match(r"([\d.]+) GT/s", speed or "")
    return _GENERATIONS.get(match[1]) if match else None


def bus_id(text: str) -> str:
    """`00000000:01:00.0` (NVML) and `0000:01:00.0` (sysfs, CUDA) in the shorter spelling."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def amdgpu_ids(text: str) -> dict[tuple[str, str], str]:
    """libdrm's `amdgpu.ids`: marketing names by PCI device and revision, `744C, C8, AMD …`."""
    names: dict[tuple[str, str], str] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if len(fields) == 3 and not line.startswith("#"):
            names[fields[0].lower(), fields[1].lower()] = fields[2]
    return names


def visible_devices(value: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """The cards a `CUDA_VISIBLE_DEVICES` leaves, in its order.

    As CUDA reads it: numbers or beginnings of UUIDs; the first that matches nothing ends the list.
    """
    if value is None:
        return tuple(range(len(uuids)))
    chosen: list[int] = []
    for part in (piece.strip() for piece in value.split(",")):
        index = _visible_index(part, uuids)
        if index is None:
            break
        if index not in chosen:
            chosen.append(index)
    return tuple(chosen)


def _visible_index(part: str, uuids: Sequence[str]) -> int | None:
    if part.isdigit():
        return int(part) if int(part) < len(uuids) else None
    matches = [index for index, uuid in enumerate(uuids) if part and uuid.startswith(part)]
    return matches[0] if len(matches) == 1 else None


def memory_modules(table: bytes) -> tuple[MemoryModule, ...]:
    """The populated memory devices of a raw SMBIOS table (/sys/firmware/dmi/tables/DMI)."""
    modules = (
        _module(body, strings)
        for kind, body, strings in _structures(table)
        if kind == _MEMORY_DEVICE
    )
    return tuple(module for module in modules if module is not None)


def _structures(table: bytes) -> Iterable[tuple[int, bytes, Sequence[str]]]:
    """Type, formatted area and strings of each structure; two zero bytes end the strings."""
    at = 0
    while at + 4 <= len(table):
        kind, length = table[at], table[at + 1]
        end = table.find(b"\0\0", at + length)
        if length < 4 or end < 0:
            return
        strings = table[at + length : end].split(b"\0")
        yield kind, table[at : at + length], [text.decode("latin-1") for text in strings]
        at = end + 2


def _module(body: bytes, strings: Sequence[str]) -> MemoryModule | None:
    """SMBIOS 7.18: offsets 0x0A data width, 0x0C size, 0x10 and 0x11 locators, 0x20 speed."""

    def word(offset: int) -> int:
        return int.from_bytes(body[offset : offset + 2], "little")

    def text(offset: int) -> str:
        number = body[offset]
        return strings[number - 1].strip() if 0 < number <= len(strings) else ""

    if len(body) < 0x22 or word(0x0C) == 0:  # an empty slot, or a table without the speed
        return None
    if word(0x0A) in (0, 0xFFFF) or word(0x20) in (0, 0xFFFF):
        return None
    return MemoryModule(
        locator=text(0x10), bank=text(0x11), width_bits=word(0x0A), speed_mt_s=word(0x20)
    )


def modules_bandwidth(modules: Sequence[MemoryModule]) -> int | None:
    """Bytes per second of all channels together.

    Modules on one channel take turns, so channels are counted, not modules. The table has no field
    for the channel, only the vendor's label of the slot; a label without one gives no figure.
    """
    channels: dict[tuple[str, str], int] = {}
    for module in modules:
        channel = _channel(module)
        if channel is None:
            return None
        rate = module.width_bits // 8 * module.speed_mt_s * 1_000_000
        channels[channel] = min(rate, channels.get(channel, rate))
    return sum(channels.values()) or None


def _channel(module: MemoryModule) -> tuple[str, str] | None:
    """Socket and channel of `P0 CHANNEL A`, `ChannelB-DIMM0` or `Controller1-ChannelA-DIMM0`."""
    label = f"{module.bank} {module.locator}"
    channel = re.search(r"channel[ _-]?([a-z0-9])", label, re.IGNORECASE)
    if channel is None:
        return None
    socket = re.search(r"\b(?:P|CPU|NODE|Controller)[ _]?(\d+)", label, re.IGNORECASE)
    return (socket[1] if socket else "", channel[1].upper())
