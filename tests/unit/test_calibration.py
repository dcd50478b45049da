"""Overheads measured once are used by the next plan, per device, driver and build."""

from dataclasses import replace
from pathlib import Path

from loadmaster.machine.types import Gpu
from loadmaster.tasks.calibration import SPREAD_BYTES, calibrated_overheads, record
from loadmaster.tasks.measurement import MemoryRow
from loadmaster.units import GIB, MIB, Bytes
from tests.toy import toy_machine


def _gpu(driver: str = "570.1") -> Gpu:
    return replace(toy_machine(24 * GIB).gpus[0], name="RTX 4090", backend="cuda", driver=driver)


def _row(size: int | None) -> MemoryRow:
    measured = None if size is None else Bytes(size)
    return MemoryRow(
        device="gpu:0", kind="overhead", planned_bytes=Bytes(640 * MIB), measured_bytes=measured
    )


def test_until_measured_there_is_a_bound(tmp_path: Path) -> None:
    overheads = calibrated_overheads("b", [_gpu()], tmp_path)
    assert overheads.device_source == "bound"
    assert overheads.device_bytes["gpu:0"] == 640 * MIB


def test_the_largest_measurement_counts(tmp_path: Path) -> None:
    for size in (400 * MIB, 450 * MIB, 420 * MIB):
        record("b", [_gpu()], [_row(size)], tmp_path)
    overheads = calibrated_overheads("b", [_gpu()], tmp_path)
    assert overheads.device_bytes["gpu:0"] == 450 * MIB + SPREAD_BYTES
    assert overheads.device_source == "calibrated"


def test_another_driver_or_build_is_not_calibrated(tmp_path: Path) -> None:
    record("b", [_gpu()], [_row(400 * MIB)], tmp_path)
    assert calibrated_overheads("b", [_gpu("580.2")], tmp_path).device_source == "bound"
    assert calibrated_overheads("c", [_gpu()], tmp_path).device_source == "bound"


def test_nothing_measured_keeps_nothing(tmp_path: Path) -> None:
    record("b", [_gpu()], [_row(None)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text("{half")
    assert calibrated_overheads("b", [_gpu()], tmp_path).device_source == "bound"
    record("b", [_gpu()], [_row(400 * MIB)], tmp_path)
    assert calibrated_overheads("b", [_gpu()], tmp_path).device_source == "calibrated"
