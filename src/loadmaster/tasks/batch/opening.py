"""Opening the model of a job, under the plan by which the job ends soonest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import BatchLine
from loadmaster.model.checkpoint import AnyModel
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.simulate import JobPrediction
from loadmaster.tasks.batch.jobs import Run, check_same_model, model_names
from loadmaster.tasks.batch.lives import MOST_RETRIES, NO_MEMORY, RETRY_S
from loadmaster.tasks.batch.model import OpenedModel
from loadmaster.tasks.batch.outline import outline_lines
from loadmaster.tasks.batch.planning import plan_outline
from loadmaster.tasks.batch.policy import BatchSettings, Clock, StopReason
from loadmaster.tasks.batch.progress import Watcher
from loadmaster.tasks.locating import locate_model
from loadmaster.tasks.opening import open_planned
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.progress import Progress

SAMPLE_ITEMS = 1024  # of a longer job, so many stand for all
SAMPLE_COST = 1 << 22  # tokens, roughly: fewer of very long ones


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """A job's model, open, and what was predicted for the items that are left."""

    model: OpenedModel
    predicted: JobPrediction | None  # None: no figures for this machine


def identify(settings: BatchSettings) -> tuple[BatchSettings, frozenset[str]]:
    """Settings that know their model, and what lines may call it; reads its header.

    Raises:
        NotFoundError, DamagedFileError: the model is not there, or cannot be read.
    """
    model = locate_model(settings.model, settings.plan.knobs.quantize).model
    names = model_names(model, settings.model, settings.served_names)
    return replace(settings, fingerprint=fingerprint(model)), names


def fingerprint(model: AnyModel) -> str:
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
    planner.require_build()
    times = store.counts().left / max(1, len(lines))
    made = plan_outline(planner, _outline(planner, lines, times))
    opened = open_planned(planner, made.plan, progress)
    name = settings.served_names[0] if settings.served_names else settings.model
    # The cells of all sequences are one pool; beyond what it was trained for a model says nothing.
    most = planner.request.workload.n_ctx or planner.request.model.n_ctx_train or None
    model = OpenedModel(opened, name, progress, most_n_ctx=most)
    known = made.predicted.basis != "unknown"
    return OpenJob(model=model, predicted=made.predicted if known else None)


def open_in_window(
    run: Run, open_model: Callable[[], OpenJob], watcher: Watcher, clock: Clock | None = None
) -> OpenJob | StopReason:
    """Wait for the job's window, and open its model; why the run ends instead, if it does. Where it
    had to wait, a model that finds no memory is tried again for an hour.

    Raises:
        LoadmasterError: it cannot be opened.
    """
    n_left = MOST_RETRIES
    while (ended := run.wait_for_window(watcher, clock)) is None:
        try:
            return open_model()
        except NO_MEMORY as error:
            if not run.has_waited or not n_left:
                raise
            watcher.say(f"{error.message}; trying again in {RETRY_S / 60:.0f} min")
        n_left -= 1
        if (ended := run.pause(RETRY_S, clock)) is not None:
            break
    return ended


def _outline(planner: Planner, lines: Sequence[BatchLine], times: float) -> JobOutline:
    model, backend = planner.request.model, planner.backend
    return outline_lines(lines, model, planner.build, backend=backend, times=times)


def _options(settings: BatchSettings) -> PlanOptions:
    options = settings.plan
    return replace(
        options,
        workload=replace(options.workload, kind="batch", n_cells=settings.n_cells),
        knobs=replace(options.knobs, n_seq_max=settings.n_sequences),
    )
