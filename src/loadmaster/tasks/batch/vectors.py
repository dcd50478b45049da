"""The plan of a job of embeddings: its model is opened for vectors, each prompt is fed once, and no
prompt shares the cells of another."""

from dataclasses import replace

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import AnyModel
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.types import AnySettings
from loadmaster.plan.vectors import predict_vectors
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanRequest, require_plan
from loadmaster.tasks.vectors import EMBED_N_CTX
from loadmaster.units import align

# The fewest tokens that fill a step.
_LEAST_N_UBATCH = 512
_MOST_EMBED_SEQUENCES = 64  # inputs of one call
_WORTH_IT = 0.97  # fewer prompts in a step must end the job this much sooner


def plan_vectors(planner: Planner, job: JobOutline) -> JobPlan:
    """The plan with which the job ends soonest, and the planner's request from now on.

    Raises:
        PlanRefusedError: it does not fit.
    """
    given = planner.request
    machine, model = given.machine, given.model
    planner.request = for_vectors(given, job)
    plan = require_plan(planner.plan())
    predicted = predict_vectors(machine, model, plan.engine, job)
    best = _best_count(machine, model, plan.engine, job)
    if given.knobs.n_seq_max is None and best < plan.engine.n_seq_max:
        knobs = replace(given.knobs, n_seq_max=best)
        planner.request = for_vectors(replace(given, knobs=knobs), job)
        plan = require_plan(planner.plan())
        predicted = predict_vectors(machine, model, plan.engine, job)
    speed = replace(plan.predicted, jobs_per_hour=predicted.items_per_hour)
    return JobPlan(
        plan=replace(plan, predicted=speed),
        job=job,
        predicted=predicted,
        alone=predict_vectors(machine, model, replace(plan.engine, n_seq_max=1), job),
        levers=(),
        considered=(),
    )


def _best_count(machine: Machine, model: AnyModel, settings: AnySettings, job: JobOutline) -> int:
    """Of the prompts that may share a step, the number with which the job ends soonest."""
    most = settings.n_seq_max
    times: dict[int, float] = {}
    for n in (1 << bits for bits in range(most.bit_length())):
        found = predict_vectors(machine, model, replace(settings, n_seq_max=n), job)
        if found.basis == "unknown":
            return most
        times[n] = found.seconds
    best = min(times, key=lambda n: times[n])
    return best if times[best] < _WORTH_IT * times.get(most, times[best]) else most


def for_vectors(request: PlanRequest, job: JobOutline) -> PlanRequest:
    """The request for the embeddings of a job.

    A prompt is pooled within one step, so a step has room for the longest, and the cells for all of
    its prompts; as many prompts share it as fill it.
    """
    knobs, n_items = request.knobs, max(1, job.n_items)
    mean = max(1, job.prompt_tokens // n_items)
    longest = knobs.n_ubatch or _longest_input(request, job)
    fill = min(_MOST_EMBED_SEQUENCES, n_items, longest // mean)
    n_seq_max = knobs.n_seq_max or 1 << max(0, fill.bit_length() - 1)
    n_ubatch = align(longest, n_seq_max)
    workload = replace(
        request.workload,
        n_ctx=min(longest, request.model.n_ctx_train or longest),
        n_seq_max=n_seq_max,
        n_cells=max(n_ubatch, request.workload.n_cells or 0),
        prompt_tokens=mean,
        output_tokens=0,
    )
    pooling = request.model.pooling or "mean"
    knobs = replace(knobs, pooling=pooling, n_ubatch=n_ubatch)
    return replace(request, workload=workload, knobs=knobs, job=None)


def _longest_input(request: PlanRequest, job: JobOutline) -> int:
    """Tokens of the longest input there may be; one beyond the model's own fails by itself."""
    model = request.model
    asked = request.workload.n_ctx
    if asked is None:
        known = align(job.longest, _LEAST_N_UBATCH)
        asked = known if job.lengths == "exact" else max(known, EMBED_N_CTX)
    return max(1, min(asked, model.n_ctx_train or asked))
