"""The plan of a job: from a file of requests, or what is left of one, to its placement and end."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadmaster.plan.batch import JobOutline, unshared, with_outputs
from loadmaster.plan.job_planning import JobPlan
from loadmaster.tasks.batch.outline import (
    CHARS_PER_TOKEN,
    DEFAULT_OUTPUT_TOKENS,
    FileOutline,
    read_outline,
)
from loadmaster.tasks.batch.vectors import plan_vectors
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanOptions, require_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """A file's outline, and the plan to run it under."""

    file: FileOutline
    job: JobPlan
    most_n_ctx: int | None = None  # of one request: what was asked for, or the model's own

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the figures."""
        hopeless = _too_long(self.file.job, self.most_n_ctx)
        return (*hopeless, *_file_notes(self.file), *self.job.plan.notes)


def plan_file(
    path: Path, model: str, options: PlanOptions, *, output_share: float = 1.0
) -> FilePlan:
    """Plan a file of requests. Answers count with `output_share` of the tokens they may take.

    Raises:
        PlanRefusedError: nothing fits.
        LoadmasterError: the model or the file cannot be read.
    """
    planner = Planner(model, options, header_only=True)
    file = read_outline(path, planner.request.model, planner.build, backend=planner.backend)
    job = with_outputs(file.job, output_share) if output_share != 1.0 else file.job
    most = planner.request.workload.n_ctx or planner.request.model.n_ctx_train or None
    return FilePlan(file=file, job=plan_outline(planner, job), most_n_ctx=most)


def plan_outline(planner: Planner, job: JobOutline) -> JobPlan:
    """The plan under which a job ends soonest.

    Raises:
        PlanRefusedError: nothing fits.
    """
    if not job.output_tokens:
        return plan_vectors(planner, unshared(job))
    outcome = planner.for_job(job).job_plan()
    if not isinstance(outcome, JobPlan):
        require_plan(outcome)
        raise AssertionError("a refusal is an error")
    return outcome


def _too_long(job: JobOutline, most_n_ctx: int | None) -> Iterator[str]:
    """Prompts that cannot be run, counted as if they could."""
    if most_n_ctx is None:
        return
    room = most_n_ctx - 1 if job.output_tokens else most_n_ctx
    lengths = [(it.prompt_tokens, it.count) for it in job.classes if it.prompt_tokens > room]
    if lengths:
        yield (
            f"{sum(count for _, count in lengths)} of {job.n_items} prompts are too long and will"
            f" fail: up to {max(lengths)[0]} tokens, n_ctx is {most_n_ctx}"
        )


def _file_notes(file: FileOutline) -> Iterator[str]:
    if file.n_sampled < file.n_lines:
        yield f"{file.n_sampled} of {file.n_lines} lines were tokenized and stand for the rest"
    if file.job.lengths == "characters":
        yield (
            f"no vocabulary at hand: {CHARS_PER_TOKEN} characters count as a token, and a chat"
            " without its template"
        )
    if file.n_unlimited:
        yield (
            f"{file.n_unlimited} of {file.n_sampled} requests name no `max_tokens`: "
            f"{DEFAULT_OUTPUT_TOKENS} are counted for each"
        )
    if file.n_bad:
        yield (
            f"{file.n_bad} of {file.n_sampled} lines cannot be run and are left out;"
            " `loadmaster batch run` lists them"
        )
    if file.job.output_tokens:
        yield (
            "answers count with all the tokens they may take: they end sooner, and so does the job;"
            " `--rehearse 10` of `batch run` measures it"
        )
