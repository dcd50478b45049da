"""Plans of jobs for the transformers engine: sequences, slots, and how long a job takes."""

from dataclasses import replace

import pytest

from loadmaster.errors import UsageError
from loadmaster.machine.measurements import (
    AttentionTime,
    DeviceTimes,
    LayerTime,
    Measurements,
    ProductTime,
)
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Machine
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_jobs import plan_checkpoint_job
from loadmaster.plan.hf_speed import decoding, speed_of
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.steps import Step
from loadmaster.plan.types import (
    DoesNotFit,
    Knobs,
    Override,
    Quantize,
    TransformersSettings,
    Workload,
)
from tests import checkpoint_parts as parts
from tests.job_parts import job_of

JOB = job_of((400, 512, 64, 0))


def planned(
    machine: Machine | str = "rtx3060-12g",
    job: JobOutline = JOB,
    *,
    quantize: Quantize = "nf4",
    vram: str | None = None,
    n_cells: int | None = None,
    n_seq_max: int | None = None,
) -> JobPlan | DoesNotFit:
    if isinstance(machine, str):
        machine = load_profile(machine)
    return plan_checkpoint_job(
        machine, parts.shape(), job, Workload(n_cells=n_cells), make_budget(machine, vram, None),
        Knobs(quantize=quantize, n_seq_max=n_seq_max), default_overheads(machine.gpus),
    )  # fmt: skip


def fitting(machine: Machine | str = "rtx3060-12g", job: JobOutline = JOB, **given: int) -> JobPlan:
    made = planned(machine, job, **given)  # type: ignore[arg-type]
    assert isinstance(made, JobPlan)
    return made


def engine(made: JobPlan) -> TransformersSettings:
    assert isinstance(made.plan.engine, TransformersSettings)
    return made.plan.engine


def test_many_sequences_end_a_job_sooner_than_one_after_another() -> None:
    made = fitting()
    settings = engine(made)
    assert settings.n_seq_max > 8
    assert made.alone is not None
    assert made.speedup == made.alone.seconds / made.predicted.seconds > 3
    assert made.plan.predicted.jobs_per_hour == made.predicted.items_per_hour
    assert made.plan.workload.kind == "batch"


def test_every_sequence_has_cells_for_the_longest_item() -> None:
    made = fitting(job=job_of((100, 100, 20, 0), (1, 700, 300, 0)))
    settings = engine(made)
    assert settings.n_ctx // settings.n_seq_max == 1024
    assert made.predicted.peak_cells == settings.n_ctx


def test_lengths_that_are_estimates_get_longer_slots() -> None:
    exact = job_of((100, 700, 300, 0))
    slots = {
        name: engine(fitting(job=job)).n_ctx // engine(fitting(job=job)).n_seq_max
        for name, job in (
            ("exact", exact),
            ("classes", replace(exact, mixed=True)),
            ("sample", replace(exact, mixed=True, lengths="sample")),
        )
    }
    assert slots == {"exact": 1024, "classes": 1152, "sample": 1280}


def test_the_plan_keeps_the_budget_and_its_considered_are_in_order() -> None:
    made = fitting()
    assert all(device.left_bytes >= 0 for device in made.plan.devices)
    assert made.considered[0].n_seq_max == engine(made).n_seq_max
    assert len({(it.n_seq_max, it.n_ubatch) for it in made.considered}) == len(made.considered) > 3


def test_a_tighter_budget_takes_fewer_sequences_and_longer() -> None:
    machine = load_profile("rtx3060-12g")
    tight = planned(machine, vram="7GiB")
    assert isinstance(tight, JobPlan)
    wide = fitting(machine)
    assert engine(tight).n_seq_max < engine(wide).n_seq_max
    assert tight.predicted.seconds > wide.predicted.seconds
    assert any(lever.what.startswith("8 GiB more VRAM") for lever in tight.levers)
    assert all(lever.seconds < tight.predicted.seconds for lever in tight.levers)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    outcome = planned(quantize="none")
    assert isinstance(outcome, DoesNotFit)
    assert outcome.engine.n_seq_max == 1
    assert [" ".join(one.flags) for one in outcome.nearest][:1] == ["--quantize int8"]


def test_numbers_that_are_given_are_kept() -> None:
    assert engine(fitting(n_seq_max=3)).n_seq_max == 3
    made = fitting(n_cells=4096)
    settings = engine(made)
    assert settings.n_ctx <= 4096
    assert settings.n_ctx // settings.n_seq_max >= JOB.longest


def test_a_job_of_one_item_takes_one_sequence() -> None:
    assert engine(fitting(job=job_of((1, 512, 64, 0)))).n_seq_max == 1


def test_shared_prompts_are_fed_once_and_take_cells_each() -> None:
    alike = fitting(job=job_of((400, 512, 64, 400), prefix=400))
    apart = fitting(job=JOB)
    assert alike.predicted.prefilled_tokens < apart.predicted.prefilled_tokens / 3
    assert alike.predicted.seconds < apart.predicted.seconds
    assert engine(alike).n_ctx // engine(alike).n_seq_max == 640


def test_a_gguf_engines_flags_are_refused() -> None:
    machine = load_profile("rtx3060-12g")
    with pytest.raises(UsageError, match="-ot"):
        plan_checkpoint_job(
            machine, parts.shape(), JOB, Workload(), make_budget(machine, None, None),
            Knobs(n_cpu_moe=1, op_offload=True, overrides=(Override(pattern="x", device="cpu"),)),
            default_overheads(machine.gpus),
        )  # fmt: skip


# ---- the CPU: nothing is published of quantized weights there, so it is measured or unknown


def test_quantized_on_an_unmeasured_cpu_has_no_time() -> None:
    made = planned("cpu-64g")
    assert isinstance(made, JobPlan)
    assert made.predicted.basis == "unknown"
    assert made.plan.predicted.jobs_per_hour is None
    assert (made.levers, engine(made).n_seq_max) == ((), 32)


def measured_cpu(**changes: float) -> Machine:
    """The CPU profile with figures as `doctor --measure` keeps them."""
    ps = {1: 100.0, 8: 120.0, 512: 4000.0}
    row = DeviceTimes(
        id="cpu",
        name="a CPU",
        n_threads=16,
        products=tuple(
            ProductTime(
                type=kind, layout="plain", gathered=False, tokens=tokens, s_per_byte=value * 1e-12
            )
            for kind in ("bf16", "nf4", "nf4-double")
            for tokens, value in ps.items()
        ),
        attention=tuple(
            AttentionTime(
                type="bf16", head_dim=64, n_head_kv=8, heads_per_kv=4, tokens=tokens, cells=512,
                s_per_element=1e-11,
            )
            for tokens in (1, 256)
        ),
        layers=(LayerTime(kind="none", seconds=changes.get("layer_s", 1e-4)),),
    )  # fmt: skip
    measured = Measurements(taken="", seconds=1.0, engine="transformers", devices=(row,))
    return replace(load_profile("cpu-64g"), measured=measured)


def test_a_measured_cpu_predicts_a_job_of_quantized_weights() -> None:
    made = planned(measured_cpu())
    assert isinstance(made, JobPlan)
    assert made.predicted.basis == "measured"
    assert made.predicted.seconds > 0
    assert any(lever.what == "RAM and cores twice as fast" for lever in made.levers)


def test_llamacpps_measurements_say_nothing_of_torch() -> None:
    machine = measured_cpu()
    assert machine.measured is not None
    other = replace(machine, measured=replace(machine.measured, engine="llamacpp"))
    made = planned(other)
    assert isinstance(made, JobPlan)
    assert made.predicted.basis == "unknown"


def test_on_a_cpu_launching_adds_to_the_work_and_on_a_gpu_it_hides() -> None:
    model = parts.shape()
    slow, quick = measured_cpu(layer_s=2e-4), measured_cpu(layer_s=1e-4)
    settings = replace(parts.SETTINGS, quantize="nf4", n_threads=16)
    step = decoding(1, 100)
    more = speed_of(slow, model, settings).seconds(step)
    assert more - speed_of(quick, model, settings).seconds(step) == pytest.approx(32 * 1e-4)
    on_gpu = replace(settings, device_map=(("", "gpu:0"),))
    costs = speed_of(load_profile("rtx4090-24g"), model, on_gpu).of(
        Step(n_decode=0, n_prefill=512, n_outputs=1, prefill_cells=256, n_chunks=1)
    )
    assert costs["overhead"] == 0
    alone = speed_of(load_profile("rtx4090-24g"), model, on_gpu).of(decoding(1, 100))
    assert max(alone, key=lambda cause: alone[cause]) == "overhead", "the GPU waits for Python"
