"""NVIDIA GPUs through NVML, which opens no CUDA context and takes no VRAM."""

from collections.abc import Callable
from typing import Any

from loadmaster.machine import parse, parse_gpu
from loadmaster.machine.bandwidth import bus_bandwidth, gpu_bandwidth, pcie_bandwidth
from loadmaster.machine.host import Found, Host
from loadmaster.machine.rules import RULES
from loadmaster.machine.types import Gpu, GpuProcess
from loadmaster.units import Bytes

_CLOCK_MEM = 2  # NVML_CLOCK_MEM
_DISPLAY_CLASSES = ("0x0300", "0x0302")  # PCI: VGA, 3D controller
_VENDOR = "0x10de"


def probe(host: Host) -> Found:
    """NVIDIA GPUs in PCI bus order, those that CUDA_VISIBLE_DEVICES leaves.

    The worker sets CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA's own order is fastest first.
    """
    if not _signs(host):
        return Found()
    nvml = host.nvml()
    if nvml is None:
        return _without_driver(host, "the Python package nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _without_driver(host, str(error))
    try:
        return _enumerate(host, nvml)
    finally:
        nvml.nvmlShutdown()


def _signs(host: Host) -> bool:
    """Whether an NVIDIA GPU may be here; loading NVML costs 30 ms on a machine without one."""
    return (
        any(host.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia"))
        or "Jetson" in _model(host)
        or bool(pci_cards(host))
    )


def _model(host: Host) -> str:
    return (host.text("/proc/device-tree/model") or "").strip("\0\n ")


def pci_cards(host: Host) -> list[str]:
    """Bus ids of NVIDIA display devices, which are visible without any driver."""
    cards = []
    for path in host.glob("/sys/bus/pci/devices/*/vendor"):
        folder = path.rpartition("/")[0]
        if (host.text(path) or "").strip() != _VENDOR:
            continue
        if (host.text(f"{folder}/class") or "")[:6] in _DISPLAY_CLASSES:
            cards.append(folder.rpartition("/")[2])
    return cards


def _without_driver(host: Host, reason: str) -> Found:
    if "Jetson" in _model(host):
        return Found(gpus=(_jetson(host),), warnings=(_unified_warning(_model(host)),))
    if host.exists("/dev/nvidiactl") and not host.can_open("/dev/nvidiactl"):
        reason = "this user may not open /dev/nvidiactl"
    cards = pci_cards(host)
    where = f"NVIDIA GPU at {', '.join(cards)}" if cards else "NVIDIA device files"
    if not cards and not host.exists("/dev/nvidiactl"):
        return Found()  # WSL's /dev/dxg with another vendor's GPU behind it
    return Found(warnings=(f"{where}, and its driver does not answer: {reason}",))


def _enumerate(host: Host, nvml: Any) -> Found:
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    handles.sort(key=lambda handle: _pci_id(nvml, handle) or "")
    uuids = [_ask(nvml, nvml.nvmlDeviceGetUUID, handle) or "" for handle in handles]
    shown = parse_gpu.visible_devices(host.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
    driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    warnings: list[str] = []
    gpus = tuple(_gpu(host, nvml, handles[index], driver, warnings) for index in shown)
    if len(shown) < len(handles):
        hidden = len(handles) - len(shown)
        warnings.append(f"CUDA_VISIBLE_DEVICES hides {hidden} of {len(handles)} NVIDIA GPUs")
    return Found(gpus=gpus, warnings=tuple(warnings))


def _ask(nvml: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer; None where this card or driver has none."""
    try:
        answer = call(*arguments)
    except nvml.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def _pci_id(nvml: Any, handle: Any) -> str | None:
    pci = _ask(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    if pci is None:
        return None
    raw = pci.busId
    return parse_gpu.bus_id(raw.decode() if isinstance(raw, bytes) else raw)


def _gpu(host: Host, nvml: Any, handle: Any, driver: str | None, warnings: list[str]) -> Gpu:
    name = _ask(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"
    part = _mig_instance(nvml, handle)
    if part is not None:
        warnings.append(
            f"{name} is split by MIG: its first instance is shown; "
            "CUDA_VISIBLE_DEVICES=MIG-… chooses another"
        )
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, part or handle)
    if memory is None:
        warnings.append(_unified_warning(name))
    total, free, source = _memory(host, memory)
    gen = _ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    width = _ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    return Gpu(
        id="",
        name=name,
        vendor="nvidia",
        backend="cuda",
        total_bytes=total,
        free_bytes=free,
        free_source=source,
        unified_memory=memory is None,
        rules=RULES["cuda"],
        driver=driver,
        compute_capability=_ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle),
        pcie_gen=gen,
        pcie_gen_now=_ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        pcie_width=width,
        pcie_width_max=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        pci_bus_id=_pci_id(nvml, handle),
        # An instance has a share of the memory channels, which NVML does not tell.
        bandwidth_bytes_s=_bandwidth(nvml, handle, name, total) if part is None else None,
        link_bytes_s=pcie_bandwidth(gen, width),
        processes=_processes(host, nvml, handle),
    )


def _memory(host: Host, memory: Any) -> tuple[Bytes, Bytes | None, str]:
    if memory is not None:
        return Bytes(memory.total), Bytes(memory.free), "nvml"
    # GB10, Jetson: NVML answers "not supported", the memory is the host's.
    table = parse.meminfo(host.text("/proc/meminfo") or "")
    return table.get("MemTotal", Bytes(0)), table.get("MemAvailable"), "meminfo"


def _unified_warning(name: str) -> str:
    return (
        f"{name} shares the host's RAM: the driver counts page cache as used, "
        "so free is MemAvailable here"
    )


def _mig_instance(nvml: Any, handle: Any) -> Any:
    """The first MIG instance when the card is split; a CUDA process sees only one."""
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if not mode or not mode[0]:
        return None
    for index in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        part = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if part is not None:
            return part
    return None


def _bandwidth(nvml: Any, handle: Any, name: str, total_bytes: int) -> int | None:
    known = gpu_bandwidth(name, total_bytes)
    if known is not None:
        return known
    bus = _ask(nvml, nvml.nvmlDeviceGetMemoryBusWidth, handle)
    return bus_bandwidth(bus, _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, _CLOCK_MEM))


def _processes(host: Host, nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """Programs with memory on the card; a program that draws and computes is listed once."""
    used: dict[int, int | None] = {}
    for call in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for process in _ask(nvml, call, handle) or ():
            used[process.pid] = max(
                (b for b in (used.get(process.pid), process.usedGpuMemory) if b is not None),
                default=None,
            )
    return tuple(
        GpuProcess(
            pid=pid,
            name=(host.text(f"/proc/{pid}/comm") or "").strip() or None,
            used_bytes=None if size is None else Bytes(size),
        )
        for pid, size in sorted(used.items())
    )


def _jetson(host: Host) -> Gpu:
    """A Jetson whose NVML is missing (JetPack before 6) still has its GPU."""
    total, free, source = _memory(host, None)
    return Gpu(
        id="",
        name=_model(host),
        vendor="nvidia",
        backend="cuda",
        total_bytes=total,
        free_bytes=free,
        free_source=source,
        unified_memory=True,
        rules=RULES["cuda"],
        bandwidth_bytes_s=gpu_bandwidth(_model(host)),
    )
