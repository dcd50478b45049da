"""AMD and Intel GPUs through sysfs (/sys/class/drm)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loadmaster.machine import parse, parse_gpu
from loadmaster.machine.bandwidth import gpu_bandwidth, pcie_bandwidth
from loadmaster.machine.host import Found, Host
from loadmaster.machine.rules import RULES
from loadmaster.machine.types import Gpu, GpuBackend, Vendor
from loadmaster.units import Bytes

_AMD, _INTEL = "0x1002", "0x8086"
_AMDGPU_IDS = "/usr/share/libdrm/amdgpu.ids"
# Local memory of Intel cards: i915 puts it beside the card, xe into the first tile.
_INTEL_TOTAL = (
    "lmem_total_bytes",
    "device/lmem_total_bytes",
    "device/tile0/physical_vram_size_bytes",
)
_INTEL_FREE = ("lmem_avail_bytes", "device/lmem_avail_bytes")
_INTEGRATED_SLOT = "0000:00:02.0"  # where Intel's processors have their own graphics


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    gen: int | None = None
    gen_now: int | None = None
    width: int | None = None
    width_max: int | None = None


def probe(host: Host) -> Found:
    """AMD GPUs, then Intel's, each in the order of the kernel's card numbers."""
    amd: list[Gpu] = []
    intel: list[Gpu] = []
    warnings: list[str] = []
    for vendor_path in host.glob("/sys/class/drm/card*/device/vendor"):
        card = vendor_path.removesuffix("/device/vendor")
        if not card.rpartition("card")[2].isdigit():  # connectors are `card0-DP-1`
            continue
        vendor = (host.text(vendor_path) or "").strip()
        if vendor == _AMD:
            amd.extend(_amd(host, card, warnings))
        elif vendor == _INTEL:
            intel.extend(_intel(host, card, warnings))
    return Found(gpus=(*_shown(host, amd), *intel), warnings=tuple(warnings))


def _shown(host: Host, gpus: list[Gpu]) -> list[Gpu]:
    """The AMD GPUs that ROCm's variables leave; names other than numbers are not known here."""
    value = host.environ.get("ROCR_VISIBLE_DEVICES") or host.environ.get("HIP_VISIBLE_DEVICES")
    return [gpus[index] for index in parse_gpu.visible_devices(value, [""] * len(gpus))]


def _amd(host: Host, card: str, warnings: list[str]) -> list[Gpu]:
    device = f"{card}/device"
    vram = host.integer(f"{device}/mem_info_vram_total")
    if not vram:
        warnings.append(f"AMD GPU at {_address(host, card)}: the amdgpu driver tells no VRAM size")
        return []
    used = host.integer(f"{device}/mem_info_vram_used")
    unified = _shares_ram(host, device, vram)
    total, free = _shared_memory(host, device, vram, used) if unified else (vram, _less(vram, used))
    name = _amd_name(host, device)
    if unified:
        warnings.append(f"{name} shares the host's RAM: its VRAM and the budget for RAM are one")
    return [
        _gpu(
            host,
            card,
            name=name,
            vendor="amd",
            backend="rocm" if host.exists("/dev/kfd") else "vulkan",
            total=total,
            free=free,
            unified=unified,
        )
    ]


def _shares_ram(host: Host, device: str, vram: int) -> bool:
    """Whether the GPU is part of the processor and lives mostly in the host's RAM.

    Only such a GPU has a sensor for the northbridge's voltage (`vddnb`; kernel documentation,
    amdgpu, hwmon interfaces): no other file of sysfs tells the two apart. With a carve-out larger
    than the part of RAM it may map, the carve-out is taken for a card's own memory, which it is.
    """
    labels = host.glob(f"{device}/hwmon/hwmon*/in1_label")
    apu = any((host.text(label) or "").strip() == "vddnb" for label in labels)
    return apu and vram < (host.integer(f"{device}/mem_info_gtt_total") or 0)


def _shared_memory(host: Host, device: str, vram: int, used: int | None) -> tuple[int, int | None]:
    """Total and free of an APU: the carve-out and the part of RAM that the driver may map.

    `mem_info_vram_total` alone is the BIOS's carve-out, 0.5 GiB on a machine whose GPU can use 110.
    """
    gtt = host.integer(f"{device}/mem_info_gtt_total") or 0
    gtt_free = _less(gtt, host.integer(f"{device}/mem_info_gtt_used"))
    available = parse.meminfo(host.text("/proc/meminfo") or "").get("MemAvailable")
    vram_free = _less(vram, used)
    if gtt_free is None or vram_free is None or available is None:
        return vram + gtt, None
    return vram + gtt, vram_free + min(gtt_free, available)


def _amd_name(host: Host, device: str) -> str:
    product = (host.text(f"{device}/product_name") or "").strip()
    if product:
        return product
    code = (host.text(f"{device}/device") or "").strip().removeprefix("0x").lower()
    revision = (host.text(f"{device}/revision") or "").strip().removeprefix("0x").lower()
    names = parse_gpu.amdgpu_ids(host.text(_AMDGPU_IDS) or "")
    return names.get((code, revision)) or f"AMD GPU {code}"


def _intel(host: Host, card: str, warnings: list[str]) -> list[Gpu]:
    total = _first(host, card, _INTEL_TOTAL)
    if total is None:
        address = _address(host, card)
        kind = "graphics of the processor" if address == _INTEGRATED_SLOT else "GPU"
        warnings.append(
            f"Intel {kind} at {address}: no memory of its own in sysfs, not planned for"
        )
        return []
    code = (host.text(f"{card}/device/device") or "").strip().removeprefix("0x").lower()
    return [
        _gpu(
            host,
            card,
            name=f"Intel GPU {code}",
            vendor="intel",
            backend="vulkan",
            total=total,
            free=_first(host, card, _INTEL_FREE),
            unified=False,
        )
    ]


def _gpu(
    host: Host,
    card: str,
    *,
    name: str,
    vendor: Vendor,
    backend: GpuBackend,
    total: int,
    free: int | None,
    unified: bool,
) -> Gpu:
    link = _Link() if unified else _link(host, f"{card}/device", vendor)
    driver = host.path(f"{card}/device/driver")
    return Gpu(
        id="",
        name=name,
        vendor=vendor,
        backend=backend,
        total_bytes=Bytes(total),
        free_bytes=None if free is None else Bytes(free),
        free_source=None if free is None else "sysfs",
        unified_memory=unified,
        rules=RULES[backend],
        driver=driver.resolve().name if driver.exists() else None,
        pcie_gen=link.gen,
        pcie_gen_now=link.gen_now,
        pcie_width=link.width,
        pcie_width_max=link.width_max,
        pci_bus_id=_address(host, card),
        bandwidth_bytes_s=gpu_bandwidth(name, total),
        link_bytes_s=pcie_bandwidth(link.gen, link.width),
    )


def _link(host: Host, device: str, vendor: Vendor) -> _Link:
    """The narrowest link between card and processor.

    These cards have a switch on board, and the slot is on its other side. The link inside says
    x16 on AMD's cards and `2.5 GT/s`, x1, on Intel's, whatever the slot: Intel's is left out.
    """
    hops = []
    folder = host.path(device).resolve()
    while (folder / "current_link_width").exists():
        hops.append(folder)
        folder = folder.parent
    if vendor == "intel":
        hops = hops[-1:]
    return _Link(
        gen=_least(_generation(hop, "max_link_speed") for hop in hops),
        gen_now=_least(_generation(hop, "current_link_speed") for hop in hops),
        width=_least(_width(hop, "current_link_width") for hop in hops),
        width_max=_least(_width(hop, "max_link_width") for hop in hops),
    )


def _generation(folder: Path, name: str) -> int | None:
    file = folder / name
    return parse_gpu.pcie_generation(file.read_text("utf-8")) if file.exists() else None


def _width(folder: Path, name: str) -> int | None:
    file = folder / name
    text = file.read_text("utf-8").strip() if file.exists() else ""
    return int(text) if text.isdigit() and int(text) else None  # 0: a link that is down


def _least(values: Iterable[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _less(total: int, used: int | None) -> int | None:
    return None if used is None else max(0, total - used)


def _first(host: Host, card: str, names: tuple[str, ...]) -> int | None:
    values = (host.integer(f"{card}/{name}") for name in names)
    return next((value for value in values if value is not None), None)


def _address(host: Host, card: str) -> str:
    """The PCI address: the name of the folder that `device` points to."""
    return parse_gpu.bus_id(host.path(f"{card}/device").resolve().name)
