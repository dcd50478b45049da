"""`doctor --measure`: what is asked, what becomes of the answers, and where they are kept."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.engine.timing import (
    Question,
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeRead,
    TimeSmall,
    TimeSteps,
    question_from_json,
    question_to_json,
)
from loadmaster.errors import EngineError
from loadmaster.interfaces.cli.measured import measured_text
from loadmaster.machine.measurements import DISTURBED_SPREAD, DeviceTimes, Measurements
from loadmaster.machine.profiles import decode_profile, save_profile
from loadmaster.model.quants import BY_NAME
from loadmaster.plan.rates import rates_of
from loadmaster.plan.weights import weight_mix
from loadmaster.tasks.measured import FILE_NAME, keep, with_measurements
from loadmaster.tasks.measuring.asking import Asker
from loadmaster.tasks.measuring.disk import disk_read_bytes_s
from loadmaster.tasks.measuring.machine import measure_device
from loadmaster.tasks.measuring.operations import ram_read
from loadmaster.tasks.measuring.products import COMMON_TYPES, OTHER_TYPES
from loadmaster.units import MIB
from tests.toy import toy_machine, toy_model


class Kernels:
    """Answers as a machine of 10 GB/s that never computes, with one run in five disturbed."""

    bytes_s = 10e9

    def __init__(self, *, link: bool = True) -> None:
        self.asked: list[Question] = []
        self._link = link

    def __call__(self, question: Question) -> tuple[float, ...] | None:
        self.asked.append(question)
        match question:
            case TimeProducts(repacked=True):
                return None
            case TimeProducts():
                size = BY_NAME[question.type].row_bytes(question.n_in) * question.n_out
                size *= max(1, question.n_expert)
                seconds = [matrices * size / self.bytes_s for _, matrices in question.points]
                return tuple(s * k for s in seconds for k in _runs(question.runs))
            case TimeLink(pinned=True) if not self._link:
                return None
            case TimeLink() | TimeRead():
                return tuple(question.size_bytes / self.bytes_s * k for k in _runs(question.runs))
        runs = question.n_steps if isinstance(question, TimeSteps) else question.runs
        return tuple(1e-3 * k for k in _runs(runs))


def _runs(count: int) -> list[float]:
    return [1.0] * (count - 1) + [50.0]


class Clock:
    """A second passes with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_device_gives_the_rate_of_every_type_and_one_slow_run_does_not_count() -> None:
    times = measure_device(Asker(Kernels(), deadline=1e9), "cpu", "toy", 8)
    assert {row.type for row in times.products} == {*COMMON_TYPES, *OTHER_TYPES}
    assert all(row.s_per_byte == pytest.approx(1e-10) for row in times.products)
    assert {row.layout for row in times.products} == {"plain"}
    assert {row.gathered for row in times.products} == {False, True}
    assert times.not_measured == ()
    assert times.pinned_bytes_s is None  # a processor has no link


def test_weights_overflow_the_caches_and_every_timing_is_bounded() -> None:
    kernels = Kernels()
    measure_device(Asker(kernels, deadline=1e9), "cpu", "toy", 8)
    products = [q for q in kernels.asked if isinstance(q, TimeProducts)]
    for question in products:
        stack = question.n_out * max(1, question.n_expert)
        size = BY_NAME[question.type].row_bytes(question.n_in) * stack * question.n_matrices
        assert size > 150 * MIB
        for tokens, matrices in question.points:
            flops = 2 * question.n_in * stack * tokens * matrices
            assert matrices == 1 or flops <= 3e9
    attention = [q for q in kernels.asked if isinstance(q, TimeAttention)]
    assert {q.type for q in attention} == {"f16", "q8_0"}
    assert {q.operation for q in kernels.asked if isinstance(q, TimeSmall)} >= {"norm", "gate"}


def test_when_the_time_is_up_the_rest_is_named_instead_of_asked() -> None:
    kernels = Kernels()
    times = measure_device(Asker(kernels, deadline=40.0, clock=Clock()), "cpu", "toy", 8)
    timed = {row.type for row in times.products}
    assert timed < {*COMMON_TYPES, *OTHER_TYPES}
    assert {note.split()[0] for note in times.not_measured} >= set(OTHER_TYPES) - timed
    assert all("time limit" in note for note in times.not_measured)
    assert len(kernels.asked) <= 40


def test_the_spread_of_the_runs_tells_that_something_else_was_running() -> None:
    calm, busy = Asker(Kernels(), deadline=1e9), Asker(lambda _: (1.0, 2.0, 3.0), deadline=1e9)
    for asker in (calm, busy):
        asker(TimeRead(n_threads=1, size_bytes=1, runs=3))
    assert calm.spread == 1.0
    assert busy.spread == 2.0 > DISTURBED_SPREAD


def test_a_card_is_asked_for_its_link_and_says_what_it_lacks() -> None:
    times = measure_device(Asker(Kernels(link=False), deadline=1e9), "gpu:0", "card", 8)
    assert times.pinned_bytes_s is None
    assert times.pageable_bytes_s == pytest.approx(10e9)
    assert "link from page-locked memory" in times.not_measured
    assert times.n_threads == 0


def test_ram_is_read_with_every_number_of_threads() -> None:
    assert ram_read(Kernels(), 3) == pytest.approx((10e9, 10e9, 10e9))
    assert ram_read(lambda _: None, 3) == ()


def test_a_disk_that_cannot_be_written_is_not_measured(tmp_path: Path) -> None:
    assert disk_read_bytes_s(tmp_path / "new", 16 * MIB) is not None
    file = tmp_path / "file"
    file.write_text("")
    assert disk_read_bytes_s(file) is None
    assert not list((tmp_path / "new").iterdir())  # nothing is left behind


def test_a_question_survives_the_wire() -> None:
    question = TimeRead(n_threads=2, size_bytes=4096, runs=3)
    assert question_from_json(question_to_json(question)) == question
    with pytest.raises(EngineError, match="nothing called"):
        question_from_json({"kind": "TimeNothing", "question": {}})


def _measurements() -> Measurements:
    asker = Asker(Kernels(), deadline=1e9)
    devices = tuple(measure_device(asker, name, name, 8) for name in ("cpu", "gpu:0"))
    return Measurements(
        taken="2026-01-01", seconds=2.0, ram_read_bytes_s=(5e9, 8e9), devices=devices
    )


def test_figures_are_kept_for_the_device_the_driver_and_the_build(tmp_path: Path) -> None:
    machine, measured = toy_machine(64 * MIB), _measurements()
    keep(machine, "build-1", measured, tmp_path)
    again = with_measurements(machine, "build-1", tmp_path)
    assert again.measured == measured
    assert rates_of(again, weight_mix(toy_model())).basis == "measured"
    assert with_measurements(machine, "build-2", tmp_path).measured is None
    newer = replace(machine, gpus=(replace(machine.gpus[0], driver="2"),))
    found = with_measurements(newer, "build-1", tmp_path).measured
    assert found is not None
    assert [row.id for row in found.devices] == ["cpu"]


def test_a_card_in_another_slot_keeps_its_figures(tmp_path: Path) -> None:
    machine = toy_machine(64 * MIB)
    keep(machine, "build", _measurements(), tmp_path)
    moved = toy_machine(32 * MIB, 64 * MIB)
    moved = replace(
        moved, gpus=(replace(moved.gpus[0], name="other"), replace(moved.gpus[1], name="toy 0"))
    )
    found = with_measurements(moved, "build", tmp_path).measured
    assert found is not None
    assert [row.id for row in found.devices] == ["cpu", "gpu:1"]


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"hosts": 3}')
    machine = toy_machine()
    assert with_measurements(machine, "build", tmp_path) == machine
    keep(machine, "build", replace(_measurements(), devices=()), tmp_path)
    assert with_measurements(machine, "build", tmp_path).measured is not None


def test_a_profile_of_a_measured_machine_keeps_the_figures(tmp_path: Path) -> None:
    machine = replace(toy_machine(64 * MIB), measured=_measurements())
    save_profile(machine, tmp_path / "machine.json")
    assert decode_profile((tmp_path / "machine.json").read_text(), "machine").measured is not None


def test_the_table_names_types_rates_and_what_is_missing() -> None:
    device = DeviceTimes(id="gpu:0", name="card", n_threads=0, not_measured=("q4_K",))
    measured = replace(_measurements(), spread=2.0)
    text = measured_text(replace(measured, devices=(*measured.devices, device)))
    assert "RAM read   8.0 GB/s, 2 threads" in text
    assert "q6_K" in text
    assert "10.0 GB/s" in text
    assert "not measured: q4_K" in text
    assert "other programs had the processors" in text
