"""The planner's front: machine + model + workload + budget in, a plan or a refusal out."""

from dataclasses import replace

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec
from loadmaster.plan.explain import notes_of, solve_variations, variations_of
from loadmaster.plan.ledger import with_states
from loadmaster.plan.levers import levers_of
from loadmaster.plan.objective import request_s
from loadmaster.plan.problem import (
    Failure,
    Problem,
    Search,
    Solution,
    checked_devices,
    make_problem,
    rates_under,
)
from loadmaster.plan.search import refined, search
from loadmaster.plan.speed import predict
from loadmaster.plan.types import (
    Alternative,
    Budget,
    DoesNotFit,
    Knobs,
    NeedSizes,
    Overheads,
    Plan,
    Prediction,
    Shortfall,
    Sizes,
    Workload,
)


def make_plan(
    machine: Machine,
    model: ModelSpec,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
    sizes: Sizes | None,
    *,
    stamp: str = "",
    alternatives: bool = True,
) -> Plan | DoesNotFit | NeedSizes:
    """Plan a model: the fastest placement inside the budget, or why there is none.

    Pure: equal arguments give equal plans. `sizes` holds what the engine said so far; a missing
    figure is asked for by `NeedSizes`. With `sizes` None compute buffers are conservative bounds.
    `stamp` identifies the model's files and is copied into the plan.
    """
    steps = planning(
        machine, model, workload, budget, knobs, overheads, sizes,
        stamp=stamp, alternatives=alternatives,
    )  # fmt: skip
    try:
        return next(steps)
    except StopIteration as done:
        outcome: Plan | DoesNotFit = done.value
        return outcome


def planning(
    machine: Machine,
    model: ModelSpec,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
    sizes: Sizes | None,
    *,
    stamp: str = "",
    alternatives: bool = True,
) -> Search[Plan | DoesNotFit]:
    """`make_plan` as a generator, for a caller that answers its questions one after another.

    It yields `NeedSizes`; put the figures into `sizes` (the same mapping) and go on with `next`.
    """
    problem = make_problem(machine, model, workload, budget, knobs, overheads, sizes)
    outcome = yield from search(problem)
    if isinstance(outcome, Solution):
        outcome = yield from refined(problem, outcome)
    nearby: tuple[Alternative, ...] = ()
    if alternatives:
        nearby = yield from solve_variations(problem, outcome, variations_of(problem, outcome))
    if isinstance(outcome, Failure):
        return refusal_of(problem, outcome, nearby)
    return plan_of(problem, outcome, nearby, stamp)


def plan_of(
    problem: Problem, solution: Solution, alternatives: tuple[Alternative, ...], stamp: str
) -> Plan:
    """The plan of a placement that fits."""
    model, settings = problem.model, solution.settings
    workload = problem.workload
    if workload.n_cells is None:
        workload = replace(workload, n_ctx=settings.n_ctx // settings.n_seq_max)
    return Plan(
        model_name=model.name,
        architecture=model.architecture,
        quantization=model.quantization,
        model_files=tuple(str(file.path) for file in model.files),
        model_stamp=stamp,
        file_bytes=model.file_bytes,
        n_layer=model.n_layer,
        machine_name=problem.machine.name,
        workload=workload,
        engine=settings,
        devices=with_states(checked_devices(problem, settings), settings),
        predicted=_predicted(problem, solution, workload),
        notes=tuple(notes_of(problem, solution)),
        alternatives=alternatives,
    )


def _predicted(problem: Problem, solution: Solution, workload: Workload) -> Prediction:
    """Speed, load time and levers of the plan."""
    rates = rates_under(problem, solution.settings)
    found = predict(solution.traffic, rates, solution.settings, workload)
    if workload.kind == "batch" and rates.basis != "unknown":
        seconds = request_s(solution.traffic, rates, solution.settings, workload)
        found = replace(found, jobs_per_hour=3600 / seconds)
    measured = problem.machine.measured
    disk = measured.disk_read_bytes_s if measured else None
    return replace(
        found,
        load_s=problem.model.file_bytes / disk if disk else None,
        levers=levers_of(solution.traffic, rates, solution.settings, workload),
    )


def refusal_of(problem: Problem, failure: Failure, nearest: tuple[Alternative, ...]) -> DoesNotFit:
    """What is missing for the placement that came closest."""
    shortfalls = tuple(
        Shortfall(
            device=device.id, budget_bytes=device.budget_bytes, need_bytes=device.planned_bytes
        )
        for device in failure.devices
        if device.left_bytes < 0
    )
    return DoesNotFit(
        model_name=problem.model.name,
        workload=problem.workload,
        engine=failure.settings,
        devices=checked_devices(problem, failure.settings),
        shortfalls=shortfalls,
        nearest=nearest,
        reason=failure.reason,
    )
