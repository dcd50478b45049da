"""Whose memory the meter reads: cards by the names that the engine has for them."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from loadmaster.engine.meter import GpuMeter
from loadmaster.units import GIB

PID = 4242
# As NVML may count them: not in the order of the bus.
CARDS = (
    SimpleNamespace(bus="00000000:41:00.0", uuid="GPU-b1", used=2 * GIB),
    SimpleNamespace(bus="00000000:01:00.0", uuid="GPU-a7", used=1 * GIB),
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA driver with two cards on which the worker has memory."""

    def processes(card: Any) -> list[Any]:
        other = SimpleNamespace(pid=PID + 1, usedGpuMemory=7 * GIB)
        return [other, SimpleNamespace(pid=PID, usedGpuMemory=card.used)]

    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetHandleByIndex=CARDS.__getitem__,
        nvmlDeviceGetPciInfo=lambda card: SimpleNamespace(busId=card.bus.encode()),
        nvmlDeviceGetUUID=lambda card: card.uuid.encode(),
        nvmlDeviceGetComputeRunningProcesses=processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("visible", "used"),
    [
        (None, {"gpu:0": 1 * GIB, "gpu:1": 2 * GIB}),  # PCI_BUS_ID is what workers are given
        ("1,0", {"gpu:0": 2 * GIB, "gpu:1": 1 * GIB}),
        ("1", {"gpu:0": 2 * GIB}),
        ("GPU-b", {"gpu:0": 2 * GIB}),
        ("GPU-b1,GPU-a7", {"gpu:0": 2 * GIB, "gpu:1": 1 * GIB}),
        ("", {}),
    ],
)
def test_a_card_is_the_one_that_the_engine_calls_so(
    visible: str | None, used: dict[str, int]
) -> None:
    meter = GpuMeter(PID, visible)
    assert meter.sample() == used
    assert meter.peak == used
