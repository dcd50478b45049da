"""The plan for a job: sequences, cells and placement, and what stands beside it."""

from dataclasses import replace

import pytest

from loadmaster.machine.types import Machine
from loadmaster.plan.job_candidates import needed_cells
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.simulate import job_prediction
from loadmaster.plan.types import DoesNotFit, Knobs, Workload
from loadmaster.units import MIB
from tests.job_parts import job_of, plan_job_toy
from tests.toy import toy_machine, toy_model

MODEL = toy_model(n_layer=8, n_embd=512, n_ff=8192)  # 65 MB of weights
JOB = job_of((400, 64, 24, 40), prefix=40)


def _planned(machine: Machine, **given: object) -> JobPlan:
    found = plan_job_toy(MODEL, machine, JOB, **given)  # type: ignore[arg-type]
    assert isinstance(found, JobPlan)
    return found


def test_a_job_gets_many_sequences_and_the_cells_they_need() -> None:
    made = _planned(toy_machine(32 * MIB))
    engine = made.plan.llamacpp
    assert engine.n_seq_max >= 16
    assert engine.kv_unified
    assert engine.n_ctx == needed_cells(JOB, engine.n_seq_max)
    assert made.plan.workload.kind == "batch"
    assert made.plan.predicted.jobs_per_hour == made.predicted.items_per_hour
    assert made.speedup is not None
    assert made.speedup > 2


def test_the_plan_keeps_its_caps_and_predicts_itself() -> None:
    machine = toy_machine(32 * MIB)
    made = _planned(machine)
    assert all(device.left_bytes >= 0 for device in made.plan.devices)
    again = job_prediction(machine, MODEL, made.plan.llamacpp, JOB)
    assert made.predicted.seconds == pytest.approx(again.seconds, rel=0.02)


def test_the_caches_are_in_vram_and_weights_give_way() -> None:
    """For chat weights get VRAM first; for a job a pass over them serves all sequences."""
    machine = toy_machine(32 * MIB)
    job = _planned(machine).plan
    chat = _planned(machine, knobs=Knobs(n_seq_max=1)).plan
    assert job.device("gpu:0").of("kv") > chat.device("gpu:0").of("kv")
    assert job.device("gpu:0").of("model") < chat.device("gpu:0").of("model")
    assert job.device("gpu:0").of("kv") > job.device("cpu").of("kv")


def test_what_the_user_fixes_is_kept() -> None:
    made = _planned(
        toy_machine(32 * MIB),
        knobs=Knobs(n_seq_max=5, type_k="f16", type_v="f16", n_ubatch=256, op_offload_min_batch=77),
        workload=Workload(n_cells=1024),
    )
    engine = made.plan.llamacpp
    assert (engine.n_seq_max, engine.n_ctx, engine.n_ubatch) == (5, 1024, 256)
    assert (engine.type_k, engine.op_offload_min_batch) == ("f16", 77)
    assert {it.n_seq_max for it in made.considered} == {5}


def test_the_threshold_is_where_sending_is_quicker() -> None:
    fast = _planned(toy_machine(32 * MIB)).plan.llamacpp
    assert fast.op_offload
    assert fast.op_offload_min_batch < 512
    machine = toy_machine(32 * MIB)
    slow_link = replace(machine, gpus=(replace(machine.gpus[0], link_bytes_s=10**6),))
    assert not _planned(slow_link).plan.llamacpp.op_offload


def test_no_more_sequences_than_items() -> None:
    found = plan_job_toy(MODEL, toy_machine(32 * MIB), job_of((3, 100, 20, 0)))
    assert isinstance(found, JobPlan)
    assert found.plan.llamacpp.n_seq_max <= 3


def test_a_host_alone_plans_too() -> None:
    made = _planned(toy_machine())
    assert made.plan.llamacpp.n_gpu_layers == 0
    assert made.predicted.seconds > 0
    assert [lever.what for lever in made.levers] == ["RAM and cores twice as fast"]


def test_bounds_serve_where_no_engine_is() -> None:
    assert _planned(toy_machine(32 * MIB), bounds=True).plan.llamacpp.n_seq_max > 1


def test_levers_end_it_sooner() -> None:
    made = _planned(toy_machine(32 * MIB))
    assert made.levers
    assert all(lever.seconds < made.predicted.seconds for lever in made.levers)


def test_little_ram_gets_fewer_sequences_or_says_what_is_missing() -> None:
    little = plan_job_toy(MODEL, toy_machine(ram_bytes=72 * MIB), JOB)
    assert isinstance(little, JobPlan)
    assert little.plan.device("cpu").left_bytes >= 0
    nothing = plan_job_toy(MODEL, toy_machine(ram_bytes=MIB // 4), JOB)
    assert isinstance(nothing, DoesNotFit)
    assert nothing.shortfalls


def test_unknown_bandwidths_still_get_a_plan() -> None:
    machine = toy_machine(32 * MIB)
    made = _planned(replace(machine, ram=replace(machine.ram, bandwidth_bytes_s=None)))
    assert made.predicted.basis == "unknown"
    assert made.levers == ()


def test_cells_are_enough_for_most_mixtures_and_never_more_than_all() -> None:
    assert needed_cells(job_of((4, 100, 28, 0)), 4) == 512
    mixed = job_of((50, 10, 10, 0), (50, 500, 100, 0))
    mean = 310
    assert needed_cells(mixed, 16) > 16 * mean
    assert needed_cells(mixed, 100) <= 100 * mean + 256
    assert needed_cells(job_of((64, 1056, 16, 1024), prefix=1024), 64) == 1024 + 64 * 48


def test_items_that_share_little_may_have_caches_of_their_own() -> None:
    job = job_of((400, 24, 24, 0))
    found = plan_job_toy(MODEL, toy_machine(32 * MIB), job)
    assert isinstance(found, JobPlan)
    assert {it.kv_unified for it in found.considered if it.n_seq_max > 1} == {True, False}
    fixed = plan_job_toy(MODEL, toy_machine(32 * MIB), job, knobs=Knobs(kv_unified=False))
    assert isinstance(fixed, JobPlan)
    engine = fixed.plan.llamacpp
    assert not engine.kv_unified
    assert engine.n_ctx == 256 * engine.n_seq_max
    shared = _planned(toy_machine(32 * MIB))
    assert {it.kv_unified for it in shared.considered if it.n_seq_max > 1} == {True}
