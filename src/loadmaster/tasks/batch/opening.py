"""Opening the model of a job, under the plan by which the job ends soonest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadmaster.engine import builds
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import BatchLine
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.simulate import JobPrediction
from loadmaster.plan.types import Plan
from loadmaster.tasks.api.openai_requests import EMBEDDINGS_URL
from loadmaster.tasks.batch.jobs import check_same_model, model_names
from loadmaster.tasks.batch.model import OpenedModel
from loadmaster.tasks.batch.planning import outline_lines
from loadmaster.tasks.batch.policy import BatchSettings
from loadmaster.tasks.locating import locate
from loadmaster.tasks.opening import Planner, open_planned
from loadmaster.tasks.planning import PlanOptions, require_plan
from loadmaster.tasks.progress import Progress

SAMPLE_ITEMS = 1024  # of a longer job, so many stand for all
SAMPLE_COST = 1 << 22  # tokens, roughly: fewer of very long ones
EMBED_N_CTX = 2048  # tokens of one input, where the user does not say
EMBED_SEQUENCES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """A job's model, open, and what was predicted for the items that are left."""

    model: OpenedModel
    predicted: JobPrediction | None  # None: embeddings, or no figures for this machine


def identify(settings: BatchSettings) -> tuple[BatchSettings, frozenset[str]]:
    """Settings that know their model, and what lines may call it; reads its header.

    Raises:
        NotFoundError, DamagedFileError: the model is not there, or cannot be read.
    """
    model = read_model(locate(settings.model))
    names = model_names(model, settings.model, settings.served_names)
    return replace(settings, fingerprint=fingerprint(model)), names


def fingerprint(model: ModelSpec) -> str:
    """What tells one model from another, wherever its file is and whenever it was written."""
    return f"{model.name} {model.quantization}, {model.file_bytes} bytes"


def open_for_job(settings: BatchSettings, store: JobStore, progress: Progress) -> OpenJob:
    """Plan for what is left of the job, load, prove. Close `model.opened` of what is returned.

    Raises:
        PlanRefusedError: nothing fits.
        ModelChangedError: the job was begun with another model.
        LoadmasterError: whatever else stands in the way.
    """
    lines = [
        BatchLine(
            number=item.number,
            custom_id=item.custom_id,
            url=item.url,
            body=item.body,
            digest=b"",
        )
        for item in store.sample(SAMPLE_ITEMS, SAMPLE_COST)
    ]
    planner = Planner(settings.model, _options(settings))
    check_same_model(settings.fingerprint, fingerprint(planner.request.model))
    if planner.build is None:
        builds.find_build()  # which says why there is none
    times = store.counts().left / max(1, len(lines))
    if any(line.url == EMBEDDINGS_URL for line in lines):
        predicted, plan = None, _plan_for_vectors(planner)
    else:
        predicted, plan = _plan_for_text(planner, lines, times)
    opened = open_planned(planner, plan, progress)
    name = settings.served_names[0] if settings.served_names else settings.model
    # The cells of all sequences are one pool; beyond what it was trained for a model says nothing.
    most = planner.request.workload.n_ctx or planner.request.model.n_ctx_train or None
    model = OpenedModel(opened, name, progress, most_n_ctx=most)
    return OpenJob(model=model, predicted=predicted)


def _options(settings: BatchSettings) -> PlanOptions:
    options = settings.plan
    return replace(
        options,
        workload=replace(options.workload, kind="batch", n_cells=settings.n_cells),
        knobs=replace(options.knobs, n_seq_max=settings.n_sequences),
    )


def _plan_for_text(
    planner: Planner, lines: Sequence[BatchLine], times: float
) -> tuple[JobPrediction | None, Plan]:
    outline = outline_lines(
        lines,
        planner.request.model,
        planner.build,
        backend=planner.options.backend,
        times=times,
    )
    outcome = planner.for_job(outline).job_plan()
    if not isinstance(outcome, JobPlan):
        require_plan(outcome)
        raise AssertionError("a refusal is an error")
    known = outcome.predicted.basis != "unknown"
    return outcome.predicted if known else None, outcome.plan


def _plan_for_vectors(planner: Planner) -> Plan:
    """A prompt is pooled within one ubatch, so that is as long as an input may be."""
    request = planner.request
    asked = request.workload.n_ctx or EMBED_N_CTX
    n_ctx = min(asked, request.model.n_ctx_train or asked)
    planner.request = replace(
        request,
        workload=replace(
            request.workload, n_ctx=n_ctx, n_seq_max=request.knobs.n_seq_max or EMBED_SEQUENCES
        ),
        knobs=replace(
            request.knobs,
            pooling=request.model.pooling or "mean",
            n_ubatch=request.knobs.n_ubatch or n_ctx,
        ),
    )
    return require_plan(planner.plan())
