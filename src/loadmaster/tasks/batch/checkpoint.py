"""The plan of a job on a safetensors model: as many sequences as fit, each as long as the longest
item. Nothing is known of how its steps would go, so no end is predicted."""

from dataclasses import replace

from loadmaster.errors import UsageError
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.simulate import JobPrediction
from loadmaster.plan.types import DoesNotFit, Plan
from loadmaster.tasks.opening import Planner
from loadmaster.tasks.planning import require_plan
from loadmaster.units import align

_SEQUENCES = (32, 16, 8, 4, 2, 1)
_STEP_CELLS = 64  # a slot is as long as the longest item, rounded up to so many


def plan_slots(planner: Planner, job: JobOutline) -> JobPlan:
    """The plan with the most sequences that fit.

    Raises:
        PlanRefusedError: not even one does.
        UsageError: the job is of embeddings.
    """
    if not job.output_tokens:
        raise UsageError(
            "the transformers engine makes no embeddings", hint="take a GGUF of the model"
        )
    asked = planner.request.knobs.n_seq_max
    steps = (asked,) if asked else [n for n in _SEQUENCES if n <= max(1, job.n_items)]
    outcome: Plan | DoesNotFit | None = None
    for n_seq_max in steps:
        outcome = _planned(planner, job, n_seq_max)
        if isinstance(outcome, Plan):
            break
    assert outcome is not None
    return JobPlan(
        plan=require_plan(outcome),
        job=job,
        predicted=_unknown(job),
        alone=None,
        levers=(),
        considered=(),
    )


def _planned(planner: Planner, job: JobOutline, n_seq_max: int) -> Plan | DoesNotFit:
    request = planner.request
    trained = request.model.n_ctx_train or job.longest
    n_ctx = request.workload.n_ctx or min(align(job.longest + 1, _STEP_CELLS), trained)
    workload = replace(request.workload, kind="batch", n_seq_max=n_seq_max, n_ctx=n_ctx)
    planner.request = replace(request, workload=replace(workload, n_cells=None))
    try:
        return planner.plan()
    finally:
        planner.request = request


def _unknown(job: JobOutline) -> JobPrediction:
    return JobPrediction(
        seconds=0.0,
        n_items=job.n_items,
        prefilled_tokens=job.distinct_tokens,
        generated_tokens=job.output_tokens,
        n_steps=0,
        peak_cells=0,
        n_preempted=0,
        mean_sequences=0.0,
        costs={},
        basis="unknown",
    )
