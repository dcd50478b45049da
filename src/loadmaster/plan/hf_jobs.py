"""The plan for a job under the transformers engine: how many sequences, in what steps, where, so
that it ends soonest. Pure.

Every sequence has a slot of cells as long as the longest item. The job is played on each candidate
(`simulate.play_job`) with the engine's own prices of a step (`hf_speed`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.choices import DEFAULT_N_UBATCH, MAX_SEQUENCES
from loadmaster.plan.hf_placement import Placed
from loadmaster.plan.hf_planner import (
    HfProblem,
    checkpoint_problem,
    placed_best,
    plan_checkpoint,
    plan_of,
)
from loadmaster.plan.hf_speed import HfSpeed, speed_of, twice_as_fast, without_launching
from loadmaster.plan.job_levers import LEAST_GAIN, JobLever
from loadmaster.plan.job_planning import JobPlan, considered
from loadmaster.plan.levers import MORE_VRAM_BYTES
from loadmaster.plan.simulate import JobPrediction, play_job
from loadmaster.plan.types import (
    CPU,
    Budget,
    DoesNotFit,
    Knobs,
    Overheads,
    TransformersSettings,
    Workload,
)
from loadmaster.units import Bytes, align

# Numbers of sequences that are looked at, beside the job's own number of items.
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, MAX_SEQUENCES)
# Without rates more sequences are taken to be better, up to so many.
_BLIND_SEQUENCES = 32
_STEP_CELLS = 64  # a slot is as long as the longest item, rounded up to so many
# What the longest item may be beyond the longest class: classes are means of lengths within 10 %,
# and the longest of a sample is so by its characters.
_MIXED_SPARE = 1.1
_SAMPLE_SPARE = 1.25
# Tokens of a step that are tried beside the default, with the first so many candidates.
_WIDER_N_UBATCHES = (1024, 2048)
_WIDENED = 2
_ESTIMATE_ROUNDS = 3
# Twice as many sequences or tokens of a step must end the job this much sooner: they take memory.
_DOUBLING_GAIN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A placement for some number of sequences, and the time of the job by a short play."""

    problem: HfProblem
    placed: Placed
    seconds: float

    @property
    def n_seq_max(self) -> int:
        return self.placed.settings.n_seq_max


def plan_checkpoint_job(
    machine: Machine,
    model: CheckpointSpec,
    job: JobOutline,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
    *,
    stamp: str = "",
) -> JobPlan | DoesNotFit:
    """The plan under which a job ends soonest, or why there is none.

    `knobs.n_seq_max` and `workload.n_cells` fix the numbers of sequences and cells.

    Raises:
        UsageError: the request contradicts the model, the machine or the engine.
    """
    problem = checkpoint_problem(machine, model, workload, budget, knobs, overheads)
    ranked = _ranked(problem, job)
    if not ranked:
        smallest = _for_sequences(problem, job, knobs.n_seq_max or 1).workload
        outcome = plan_checkpoint(machine, model, smallest, budget, knobs, overheads)
        assert isinstance(outcome, DoesNotFit)
        return outcome
    best = ranked[0]
    speed, settings = _speed(best.problem, best.placed), best.placed.settings
    played = play_job(speed, settings, job, speed.basis)
    predicted = replace(played, peak_cells=settings.n_ctx)  # slots are made whole
    plan = plan_of(best.problem, best.placed, stamp)
    known = speed.basis != "unknown"
    return JobPlan(
        plan=replace(
            plan,
            predicted=replace(
                plan.predicted, jobs_per_hour=predicted.items_per_hour if known else None
            ),
        ),
        job=job,
        predicted=predicted,
        alone=_alone(problem, job),
        levers=_levers(problem, speed, settings, job, predicted) if known else (),
        considered=tuple(considered(it.seconds, it.placed.settings) for it in ranked),
    )


# ---- candidates


def _ranked(problem: HfProblem, job: JobOutline) -> list[_Candidate]:
    """Candidates that fit, by the time of the job; where nothing is known of it, those with the
    most sequences first."""
    found = list(_fitting(problem, job))
    if not found:
        return []
    if _speed(found[0].problem, found[0].placed).basis == "unknown":
        return [it for it in reversed(found) if it.n_seq_max <= _BLIND_SEQUENCES] or found[:1]
    ranked = sorted(found, key=_rank)
    if problem.knobs.n_ubatch is None:
        wider = [
            wide
            for it in ranked[:_WIDENED]
            for n_ubatch in _WIDER_N_UBATCHES
            if (wide := _with_n_ubatch(it, n_ubatch, job)) is not None
        ]
        ranked = sorted([*ranked, *wider], key=_rank)
    return ranked


def _rank(candidate: _Candidate) -> float:
    settings = candidate.placed.settings
    doublings = (settings.n_seq_max * settings.n_ubatch).bit_length()
    return candidate.seconds * (1 + _DOUBLING_GAIN) ** doublings


def _fitting(problem: HfProblem, job: JobOutline) -> Iterator[_Candidate]:
    """One for each number of sequences, ascending; what does not fit ends it."""
    for n in _counts(problem, job):
        asked = _for_sequences(problem, job, n)
        placed = placed_best(asked)
        if not placed.fits:
            return
        yield _candidate(asked, placed, job)


def _candidate(problem: HfProblem, placed: Placed, job: JobOutline) -> _Candidate:
    speed = _speed(problem, placed)
    played = play_job(speed, placed.settings, job, speed.basis, rounds=_ESTIMATE_ROUNDS)
    return _Candidate(problem=problem, placed=placed, seconds=played.seconds)


def _with_n_ubatch(one: _Candidate, n_ubatch: int, job: JobOutline) -> _Candidate | None:
    """The same with wider steps, where there are prompts enough to fill them."""
    if n_ubatch > max(DEFAULT_N_UBATCH, job.longest * one.n_seq_max):
        return None
    problem = replace(one.problem, knobs=replace(one.problem.knobs, n_ubatch=n_ubatch))
    placed = placed_best(problem)
    return _candidate(problem, placed, job) if placed.fits else None


def _counts(problem: HfProblem, job: JobOutline) -> list[int]:
    """Numbers of sequences to look at; each must have cells for the longest item."""
    fixed = problem.knobs.n_seq_max
    if fixed is not None:
        return [fixed]
    most = max(1, min(MAX_SEQUENCES, job.n_items))
    if problem.workload.n_cells is not None:
        most = max(1, min(most, problem.workload.n_cells // _longest(problem, job)))
    return sorted({n for n in _SEQUENCES if n <= most} | {most})


def _for_sequences(problem: HfProblem, job: JobOutline, n: int) -> HfProblem:
    """The same problem for `n` sequences of the job."""
    n_items = max(1, job.n_items)
    given = problem.workload
    workload = replace(
        given,
        kind="batch",
        n_ctx=_slot(problem, job),
        n_seq_max=n,
        prompt_tokens=max(1, ceil(job.prompt_tokens / n_items)),
        output_tokens=max(1, ceil(job.output_tokens / n_items)),
        shared_tokens=min(int(job.shared_tokens), max(0, job.prompt_tokens // n_items - 1)),
    )
    return replace(problem, workload=workload)


def _longest(problem: HfProblem, job: JobOutline) -> int:
    """Tokens of the longest item; one beyond what the model was trained for fails by itself."""
    return max(1, min(job.longest, problem.model.n_ctx_train or job.longest))


def _slot(problem: HfProblem, job: JobOutline) -> int:
    """Cells of a sequence. Where lengths are means or estimates, some item may be longer."""
    wanted = ceil(job.longest * (_MIXED_SPARE if job.mixed else 1.0))
    if job.lengths != "exact":
        wanted = ceil(job.longest * _SAMPLE_SPARE)
    trained = problem.model.n_ctx_train or wanted + _STEP_CELLS
    return problem.workload.n_ctx or min(align(wanted + 1, _STEP_CELLS), trained)


def _speed(problem: HfProblem, placed: Placed) -> HfSpeed:
    return speed_of(problem.machine, problem.model, placed.settings)


# ---- beside the plan


def _alone(problem: HfProblem, job: JobOutline) -> JobPrediction | None:
    """The job with one request at a time."""
    knobs = replace(problem.knobs, n_seq_max=1)
    workload = replace(problem.workload, n_cells=None)
    single = _for_sequences(replace(problem, knobs=knobs, workload=workload), job, 1)
    placed = placed_best(single)
    if not placed.fits:
        return None
    speed = _speed(single, placed)
    return play_job(speed, placed.settings, job, speed.basis)


def _levers(
    problem: HfProblem,
    speed: HfSpeed,
    settings: TransformersSettings,
    job: JobOutline,
    predicted: JobPrediction,
) -> tuple[JobLever, ...]:
    """Levers that help, by what they give: each alone, everything else as planned."""
    found = [
        JobLever(what=what, seconds=play_job(then, settings, job, then.basis).seconds)
        for what, then in _changes(speed)
    ]
    found += _more_vram(problem, job)
    helpful = [it for it in found if it.seconds * LEAST_GAIN <= predicted.seconds]
    return tuple(sorted(helpful, key=lambda lever: lever.seconds))


def _changes(speed: HfSpeed) -> Iterator[tuple[str, HfSpeed]]:
    yield "without the time to launch operations", without_launching(speed)
    on_host = speed.stages[0].device == CPU
    what = "RAM and cores twice as fast" if on_host else "GPUs twice as fast"
    yield what, twice_as_fast(speed)
    if speed.stages[0].streamed_bytes:
        wide = replace(speed.stages[0], link_bytes_s=2 * speed.stages[0].link_bytes_s)
        yield "a link twice as fast", replace(speed, stages=(wide, *speed.stages[1:]))


def _more_vram(problem: HfProblem, job: JobOutline) -> Iterator[JobLever]:
    """Room for more sequences, where VRAM is what limits their number."""
    books, fixed = problem.books, problem.knobs.n_seq_max is not None
    on_gpu = [gpu.id for gpu in books.gpus if books.budget.cap(gpu.id)]
    if fixed or not on_gpu:
        return
    caps = {
        device: Bytes(size + (MORE_VRAM_BYTES if device in on_gpu else 0))
        for device, size in books.budget.caps.items()
    }
    larger = replace(books, budget=replace(books.budget, caps=caps))
    ranked = _ranked(replace(problem, books=larger), job)
    if ranked:
        best = ranked[0]
        speed = _speed(best.problem, best.placed)
        seconds = play_job(speed, best.placed.settings, job, speed.basis).seconds
        yield JobLever(what=f"8 GiB more VRAM: {best.n_seq_max} sequences", seconds=seconds)
