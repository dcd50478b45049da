"""Laws of plans for jobs: caps hold, and more of a thing never ends a job later."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loadmaster.plan.batch import JobOutline
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.types import Knobs, Workload
from loadmaster.units import MIB
from tests.job_parts import job_of, plan_job_toy
from tests.toy import toy_budget, toy_machine, toy_model

MODEL = toy_model(n_layer=2, n_embd=256, n_ff=768)
jobs = st.builds(
    lambda n, prompt, output, shared: job_of(
        (n, prompt + shared, output, shared), prefix=shared
    ),
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 100), st.sampled_from([0, 0, 200]),
)  # fmt: skip
# What is compared is the search's own objective; the candidates it sizes are chosen by estimates.
SLACK = 1.05
# A plan takes a tenth of a second: a quarter of the profile's examples.
few = settings(max_examples=max(10, settings().max_examples // 4))


@few
@given(jobs, st.integers(0, 16 * MIB), st.integers(1 * MIB, 64 * MIB))
def test_a_job_plan_keeps_every_cap(job: JobOutline, vram: int, ram: int) -> None:
    machine = toy_machine(vram, ram_bytes=ram)
    found = plan_job_toy(MODEL, machine, job)
    assume(isinstance(found, JobPlan))
    assert isinstance(found, JobPlan)
    for device in found.plan.devices:
        assert device.planned_bytes <= toy_budget(machine).cap(device.id)
    assert found.predicted.n_items == job.n_items
    fed = found.predicted.prefilled_tokens
    if found.plan.engine.kv_unified:
        assert fed == job.distinct_tokens
    else:  # a cache for each sequence shares nothing
        assert job.distinct_tokens <= fed <= job.prompt_tokens


@few
@given(jobs, st.integers(0, 12 * MIB), st.integers(0, 12 * MIB))
def test_more_vram_never_ends_later(job: JobOutline, vram: int, more: int) -> None:
    knobs = Knobs(type_k="f16", type_v="f16")
    less = plan_job_toy(MODEL, toy_machine(vram), job, knobs=knobs)
    greater = plan_job_toy(MODEL, toy_machine(vram + more), job, knobs=knobs)
    assert isinstance(less, JobPlan)
    assert isinstance(greater, JobPlan)
    assert _seconds(greater) <= _seconds(less) * SLACK


def _seconds(made: JobPlan) -> float:
    """Without handovers, which no placement is chosen by."""
    return made.predicted.seconds - made.predicted.costs["handover"]


@few
@given(jobs, st.sampled_from([2, 8]), st.integers(512, 4096), st.integers(0, 4096))
def test_more_cells_never_end_later(job: JobOutline, n: int, cells: int, more: int) -> None:
    """On a host, where cells take no room from weights."""
    few, many = (
        plan_job_toy(
            MODEL, toy_machine(), job,
            workload=Workload(n_cells=count), knobs=Knobs(n_seq_max=n),
        )
        for count in (cells, cells + more)
    )  # fmt: skip
    assert isinstance(few, JobPlan)
    assert isinstance(many, JobPlan)
    assert many.predicted.seconds <= few.predicted.seconds * SLACK
