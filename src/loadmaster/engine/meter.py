"""How much memory a process has: its own, apart from the file pages the kernel can drop."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loadmaster.machine.parse_gpu import bus_id, visible_devices
from loadmaster.units import KIB, Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """`own_bytes` is private, shared and swapped memory; `mapped_bytes` are file pages."""

    own_bytes: Bytes
    mapped_bytes: Bytes


def parse_status(text: str) -> ProcessMemory:
    """Read the text of `/proc/PID/status`. RSS would hide what was swapped out."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem", "RssFile", "VmSwap"):
            found[name] = int(value.split()[0]) * KIB
    own = found.get("RssAnon", 0) + found.get("RssShmem", 0) + found.get("VmSwap", 0)
    return ProcessMemory(own_bytes=Bytes(own), mapped_bytes=Bytes(found.get("RssFile", 0)))


def process_memory(pid: int | None = None) -> ProcessMemory:
    """Memory of a process, by default of this one; zeros when it is gone."""
    path = Path(f"/proc/{pid or 'self'}/status")
    try:
        return parse_status(path.read_text())
    except OSError:
        return _without_proc() if pid is None else _NOTHING


_NOTHING = ProcessMemory(own_bytes=Bytes(0), mapped_bytes=Bytes(0))


def _without_proc() -> ProcessMemory:
    """macOS: the highest resident size so far is all that is free to ask."""
    unit = 1 if sys.platform == "darwin" else KIB
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return ProcessMemory(own_bytes=Bytes(highest), mapped_bytes=Bytes(0))


class GpuMeter:
    """What the NVIDIA driver says a process holds on each card, and the highest of it.

    Without a driver, or in a container whose process ids the driver does not know, nothing is
    known and the answer is empty.
    """

    def __init__(self, pid: int, visible: str | None = None) -> None:
        """`visible` is CUDA_VISIBLE_DEVICES: the engine's `gpu:0` is its first entry."""
        self._pid = pid
        self._handles = _handles(visible)
        self._peak: dict[str, Bytes] = {}

    def sample(self) -> Mapping[str, Bytes]:
        """Bytes by device id, now."""
        used = {
            device: size
            for device, handle in self._handles.items()
            if (size := _used_by(self._pid, handle)) is not None
        }
        for device, size in used.items():
            self._peak[device] = max(size, self._peak.get(device, Bytes(0)))
        return used

    @property
    def peak(self) -> Mapping[str, Bytes]:
        """The highest of all samples."""
        return dict(self._peak)


def _handles(visible: str | None) -> dict[str, object]:
    """Cards by the engine's names for them: in PCI bus order, as the worker's CUDA counts them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        cards = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        cards.sort(key=lambda card: bus_id(_text(pynvml.nvmlDeviceGetPciInfo(card).busId)))
        uuids = [_text(pynvml.nvmlDeviceGetUUID(card)) for card in cards]
    except Exception:  # no driver, another driver, an old one: each has an error of its own
        return {}
    shown = visible_devices(visible, uuids)
    return {f"gpu:{position}": cards[index] for position, index in enumerate(shown)}


def _text(answer: str | bytes) -> str:
    return answer.decode() if isinstance(answer, bytes) else answer


def _used_by(pid: int, handle: object) -> Bytes | None:
    import pynvml

    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    for process in processes:
        if process.pid == pid and process.usedGpuMemory is not None:
            return Bytes(process.usedGpuMemory)
    return None
