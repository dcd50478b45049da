"""The plan for a job: how many sequences, with how many cells, where, so that it ends soonest.

Candidates are compared by playing the job (`simulate`) on estimated placements, which asks the
engine nothing; the few that come out first are placed and sized like any other plan, and played
again. Beside the plan stands the same job one request at a time, under the plan for `chat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.job_candidates import Candidate, for_sequences, ranked_candidates
from loadmaster.plan.job_levers import JobLever, job_levers
from loadmaster.plan.planner import plan_of, refusal_of
from loadmaster.plan.problem import (
    Failure,
    Outcome,
    Problem,
    Search,
    Solution,
    make_problem,
    rates_under,
)
from loadmaster.plan.search import search, solve
from loadmaster.plan.simulate import JobPrediction, simulate
from loadmaster.plan.types import (
    AnySettings,
    Budget,
    DoesNotFit,
    Knobs,
    Overheads,
    Plan,
    Sizes,
    Workload,
)

# Candidates that the engine is asked about.
_SIZED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """A plan for a job, what it comes to, and what one request at a time would take."""

    plan: Plan
    job: JobOutline
    predicted: JobPrediction
    alone: JobPrediction | None  # None: no plan for one sequence fits
    levers: tuple[JobLever, ...]
    considered: tuple["Considered", ...]

    @property
    def speedup(self) -> float | None:
        """How many times as fast as one request at a time."""
        return self.alone.seconds / self.predicted.seconds if self.alone else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A candidate and the time it was estimated to take, before the engine was asked."""

    n_seq_max: int
    n_ctx: int
    kv_unified: bool
    type_k: str
    n_ubatch: int
    seconds: float


def job_planning(
    machine: Machine,
    model: ModelSpec,
    job: JobOutline,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
    sizes: Sizes | None,
    *,
    stamp: str = "",
) -> Search[JobPlan | DoesNotFit]:
    """Plan a job, as a generator that asks for sizes like `planner.planning`.

    `knobs.n_seq_max` and `workload.n_cells` fix the numbers of sequences and cells.
    """
    workload = replace(workload, kind="batch")
    problem = make_problem(machine, model, workload, budget, knobs, overheads, sizes)
    ranked = ranked_candidates(problem, job)
    best: tuple[Solution, JobPrediction, Problem] | None = None
    for _, candidate in ranked[:_SIZED]:
        outcome = yield from solve(candidate.problem, candidate.choice)
        best = _better(best, outcome, candidate.problem, job)
    if best is None:
        outcome, asked = yield from _fallback(problem, job, [it for _, it in ranked[_SIZED:]])
        if isinstance(outcome, Failure):
            return refusal_of(asked, outcome, ())
        best = outcome, _play(asked, outcome, job), asked
    solution, predicted, asked = best
    alone = yield from _alone(problem, job)
    return JobPlan(
        plan=_described(plan_of(asked, solution, (), stamp), predicted),
        job=job,
        predicted=predicted,
        alone=alone,
        levers=job_levers(
            solution.traffic,
            rates_under(asked, solution.settings),
            solution.settings,
            job,
            predicted.seconds,
        ),
        considered=tuple(considered(seconds, it.base) for seconds, it in ranked),
    )


def _better(
    best: tuple[Solution, JobPrediction, Problem] | None,
    outcome: Outcome,
    problem: Problem,
    job: JobOutline,
) -> tuple[Solution, JobPrediction, Problem] | None:
    if isinstance(outcome, Failure):
        return best
    predicted = _play(problem, outcome, job)
    if best is None or predicted.seconds < best[1].seconds:
        return outcome, predicted, problem
    return best


def _play(problem: Problem, solution: Solution, job: JobOutline) -> JobPrediction:
    rates = rates_under(problem, solution.settings)
    return simulate(solution.traffic, rates, solution.settings, job)


def _fallback(
    problem: Problem, job: JobOutline, candidates: Sequence[Candidate]
) -> Search[tuple[Outcome, Problem]]:
    """The first of the other candidates that fits, ever smaller ones at the end."""
    for candidate in candidates:
        outcome = yield from solve(candidate.problem, candidate.choice)
        if isinstance(outcome, Solution):
            return outcome, candidate.problem
    smallest = for_sequences(problem, job, problem.knobs.n_seq_max or 1)
    return (yield from search(smallest)), smallest


def _alone(problem: Problem, job: JobOutline) -> Search[JobPrediction | None]:
    """The job with one request at a time, under the plan that `chat` would get."""
    single = replace(for_sequences(problem, job, 1).workload, kind="chat", n_cells=None)
    single_problem = replace(problem, workload=single)
    outcome = yield from search(single_problem)
    return None if isinstance(outcome, Failure) else _play(single_problem, outcome, job)


def _described(plan: Plan, predicted: JobPrediction) -> Plan:
    speed = replace(plan.predicted, jobs_per_hour=predicted.items_per_hour)
    return replace(plan, predicted=speed)


def considered(seconds: float, settings: AnySettings) -> Considered:
    """A candidate as it is told of."""
    return Considered(
        n_seq_max=settings.n_seq_max,
        n_ctx=settings.n_ctx,
        kv_unified=settings.kv_unified,
        type_k=settings.type_k,
        n_ubatch=settings.n_ubatch,
        seconds=seconds,
    )
