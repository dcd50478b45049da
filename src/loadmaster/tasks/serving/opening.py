"""Planning and opening one model of several: what the others hold is not there to plan with."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.machine.detect import detect_machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.types import CPU, DoesNotFit, Knobs, Plan
from loadmaster.tasks.confinement import require_workers
from loadmaster.tasks.locating import locate_model
from loadmaster.tasks.opening import Opened, open_planned
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanOptions, require_plan
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.serving.types import Offer
from loadmaster.tasks.vectors import for_vectors
from loadmaster.units import MIB, Bytes, format_size

Ledger = Mapping[str, Bytes]  # bytes per device

BACK_TIMEOUT_S = 10.0
# A driver gives memory back in granules, and other programs breathe meanwhile.
BACK_TOLERANCE_BYTES = 64 * MIB
_PARALLEL_STEPS = (4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What of the budget a model may have."""

    taken: Sequence[Ledger] = ()  # planned bytes of the models that stay open
    coming_back: Sequence[Ledger] = ()  # of those that would be closed first
    at_most: Ledger | None = None  # after an out-of-memory death: less than it had


class Prepared:
    """A model with a plan that fits; nothing is loaded yet."""

    def __init__(self, planner: Planner, plan: Plan, *, strict: bool = False) -> None:
        """With `strict`, `open` refuses a worker that is not confined by all that there is."""
        self.plan = plan
        self._planner = planner
        self._strict = strict

    def open(self, progress: Progress) -> Opened:
        """Load the model and prove the plan. Takes as long as it takes."""
        opened = open_planned(self._planner, self.plan, progress)
        try:
            if self._strict:
                require_workers(getattr(opened.session.engine, "confinements", ()))
        except BaseException:
            opened.close()
            raise
        return opened


class ModelOpener(Protocol):
    """What plans and opens models; it blocks, and is called off the event loop."""

    def prepare(self, offer: Offer, share: Share) -> Prepared:
        """Plan a model beside others; PlanRefusedError when it does not fit."""


class Opener:
    """Plans and opens models under one budget. Its methods block: call them off the event loop."""

    def __init__(
        self,
        options: PlanOptions,
        n_parallel: int | None,
        *,
        offers: Iterable[Offer] = (),
        strict: bool = False,
    ) -> None:
        """`n_parallel` None: four sequences, or as many as the plan allows. `offers`: all models
        that `options` are for."""
        self._options = options
        self._offers = offers
        self._n_parallel = n_parallel
        self._strict = strict
        self._total: Ledger | None = None  # the caps at the first plan, when nothing was open

    def prepare(self, offer: Offer, share: Share) -> Prepared:
        """Plan a model beside what is open.

        Raises:
            PlanRefusedError: it does not fit, and what is missing.
        """
        steps = (self._n_parallel,) if self._n_parallel else _PARALLEL_STEPS
        for n_parallel in steps:
            planner = self._planner(offer, n_parallel, share)
            outcome = planner.plan()
            if isinstance(outcome, Plan):
                return Prepared(planner, outcome, strict=self._strict)
        assert isinstance(outcome, DoesNotFit)
        return Prepared(planner, require_plan(outcome))

    def _planner(self, offer: Offer, n_parallel: int, share: Share) -> Planner:
        workload = replace(self._options.workload, kind="serve", n_seq_max=n_parallel)
        if offer.n_ctx is not None:
            workload = replace(workload, n_ctx=offer.n_ctx)
        options = options_for(offer, self._options, self._offers)
        options = replace(options, workload=workload, server=True)
        planner = Planner(offer.model, options)
        planner.require_build()
        pooling = planner.request.model.pooling or ("mean" if offer.embeds else None)
        if pooling is not None:
            planner.request = for_vectors(planner.request, pooling)
        now = planner.request.budget.caps
        if self._total is None:
            self._total = dict(now)
        caps = {device: self._cap(device, free, share) for device, free in now.items()}
        if any(caps[device] != now[device] for device in caps):
            reason = "less what other models hold" if share.taken else "less than before"
            planner.request = planner.request.with_caps(caps, reason)
        return planner

    def _cap(self, device: str, free_bytes: int, share: Share) -> Bytes:
        assert self._total is not None
        back = sum(ledger.get(device, 0) for ledger in share.coming_back)
        taken = sum(ledger.get(device, 0) for ledger in share.taken)
        cap = min(free_bytes + back, self._total.get(device, Bytes(0)) - taken)
        if share.at_most is not None and device in share.at_most:
            cap = min(cap, share.at_most[device])
        return Bytes(max(0, cap))


def options_for(offer: Offer, options: PlanOptions, offers: Iterable[Offer]) -> PlanOptions:
    """A server's `options` as they are for one of its models.

    Where `--quantize` is for another model, GGUF files and checkpoints that come quantized beside
    it stay as they are; where it is for none, each refuses it.
    """
    knobs = options.knobs
    wished = knobs.quantize is not None or knobs.double_quant is not None
    if not wished or _takes_quantize(offer, knobs) or not any(
        _takes_quantize(one, knobs) for one in offers
    ):  # fmt: skip
        return options
    return replace(options, knobs=replace(knobs, quantize=None, double_quant=None))


def _takes_quantize(offer: Offer, knobs: Knobs) -> bool:
    """Whether a model's weights can be quantized while they load."""
    with suppress(LoadmasterError):
        found = locate_model(offer.model, knobs.quantize).model
        return isinstance(found, CheckpointSpec) and found.stored is None
    return False


def ledger_of(plan: Plan) -> Ledger:
    """What a plan takes on each device."""
    return {device.id: device.planned_bytes for device in plan.devices}


def free_of_gpus() -> Ledger:
    """What every GPU has free now; empty where none says."""
    return {gpu.id: gpu.free_bytes for gpu in detect_machine().gpus if gpu.free_bytes is not None}


def close_and_confirm(
    opened: Opened,
    *,
    free: Callable[[], Ledger] = free_of_gpus,
    timeout_s: float = BACK_TIMEOUT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Ledger:
    """Stop a worker, and wait until the drivers have its memory back; what is still missing.

    The worker's RAM is back when its process is gone, which `close` waits for; a GPU's driver
    frees what a process held some time after its end. A worker that is dead already had that time.
    """
    alive = opened.session.engine.failure is None
    held = _held_on_gpus(opened.session.plan) if alive else {}
    before = free() if held else {}
    opened.close()
    deadline = time.monotonic() + timeout_s
    while held and (missing := _missing(held, before, free())):
        if time.monotonic() > deadline:
            return missing
        sleep(0.1)
    return {}


def _held_on_gpus(plan: Plan) -> Ledger:
    """The engine's buffers on GPUs; what the driver keeps beside them is no fixed figure."""
    held = {d.id: d.of("model", "kv", "recurrent", "compute") for d in plan.devices if d.id != CPU}
    return {device: size for device, size in held.items() if size > BACK_TOLERANCE_BYTES}


def _missing(held: Ledger, before: Ledger, now: Ledger) -> Ledger:
    short = {
        device: before[device] + size - BACK_TOLERANCE_BYTES - now[device]
        for device, size in held.items()
        if device in before and device in now
    }
    return {device: Bytes(size) for device, size in short.items() if size > 0}


def reduced(plan: Plan) -> Ledger:
    """The caps of the next plan after a worker ran out of memory: on each device a tenth less for
    the engine. What processes take is there whatever the plan is."""
    return {
        d.id: Bytes(d.needed_bytes - (d.needed_bytes - d.of("overhead")) // 10)
        for d in plan.devices
        if d.needed_bytes
    }


def smaller_text(plan: Plan) -> str:
    """What is told of the caps of the next plan."""
    sizes = ", ".join(f"{device} {format_size(size)}" for device, size in reduced(plan).items())
    return f"the next plan has a tenth less memory for the engine, at most {sizes}"


def check_parallel(n_parallel: int | None) -> None:
    """Refuse what no engine takes.

    Raises:
        UsageError: it is out of range.
    """
    if n_parallel is not None and not 1 <= n_parallel <= 256:
        raise UsageError(f"{n_parallel} sequences at a time", hint="`--parallel` takes 1 to 256")
