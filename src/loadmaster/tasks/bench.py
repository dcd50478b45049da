"""`bench`: prefill, decode and many sequences under the plan, measured beside predicted."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loadmaster.engine.process import Engine
from loadmaster.engine.timing import TimeSteps
from loadmaster.engine.types import LoadRequest
from loadmaster.errors import UsageError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.forecast import forecast
from loadmaster.plan.hf_speed import speed_of
from loadmaster.plan.types import EngineSettings, Plan, TransformersSettings
from loadmaster.tasks.planner import FAKE, Planner, virtual_devices
from loadmaster.tasks.planning import PlanOptions, require_plan
from loadmaster.tasks.progress import Progress

PROMPT_TOKENS = 512
DEFAULT_POSITIONS = (0, 512, 1024)
DEFAULT_SEQUENCES = (4,)
MANY_DEPTH = 128  # cells of each of many sequences
N_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One figure: tokens per second of all sequences together."""

    phase: str  # `prefill` or `decode`
    n_sequences: int
    depth: int  # cells in use when it begins
    measured_tok_s: float
    predicted_tok_s: float | None

    @property
    def error_pct(self) -> float | None:
        """How far the prediction is off, in per cent of what was measured."""
        if self.predicted_tok_s is None:
            return None
        return 100 * (self.predicted_tok_s - self.measured_tok_s) / self.measured_tok_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What came out, and the plan it was run under."""

    plan: Plan
    rows: tuple[BenchRow, ...]


def bench_model(
    model: str,
    options: PlanOptions,
    progress: Progress,
    *,
    positions: Sequence[int] = DEFAULT_POSITIONS,
    sequences: Sequence[int] = DEFAULT_SEQUENCES,
) -> Bench:
    """Measure one sequence at several depths, then several sequences at once.

    Raises:
        PlanRefusedError: the model does not fit.
        UsageError: positions beyond n_ctx, or no sequence at all.
    """
    if any(position < 0 for position in positions) or any(count < 1 for count in sequences):
        raise UsageError("positions begin at 0 and sequences at 1")
    plan, rows = _one(model, options, progress, sorted(set(positions)))
    many = sorted({count for count in sequences if count > 1})
    for count in many:
        rows += _many(model, options, progress, count)
    return Bench(plan=plan, rows=tuple(rows))


def _one(
    model: str, options: PlanOptions, progress: Progress, positions: Sequence[int]
) -> tuple[Plan, list[BenchRow]]:
    deepest = max((*positions, PROMPT_TOKENS))
    planner = Planner(model, options)
    if options.workload.n_ctx is None:
        trained = planner.request.model.n_ctx_train or deepest + N_STEPS
        n_ctx = min(trained, deepest + N_STEPS)
        options = replace(options, workload=replace(options.workload, n_ctx=n_ctx))
        planner = Planner(model, options)
    plan = require_plan(planner.plan())
    if deepest + N_STEPS > plan.engine.n_ctx:
        raise UsageError(
            f"position {deepest} and {N_STEPS} steps are beyond n_ctx {plan.engine.n_ctx}",
            hint="lower `--positions`, or raise `--ctx`",
        )
    expected = _forecast(planner, plan)
    with _open(planner, plan) as engine:
        rows = list(time_one(engine, plan, expected, positions, progress))
    return plan, rows


def _many(model: str, options: PlanOptions, progress: Progress, count: int) -> list[BenchRow]:
    workload = replace(options.workload, n_seq_max=count, n_ctx=2 * MANY_DEPTH)
    planner = Planner(model, replace(options, workload=workload))
    plan = require_plan(planner.plan())
    expected = _forecast(planner, plan)
    progress.say(f"{count} sequences at once")
    with _open(planner, plan) as engine:
        return [time_many(engine, expected, count)]


class Expected(Protocol):
    """What either engine's model of speed says of a plan."""

    def decode_s(self, depth: float, n_sequences: int = 1) -> float:
        """Seconds of a decode step of so many sequences, each with `depth` cells."""

    def prefill_s(self, tokens: int) -> float:
        """Seconds for a prompt."""


def _forecast(planner: Planner, plan: Plan) -> Expected | None:
    """None where no bandwidth is known."""
    machine, model = planner.request.machine, planner.request.model
    if isinstance(model, CheckpointSpec):
        assert isinstance(plan.engine, TransformersSettings)
        speed = speed_of(machine, model, plan.engine)
        return None if speed.basis == "unknown" else speed
    found = forecast(machine, model, plan.llamacpp)
    return None if found.rates.basis == "unknown" else found


def _open(planner: Planner, plan: Plan) -> Engine:
    fake = planner.options.backend == FAKE
    settings = plan.engine
    engine = Engine.start(
        planner.require_build(),
        devices=virtual_devices(planner.request.machine) if fake else (),
        backend=planner.backend,
        min_batch=settings.op_offload_min_batch if isinstance(settings, EngineSettings) else None,
    )
    try:
        load_plan(engine, plan)
    except BaseException:
        engine.close()
        raise
    return engine


def load_plan(engine: Engine, plan: Plan) -> None:
    """Open the plan's model in a worker that was started for it."""
    request = LoadRequest(
        model_path=Path(plan.model_files[0]),
        model_stamp=plan.model_stamp,
        settings=plan.engine,
        ram_cap_bytes=None,
    )
    engine.load(request, files=tuple(map(Path, plan.model_files)))


def time_one(
    engine: Engine,
    plan: Plan,
    expected: Expected | None,
    positions: Iterable[int],
    progress: Progress,
) -> Iterator[BenchRow]:
    """A prompt's chunks, then decode steps at each position."""
    prompt = min(PROMPT_TOKENS, plan.engine.n_ctx - N_STEPS)
    progress.say(f"prefill of {prompt} tokens")
    _seconds(engine, prompt, 1)  # the first prompt of a model touches its memory
    chunks = min(
        (_seconds(engine, prompt, 1)[:-N_STEPS] for _ in range(2)), key=lambda found: sum(found)
    )
    yield _row(
        "prefill",
        1,
        0,
        prompt / sum(chunks),
        prompt / expected.prefill_s(prompt) if expected else None,
    )
    for position in positions:
        progress.say(f"decode at position {position}")
        steps = _seconds(engine, position, 1)[-N_STEPS:]
        middle = position + N_STEPS / 2
        yield _row(
            "decode", 1, position, 1 / statistics.median(steps),
            1 / expected.decode_s(middle) if expected else None,
        )  # fmt: skip


def time_many(engine: Engine, expected: Expected | None, count: int) -> BenchRow:
    """Decode steps of several sequences at once, all as deep."""
    steps = _seconds(engine, MANY_DEPTH, count)[-N_STEPS:]
    middle = MANY_DEPTH + N_STEPS / 2
    return _row(
        "decode", count, MANY_DEPTH, count / statistics.median(steps),
        count / expected.decode_s(middle, count) if expected else None,
    )  # fmt: skip


def _seconds(engine: Engine, depth: int, count: int) -> tuple[float, ...]:
    found = engine.time(TimeSteps(depth=depth, n_sequences=count, n_steps=N_STEPS))
    assert found is not None
    return found


def _row(phase: str, count: int, depth: int, measured: float, predicted: float | None) -> BenchRow:
    return BenchRow(
        phase=phase,
        n_sequences=count,
        depth=depth,
        measured_tok_s=measured,
        predicted_tok_s=predicted,
    )
