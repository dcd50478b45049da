"""Part 2 of the plan benchmark: the budget holds, and is used.

Plans for random-weight models under budgets drawn evenly between the smallest that works and
everything on the device, the workload fixed. Each is loaded for real on a stand-in GPU as large as
the budget, so that a byte too much is a refused allocation; then a full n_ubatch is prefilled and a
few tokens are decoded.

    over_budget           loads whose peak on the device was above the budget
    denied_allocations    loads in which the device refused an allocation
    optimum_share_*       model bytes on the device over the most that any placement gets there with
                          the plan's number of GPU layers (`optimum`), if that placement is the
                          faster one: with experts, more bytes can be fewer that are read
    turn_over_optimum_*   the plan's predicted time for a turn over that of the best of the fullest
                          placements with every number of GPU layers: what its choice of layers
                          costs
    bytes_only_share_*    model bytes over the most with any number of GPU layers: caches and their
                          attention go to the host for a few more matrices
    bytes_only_turn_*     a turn's predicted time with that placement over the plan's own
"""

import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.optimum import DEVICE, Optimiser
from benchmarks.accuracy.random_models import SMALL
from benchmarks.accuracy.stand_in import (
    SizingEngine,
    buffer_error_bytes,
    counter_error_bytes,
    devices_of,
    plan_with,
    stand_in_machine,
    try_plan,
)
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import EngineRefusedError
from loadmaster.machine.types import Machine
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.forecast import forecast
from loadmaster.plan.speed import turn_s
from loadmaster.plan.types import EngineSettings, Knobs, Plan, Workload

SEED = 20261002
WORKLOADS_PER_MODEL = 2
BUDGETS_PER_WORKLOAD = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model under one workload, for many budgets."""

    path: Path
    n_ctx: int
    kv_type: str
    n_ubatch: int
    n_budgets: int

    @property
    def workload(self) -> Workload:
        return Workload(n_ctx=self.n_ctx)

    @property
    def knobs(self) -> Knobs:
        return Knobs(type_k=self.kv_type, type_v=self.kv_type, n_ubatch=self.n_ubatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One budget; bytes on the device, planned and at most."""

    name: str
    budget_bytes: int
    n_gpu_layers: int
    model_bytes: int
    most_bytes: int  # with the plan's number of GPU layers, if that is faster
    most_any_bytes: int  # with any
    turn_ratio: float  # the plan's time for a turn, over that of the best placement
    any_turn_ratio: float  # a turn's time with the most bytes of all, over the plan's
    open_bounds: int  # searches for an optimum that ended before their bound met it
    beaten: bool  # the plan has more than the search found: a fault of the search
    over_budget: bool
    denied: bool
    error_bytes: int


def run(build: EngineBuild, *, n_processes: int = 2) -> dict[str, object]:
    """All plans, loads and optima; the figures of this part."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = list(_jobs(Path(folder)))
        with ProcessPoolExecutor(n_processes) as pool:
            results = [r for rows in pool.map(run_job, [build] * len(jobs), jobs) for r in rows]
    return _figures(results)


def _jobs(folder: Path) -> Iterator[Job]:
    for model in SMALL:
        dice = random.Random(f"{SEED} {model.name}")
        path = model.write(folder)
        for _ in range(WORKLOADS_PER_MODEL):
            yield Job(
                path=path,
                n_ctx=dice.choice((512, 1024, 2048)),
                kv_type="f16" if "deepseek" in model.name else dice.choice(("f16", "q8_0")),
                n_ubatch=dice.choice((64, 128, 256, 512)),
                n_budgets=BUDGETS_PER_WORKLOAD,
            )


def run_job(build: EngineBuild, job: Job) -> list[Result]:
    """Every budget of one job, in this process."""
    model = read_model(job.path)
    dice = random.Random(f"{SEED} {job}".replace(str(job.path.parent), ""))
    with SizingEngine(build, 1) as sizing:
        settings = _workload_settings(sizing, model, job)
        optimiser = Optimiser(model, settings, lambda wanted: sizing.size(model.path, wanted))
        least, most = optimiser.smallest_bytes(), optimiser.everything_bytes()
        budgets = [dice.randint(least, most) for _ in range(job.n_budgets)]
        return [_one(build, sizing, optimiser, model, job, budget) for budget in budgets]


def _workload_settings(sizing: SizingEngine, model: ModelSpec, job: Job) -> EngineSettings:
    """The engine settings of the workload, as a plan with all the room has them."""
    plan = plan_with(sizing, stand_in_machine([64 << 30]), model, job.workload, job.knobs)
    assert isinstance(plan, Plan)
    return plan.llamacpp


def _one(
    build: EngineBuild,
    sizing: SizingEngine,
    optimiser: Optimiser,
    model: ModelSpec,
    job: Job,
    budget: int,
) -> Result:
    machine = stand_in_machine([budget])
    plan = plan_with(sizing, machine, model, job.workload, job.knobs)
    assert isinstance(plan, Plan), f"{job} does not fit in {budget}"
    used = next((device for device in plan.devices if device.id == DEVICE), None)
    model_bytes = used.of("model") if used else 0
    optima = [optimiser.most(budget, [count]) for count in range(model.n_layer + 2)]
    own_s = _turn_s(machine, model, plan.llamacpp, job)
    fastest_s = min(
        _turn_s(machine, model, one.settings, job) for one in optima if one.settings is not None
    )
    same = optima[plan.llamacpp.n_gpu_layers]
    same_s = _turn_s(machine, model, same.settings or plan.llamacpp, job)
    most = max(optima, key=lambda one: one.best_bytes)
    peak, denied, error = 0, False, 0
    try:
        trial = try_plan(build, plan, devices_of(machine))
        peak = trial.decoded.device_peak_bytes.get(DEVICE) or 0
        denied = any(trial.decoded.device_denied.values())
        error = buffer_error_bytes(plan, trial.decoded) + counter_error_bytes(trial.decoded)
    except EngineRefusedError:
        denied = True
    return Result(
        name=job.path.stem,
        budget_bytes=budget,
        n_gpu_layers=plan.llamacpp.n_gpu_layers,
        model_bytes=model_bytes,
        most_bytes=max(same.best_bytes if same_s < own_s else 0, model_bytes),
        most_any_bytes=max(most.best_bytes, model_bytes),
        turn_ratio=own_s / min(own_s, fastest_s),
        any_turn_ratio=_turn_s(machine, model, most.settings or plan.llamacpp, job) / own_s,
        open_bounds=sum(one.best_bytes < one.bound_bytes for one in (same, most)),
        beaten=same.best_bytes < model_bytes,
        over_budget=peak > budget,
        denied=denied,
        error_bytes=error,
    )


def _turn_s(machine: Machine, model: ModelSpec, settings: EngineSettings, job: Job) -> float:
    """What the planner minimises, worked out from the settings tensor by tensor."""
    found = forecast(machine, model, settings)
    return turn_s(found.traffic, found.rates, settings, job.workload)


def _figures(results: Sequence[Result]) -> dict[str, object]:
    return {
        "budget_plans": len(results),
        "over_budget": sum(r.over_budget for r in results),
        "denied_allocations": sum(r.denied for r in results),
        "budget_error_bytes": sum(r.error_bytes for r in results),
        **_share("optimum_share", [(r.model_bytes, r.most_bytes) for r in results]),
        "turn_over_optimum_p50": round(statistics.median(r.turn_ratio for r in results), 4),
        "turn_over_optimum_max": round(max(r.turn_ratio for r in results), 4),
        **_share("bytes_only_share", [(r.model_bytes, r.most_any_bytes) for r in results]),
        "bytes_only_turn_p50": round(statistics.median(r.any_turn_ratio for r in results), 3),
        "bytes_only_turn_min": round(min(r.any_turn_ratio for r in results), 3),
        "bytes_only_turn_max": round(max(r.any_turn_ratio for r in results), 3),
        "optimum_open_bounds": sum(r.open_bounds for r in results),
        "optimum_beaten": sum(r.beaten for r in results),
    }


def _share(name: str, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Percentages. Where nothing can be placed, nothing is missing."""
    shares = [100 * got / most if most else 100.0 for got, most in pairs]
    return {
        f"{name}_p50_pct": round(statistics.median(shares), 2),
        f"{name}_min_pct": round(min(shares), 2),
    }
