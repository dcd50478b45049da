"""Bandwidths by name: what vendors state, not what was measured.

A prediction that rests on these says `table`. Decode reaches 75–85 % of the figure for dense
models. GPU names are NVML's, libdrm's or sysctl's, stripped of the brand words in `_BRANDS`; the
match is exact, so an unknown card has no figure instead of a cousin's.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

GB = 1_000_000_000  # bandwidth is sold in 10⁹ bytes

# GB/s. Source: memory specifications on nvidia.com (GeForce and GeForce laptop comparison pages).
_GEFORCE = {
    "gtx 1060 6gb": 192, "gtx 1070": 256, "gtx 1070 ti": 256, "gtx 1080": 320, "gtx 1080 ti": 484,
    "gtx 1660": 192, "gtx 1660 ti": 288, "gtx 1660 super": 336, "titan xp": 547, "titan v": 652,
    "rtx 2060": 336, "rtx 2060 super": 448, "rtx 2070": 448, "rtx 2070 super": 448,
    "rtx 2080": 448, "rtx 2080 super": 496, "rtx 2080 ti": 616, "titan rtx": 672,
    "rtx 3060 ti": 448, "rtx 3070": 448, "rtx 3070 ti": 608, "rtx 3080 ti": 912,
    "rtx 3090": 936, "rtx 3090 ti": 1008,
    "rtx 4060": 272, "rtx 4060 ti": 288, "rtx 4070 super": 504, "rtx 4070 ti": 504,
    "rtx 4070 ti super": 672, "rtx 4080": 716, "rtx 4080 super": 736, "rtx 4090": 1008,
    "rtx 4090 d": 1008,
    "rtx 5050": 320, "rtx 5060": 448, "rtx 5060 ti": 448, "rtx 5070": 672, "rtx 5070 ti": 896,
    "rtx 5080": 960, "rtx 5090": 1792, "rtx 5090 d": 1792,
    "rtx 3060 laptop gpu": 336, "rtx 4050 laptop gpu": 192, "rtx 4060 laptop gpu": 256,
    "rtx 4070 laptop gpu": 256, "rtx 4080 laptop gpu": 432, "rtx 4090 laptop gpu": 576,
    "rtx 5090 laptop gpu": 896,
}  # fmt: skip

# GB/s. Source: product datasheets on nvidia.com (RTX workstation, data centre, Jetson, DGX Spark).
_NVIDIA_PROFESSIONAL = {
    "quadro rtx 4000": 416, "quadro rtx 5000": 448, "quadro rtx 6000": 672, "quadro rtx 8000": 672,
    "rtx a2000": 288, "rtx a2000 12gb": 288, "rtx a4000": 448, "rtx a4500": 640, "rtx a5000": 768,
    "rtx a5500": 768, "rtx a6000": 768, "rtx 2000 ada generation": 224,
    "rtx 4000 ada generation": 360, "rtx 4000 sff ada generation": 280,
    "rtx 4500 ada generation": 432, "rtx 5000 ada generation": 576, "rtx 6000 ada generation": 960,
    "rtx pro 6000 blackwell workstation edition": 1792,
    "rtx pro 6000 blackwell max-q workstation edition": 1792,
    "rtx pro 6000 blackwell server edition": 1597,
    "p4": 192, "p40": 346, "p100-pcie-16gb": 732, "p100-sxm2-16gb": 732, "v100-pcie-16gb": 900,
    "v100-pcie-32gb": 900, "v100-sxm2-16gb": 900, "v100-sxm2-32gb": 900, "t4": 320, "a2": 200,
    "a10": 600, "a10g": 600, "a16": 200, "a30": 933, "a40": 696, "a100-pcie-40gb": 1555,
    "a100-sxm4-40gb": 1555, "a100 80gb pcie": 1935, "a100-sxm4-80gb": 2039, "l4": 300, "l40": 864,
    "l40s": 864, "h100 pcie": 2000, "h100 80gb hbm3": 3350, "h100 nvl": 3900, "h200": 4800,
    "h200 nvl": 4800, "gh200 480gb": 4000, "gb10": 273,
    "jetson agx orin": 204, "jetson agx thor": 273, "jetson orin nx": 102, "jetson orin nano": 68,
}  # fmt: skip

# GB/s. Source: product pages on amd.com (Radeon, Radeon PRO, Instinct), memory bandwidth.
_AMD = {
    "rx 6600": 224, "rx 6600 xt": 256, "rx 6650 xt": 280, "rx 6700 xt": 384, "rx 6750 xt": 432,
    "rx 6800": 512, "rx 6800 xt": 512, "rx 6900 xt": 512, "rx 6950 xt": 576,
    "rx 7600": 288, "rx 7600 xt": 288, "rx 7700 xt": 432, "rx 7800 xt": 624, "rx 7900 gre": 576,
    "rx 7900 xt": 800, "rx 7900 xtx": 960, "rx 9060 xt": 320, "rx 9070": 640, "rx 9070 xt": 640,
    "pro w6800": 512, "pro w7800": 576, "pro w7900": 864, "ai pro r9700": 640, "vii": 1024,
    "instinct mi50": 1024, "instinct mi60": 1024, "instinct mi100": 1228, "instinct mi210": 1638,
    "instinct mi300x": 5300, "instinct mi325x": 6000, "instinct mi355x": 8000,
    "8060s graphics": 256,
}  # fmt: skip

# GB/s. Source: product specifications on intel.com (Arc graphics, Arc Pro).
_INTEL = {
    "arc a380": 186, "arc a580": 512, "arc a750": 512, "arc a770": 512, "arc b570": 380,
    "arc b580": 456, "arc pro b50": 224, "arc pro b60": 456,
}  # fmt: skip

# GB/s. Source: technical specifications on support.apple.com. Where one name covers two memory
# buses (M3 Max, M4 Max), the narrower.
_APPLE = {
    "m1": 68, "m1 pro": 200, "m1 max": 400, "m1 ultra": 800,
    "m2": 100, "m2 pro": 200, "m2 max": 400, "m2 ultra": 800,
    "m3": 100, "m3 pro": 150, "m3 max": 300, "m3 ultra": 819,
    "m4": 120, "m4 pro": 273, "m4 max": 410, "m5": 153,
}  # fmt: skip

# One name, two cards: told apart by their memory in GiB. Source: as for GeForce above.
_BY_SIZE = {
    ("rtx 3050", 6): 168, ("rtx 3050", 8): 224, ("rtx 3060", 8): 240, ("rtx 3060", 12): 360,
    ("rtx 3080", 10): 760, ("rtx 3080", 12): 912, ("arc a770", 16): 560,
}  # fmt: skip

TABLE: Mapping[str, int] = MappingProxyType(
    {**_GEFORCE, **_NVIDIA_PROFESSIONAL, **_AMD, **_INTEL, **_APPLE}
)

_BRANDS = re.compile(
    r"\((?:r|tm)\)|\b(?:nvidia|geforce|tesla|amd|radeon|intel|apple|developer kit)\b"
)

# Bytes per second and lane after line coding. Source: PCI Express base specifications 1.1 to 6.0.
_PCIE_LANE_BYTES_S = {
    1: 250_000_000,
    2: 500_000_000,
    3: 984_600_000,
    4: 1_969_000_000,
    5: 3_938_000_000,
    6: 7_563_000_000,
}
# CUDA's bandwidthTest with pinned memory gives 25–26 GB/s on a PCIe 4.0 x16 link of 31.5 GB/s:
# packet headers and flow control take the rest.
PCIE_USABLE_SHARE = 0.8

# MT/s that a memory generation is sold with. Source: JEDEC JESD79-3, JESD79-4, JESD79-5.
RAM_MT_S: Mapping[str, int] = MappingProxyType(
    {
        "DDR3-1600": 1600,
        "DDR4-2400": 2400,
        "DDR4-2666": 2666,
        "DDR4-2933": 2933,
        "DDR4-3200": 3200,
        "DDR5-4800": 4800,
        "DDR5-5200": 5200,
        "DDR5-5600": 5600,
        "DDR5-6000": 6000,
        "DDR5-6400": 6400,
    }
)
RAM_CHANNEL_BYTES = 8  # a channel is 64 bits wide (DDR5: two halves of 32)


def gpu_bandwidth(name: str, total_bytes: int | None = None) -> int | None:
    """Bytes per second of a card's own memory by its name; None for a name not in the tables."""
    key = _key(name)
    gib = None if total_bytes is None else round(total_bytes / (1 << 30))
    sized = _BY_SIZE.get((key, gib)) if gib is not None else None
    gb_s = sized or TABLE.get(key)
    return None if gb_s is None else gb_s * GB


def bus_bandwidth(bus_bits: int | None, memory_clock_mhz: int | None) -> int | None:
    """Bytes per second from NVML's bus width and memory clock, which counts half the transfers."""
    if not bus_bits or not memory_clock_mhz:
        return None
    return bus_bits // 8 * 2 * memory_clock_mhz * 1_000_000


def pcie_bandwidth(gen: int | None, width: int | None) -> int | None:
    """Usable bytes per second, one way, of a PCIe link; None when it is not known."""
    lane = _PCIE_LANE_BYTES_S.get(gen or 0)
    if lane is None or not width:
        return None
    return int(lane * width * PCIE_USABLE_SHARE)


def ram_bandwidth(generation: str, channels: int) -> int:
    """Bytes per second of several channels of `DDR5-5600`; KeyError for an unknown generation."""
    return RAM_MT_S[generation] * 1_000_000 * RAM_CHANNEL_BYTES * channels


def _key(name: str) -> str:
    return " ".join(_BRANDS.sub(" ", name.lower()).split())
