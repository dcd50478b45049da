"""Captured machines, and an NVML of our own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loadmaster.machine.detect import detect_machine
from loadmaster.machine.host import Host
from loadmaster.machine.types import Gpu, Machine
from loadmaster.units import MIB

CAPTURES = Path(__file__).parent / "data" / "machine"


def unpack(name: str, root: Path) -> Path:
    """Write a capture's files below `root`."""
    for section in (CAPTURES / f"{name}.capture").read_text("utf-8").split("== ")[1:]:
        head, _, content = section.partition("\n")
        path, _, note = head.partition(" ")
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if note.startswith("-> "):
            place.symlink_to(note.removeprefix("-> "))
        else:
            place.write_text(content, "utf-8")
    return root


def captured(name: str, root: Path, **changes: Any) -> Machine:
    """What is found on a captured machine."""
    return detect_machine(Host(root=unpack(name, root), disk_path=root, **changes))


class FakeNvml:
    """As much of pynvml as a probe calls; `cards` are dicts of answers, None is "not supported"."""

    class NVMLError(Exception):
        pass

    def __init__(self, *cards: dict[str, Any], broken: str | None = None) -> None:
        self.cards = cards
        self.broken = broken
        self.open = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError(self.broken)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.cards[index]

    def nvmlSystemGetDriverVersion(self) -> bytes:  # older bindings answer bytes
        return b"560.35.03"

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: dict[str, Any], index: int) -> Any:
        return self._answer(card, "mig_parts")[index]

    def nvmlDeviceGetMaxClockInfo(self, card: dict[str, Any], kind: int) -> Any:
        assert kind == 2
        return self._answer(card, "MaxClockInfo")

    def __getattr__(self, name: str) -> Any:
        question = name.removeprefix("nvmlDeviceGet")
        return lambda card: self._answer(card, question)

    def _answer(self, card: dict[str, Any], question: str) -> Any:
        if card.get(question) is None:
            raise self.NVMLError("Not Supported")
        return card[question]


def card(bus: str = "00000000:01:00.0", **answers: Any) -> dict[str, Any]:
    """The answers of a card."""
    return {
        "Name": "NVIDIA GeForce RTX 4090",
        "UUID": f"GPU-{bus[9:11]}",
        "PciInfo": SimpleNamespace(busId=bus),
        "MemoryInfo": SimpleNamespace(total=24564 * MIB, free=23000 * MIB, used=1564 * MIB),
        "CudaComputeCapability": (8, 9),
        "MaxPcieLinkGeneration": 4,
        "CurrPcieLinkGeneration": 1,
        "CurrPcieLinkWidth": 16,
        "MaxPcieLinkWidth": 16,
        "MigMode": [0, 0],
        **answers,
    }


def with_cards(root: Path, *cards: dict[str, Any], **changes: Any) -> Machine:
    """A captured desktop with these cards."""
    nvml = FakeNvml(*cards)
    machine = captured("desktop-nvidia", root, nvml=lambda: nvml, **changes)
    assert nvml.open == 0
    return machine


def only_gpu(machine: Machine) -> Gpu:
    (gpu,) = machine.gpus
    return gpu
