"""From a model, a machine and a budget to a plan: the thin driver around the pure planner."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from loadmaster.errors import DoesNotFitError, NotFoundError, Number, UsageError
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.model.stamp import model_stamp
from loadmaster.model.types import LayerKind, ModelSpec
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.checks import checked_knobs
from loadmaster.plan.hf_jobs import plan_checkpoint_job
from loadmaster.plan.hf_planner import plan_checkpoint
from loadmaster.plan.job_planning import JobPlan, job_planning
from loadmaster.plan.planner import planning
from loadmaster.plan.problem import Search
from loadmaster.plan.types import (
    Adapter,
    AnySettings,
    Budget,
    DoesNotFit,
    EngineSettings,
    Knobs,
    Overheads,
    Plan,
    Shortfall,
    Sizing,
    SizingFailure,
    TransformersSettings,
    Workload,
)
from loadmaster.units import Bytes, format_size

DEMO = "demo"
_SHORT_DEVICES = 2  # that a refusal names in its first line; its table has all
Outcome = TypeVar("Outcome")


class Sizes(Protocol):
    """What sizes settings: the engine in a child process, or a table in a test."""

    def sizes(
        self, model: ModelSpec, settings: Iterable[EngineSettings]
    ) -> Mapping[EngineSettings, Sizing | SizingFailure]:
        """The buffers of each of these settings."""


class PlanRefusedError(DoesNotFitError):
    """No plan keeps the model inside the budget; `outcome` has the ledger of the smallest one."""

    def __init__(self, message: str, *, outcome: DoesNotFit, hint: str | None) -> None:
        numbers: dict[str, Number] = {
            f"shortfall_bytes.{s.device}": s.bytes for s in outcome.shortfalls
        }
        super().__init__(message, hint=hint, numbers=numbers)
        self.outcome = outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user said about placement, as typed where another layer parses it."""

    vram: str | None = None
    ram: str | None = None
    machine: str | None = None  # a profile's name or file; None: this machine
    backend: str = "llamacpp"
    workload: Workload = field(default_factory=Workload)
    knobs: Knobs = field(default_factory=Knobs)
    adapters: tuple[tuple[str, float], ...] = ()  # LoRA file and scale
    draft: str | None = None  # a model that guesses; `knobs.n_draft` alone looks guesses up
    # The command reads lines from a terminal: not of the placement, but of the RAM it takes.
    line_editor: bool = field(default=False, compare=False)
    server: bool = field(default=False, compare=False)  # likewise: the command serves HTTP
    schemas: bool = field(default=False, compare=False)  # likewise: a request has a JSON schema
    # The fake backend's, for tests: speed, load time, faults.
    backend_options: Mapping[str, object] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything a plan depends on; kept to plan again with other figures."""

    model: AnyModel
    machine: Machine
    workload: Workload
    budget: Budget
    knobs: Knobs
    overheads: Overheads
    job: JobOutline | None = None  # plan for it, its sequences and cells included

    @property
    def gguf(self) -> ModelSpec:
        """The model of a request that only llama.cpp serves.

        Raises:
            UsageError: it is a safetensors checkpoint.
        """
        if isinstance(self.model, CheckpointSpec):
            raise UsageError(
                f"`{self.model.name}` is a safetensors checkpoint: this is planned for GGUF alone",
                hint="a GGUF of the model has it",
            )
        return self.model

    def with_caps(self, caps: Mapping[str, Bytes], reason: str) -> "PlanRequest":
        """The same request under smaller caps; `reason` is appended to their origin."""
        merged = {**self.budget.caps, **caps}
        origin = {
            device: f"{text}, {reason}" if device in caps else text
            for device, text in self.budget.origin.items()
        }
        return replace(self, budget=Budget(caps=merged, origin=origin))


def demo_model() -> Path:
    """The model that ships with the package."""
    return Path(__file__).parents[1] / "data" / "demo.gguf"


def model_path(name: str) -> Path:
    """The file of a MODEL argument.

    Raises:
        NotFoundError: there is no such file.
    """
    if name == DEMO and not Path(DEMO).exists():
        return demo_model()
    path = Path(name).expanduser()
    if not path.exists():
        raise NotFoundError(
            f"`{name}` is not there",
            hint="give a GGUF file or a folder of safetensors, or `demo` for the packaged model",
        )
    return path


def read_adapter(path: str, scale: float) -> Adapter:
    """A LoRA file; all of it counts as its size in memory, its header included.

    Raises:
        NotFoundError: there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise NotFoundError(f"the adapter `{path}` is not there")
    return Adapter(path=str(file.resolve()), scale=scale, size_bytes=Bytes(file.stat().st_size))


def plan_model(
    request: PlanRequest, sizer: Sizes | None, *, alternatives: bool = True
) -> Plan | DoesNotFit:
    """Ask the planner; where it needs the engine's figures, ask the engine, and again.

    Without a sizer (no engine is built) compute buffers are bounds, and the plan says so.
    `alternatives` false leaves the neighbouring plans out, which take most of the time.

    Raises:
        UsageError: the request contradicts the model.
    """
    if request.job is not None:
        outcome = plan_job(request, sizer)
        return outcome.plan if isinstance(outcome, JobPlan) else outcome
    if isinstance(request.model, CheckpointSpec):
        return _plan_checkpoint(request, request.model, alternatives=alternatives)
    knobs, sizes = _knobs(request), _no_sizes(sizer)
    steps = planning(
        request.machine, request.gguf, request.workload, request.budget, knobs,
        request.overheads, sizes, stamp=model_stamp(request.model), alternatives=alternatives,
    )  # fmt: skip
    return _answered(steps, request.gguf, sizer, sizes)


def _plan_checkpoint(
    request: PlanRequest, model: CheckpointSpec, *, alternatives: bool
) -> Plan | DoesNotFit:
    """For transformers: its sizes are all known from the headers, no engine is asked."""
    outcome = plan_checkpoint(
        request.machine, model, request.workload, request.budget, request.knobs,
        request.overheads, stamp=model_stamp(model), alternatives=alternatives,
    )  # fmt: skip
    _check_window(outcome.engine, model)
    return outcome


def plan_job(request: PlanRequest, sizer: Sizes | None) -> JobPlan | DoesNotFit:
    """The same for `request.job`: how many sequences and cells it is to be run with, and where.

    Raises:
        UsageError: the request contradicts the model.
    """
    assert request.job is not None
    if isinstance(request.model, CheckpointSpec):
        return plan_checkpoint_job(
            request.machine, request.model, request.job, request.workload, request.budget,
            request.knobs, request.overheads, stamp=model_stamp(request.model),
        )  # fmt: skip
    knobs, sizes = _knobs(request), _no_sizes(sizer)
    steps = job_planning(
        request.machine, request.gguf, request.job, request.workload, request.budget, knobs,
        request.overheads, sizes, stamp=model_stamp(request.model),
    )  # fmt: skip
    return _answered(steps, request.gguf, sizer, sizes)


def _knobs(request: PlanRequest) -> Knobs:
    return checked_knobs(request.machine, request.gguf, request.workload, request.knobs)


def _check_window(settings: AnySettings, model: CheckpointSpec) -> None:
    """A cache of a window's cells alone: new tokens take the places of those that a cut needs."""
    n_ctx, window = settings.n_ctx // settings.n_seq_max, model.n_swa
    windowed = any(layer.kind is LayerKind.SWA for layer in model.layers)
    if settings.n_draft and windowed and window < n_ctx:
        raise UsageError(
            f"`{model.name}` keeps the last {window} tokens of some layers alone: what a step fed "
            "cannot be taken back, and drafts need that",
            hint=f"leave `--draft` out, or take `--ctx {window}`",
        )


_Sizings = dict[EngineSettings, Sizing | SizingFailure]


def _no_sizes(sizer: Sizes | None) -> _Sizings | None:
    return None if sizer is None else {}


def _answered(
    steps: Search[Outcome], model: ModelSpec, sizer: Sizes | None, sizes: _Sizings | None
) -> Outcome:
    """Ask the engine whatever the planner asks, to its end."""
    try:
        while True:
            wanted = next(steps)
            assert sizer is not None
            assert sizes is not None
            sizes.update(sizer.sizes(model, wanted.settings))
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


def require_plan(outcome: Plan | DoesNotFit) -> Plan:
    """The plan, or its refusal as an error.

    Raises:
        PlanRefusedError: nothing fits.
    """
    if isinstance(outcome, Plan):
        return outcome
    message = (
        f"`{outcome.model_name}` does not fit at n_ctx {outcome.engine.n_ctx}: "
        f"{_short_of(outcome.shortfalls)}"
    )
    flags = [" ".join(a.flags) for a in outcome.nearest]
    hint = f"{', '.join(f'`{flag}`' for flag in flags)} would fit" if flags else None
    if hint is None and isinstance(outcome.engine, TransformersSettings):
        hint = (
            "nothing is left on the disk, where every token would read it again: take fewer bits "
            "(`--quantize nf4`), a GGUF, or a machine with more memory"
        )
    raise PlanRefusedError(message, outcome=outcome, hint=hint)


def _short_of(shortfalls: Sequence[Shortfall]) -> str:
    """What is missing, on one line: of many devices the worst one and a count of the others."""
    if len(shortfalls) <= _SHORT_DEVICES:
        return " and ".join(map(_short_on, shortfalls))
    worst = max(shortfalls, key=lambda one: one.bytes)
    return f"{_short_on(worst)}, and {len(shortfalls) - 1} more devices have too little"


def _short_on(short: Shortfall) -> str:
    place = "RAM" if short.device == "cpu" else f"VRAM of {short.device}"
    need, budget = format_size(short.need_bytes), format_size(short.budget_bytes)
    if need == budget:  # they differ by less than is shown of them
        need, budget = f"{short.need_bytes:,} bytes", f"{short.budget_bytes:,}"
    return f"needs {need} of the {place}, the budget is {budget}"
