"""What one planning call knows, and what a placement comes to: its ledger and its cost.

Pure. What only the engine knows (compute buffers, exotic caches) is looked up in `Problem.sizes`; a
search is a generator that yields `NeedSizes` when a figure is missing, and goes on once the caller
has put it there.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec
from loadmaster.plan.choices import Choice, pinned_overrides
from loadmaster.plan.layout import opened_gpus
from loadmaster.plan.ledger import Books, device_plans, sizing_key
from loadmaster.plan.objective import cost_s
from loadmaster.plan.parts import Parts
from loadmaster.plan.placement import Placement
from loadmaster.plan.rates import Rates, rates_of
from loadmaster.plan.speed import Reads, Traffic
from loadmaster.plan.types import (
    CPU,
    Budget,
    DevicePlan,
    EngineSettings,
    Knobs,
    NeedSizes,
    Overheads,
    Sizes,
    Sizing,
    SizingFailure,
    Workload,
)
from loadmaster.plan.weights import LayerWidth, WeightMix, layer_widths, weight_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything that one planning call knows."""

    books: Books
    machine: Machine
    workload: Workload
    knobs: Knobs
    sizes: Sizes | None  # None: there is no engine to ask, compute buffers are bounded
    mix: WeightMix
    widths: tuple[LayerWidth, ...]  # of attention, for each layer
    rates: Rates

    @property
    def model(self) -> ModelSpec:
        return self.books.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A placement that fits, with its ledger and its cost."""

    choice: Choice
    placement: Placement
    settings: EngineSettings
    devices: tuple[DevicePlan, ...]
    traffic: Traffic
    turn_s: float  # of a request, where the workload is `batch`


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The placement that came closest, with the ledger that breaks the budget."""

    settings: EngineSettings
    devices: tuple[DevicePlan, ...]
    reason: str | None = None  # the engine's own words, when it refused to size

    @property
    def overflow_bytes(self) -> int:
        return sum(max(0, -device.left_bytes) for device in self.devices)


Outcome = Solution | Failure
T = TypeVar("T")
Search = Generator[NeedSizes, None, T]


def make_problem(
    machine: Machine,
    model: ModelSpec,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
    sizes: Sizes | None,
) -> Problem:
    """Gather a problem."""
    books = Books(
        model=model,
        gpus=machine.gpus,
        budget=budget,
        overheads=overheads,
        cpu_isa=machine.cpu.isa,
    )
    mix = weight_mix(model)
    return Problem(
        books=books,
        machine=machine,
        workload=workload,
        knobs=knobs,
        sizes=sizes,
        mix=mix,
        widths=layer_widths(model),
        rates=rates_of(machine, mix),
    )


def rates_under(problem: Problem, settings: EngineSettings) -> Rates:
    """The machine's rates with weights in RAM as these settings lay them out."""
    pinned = any(problem.machine.gpu(gpu).rules.pinned_host for gpu in opened_gpus(settings))
    return rates_of(
        problem.machine,
        problem.mix,
        repacked=settings.use_extra_bufts and not pinned,
        n_threads=settings.n_threads,
    )


def placement_s(
    problem: Problem, parts: Parts, base: EngineSettings, placement: Placement
) -> float:
    return cost_s(traffic_of(problem, parts, placement), problem.rates, base, problem.workload)


def traffic_of(problem: Problem, parts: Parts, placement: Placement) -> Traffic:
    used = [gpu for gpu, count in enumerate(placement.layers_per_device) if count]
    return traffic_from(
        problem,
        parts,
        placement.n_gpu_layers,
        gpu_reads(
            problem,
            placement.gpu_read_bytes,
            placement.gpu_routed_bytes,
            used[-1] if used else None,
        ),
        streamed=placement.streamed_bytes,
        handovers=placement.handovers,
    )


def gpu_reads(
    problem: Problem, read: Sequence[int], routed: Sequence[int], output_gpu: int | None
) -> tuple[Reads, ...]:
    """What each GPU reads for a token; the output matrix is on the last that has layers."""
    found = []
    for gpu, (total, experts) in enumerate(zip(read, routed, strict=True)):
        output = min(total - experts, problem.mix.output_bytes) if gpu == output_gpu else 0
        dense = total - experts - output
        found.append(Reads(dense_bytes=dense, routed_bytes=experts, output_bytes=output))
    return tuple(found)


def traffic_from(
    problem: Problem,
    parts: Parts,
    count: int,
    gpus: tuple[Reads, ...],
    *,
    streamed: int,
    handovers: int,
) -> Traffic:
    model = problem.model
    n_host = max(0, model.n_layer + 1 - count)
    split = len(problem.widths) if problem.knobs.offload_kqv is False else n_host
    before, after = problem.widths[:split], problem.widths[split:]
    return Traffic(
        host=_host_reads(problem, parts, gpus),
        gpus=gpus,
        host_width=sum(width.full for width in before),
        gpu_width=sum(width.full for width in after),
        host_window_width=sum(width.windowed for width in before),
        gpu_window_width=sum(width.windowed for width in after),
        window=model.n_swa,
        host_layers=n_host / (model.n_layer + 1),
        streamed_bytes=streamed,
        handovers=handovers,
        expert_share=model.n_expert_used / model.n_expert if model.n_expert else 0.0,
    )


def _host_reads(problem: Problem, parts: Parts, gpus: Sequence[Reads]) -> Reads:
    """What is left for the host: of each kind, the model's less what the GPUs read."""
    total = max(0, parts.read_bytes - sum(reads.total_bytes for reads in gpus))
    experts = sum(problem.mix.experts.values()) - sum(reads.routed_bytes for reads in gpus)
    routed = min(total, max(0, experts))
    on_gpu = sum(reads.output_bytes for reads in gpus)
    output = 0 if on_gpu else min(total - routed, problem.mix.output_bytes)
    return Reads(dense_bytes=total - routed - output, routed_bytes=routed, output_bytes=output)


def settings_of(problem: Problem, placement: Placement, base: EngineSettings) -> EngineSettings:
    settings = replace(
        base,
        n_gpu_layers=placement.n_gpu_layers,
        layers_per_device=placement.layers_per_device,
        overrides=(*pinned_overrides(problem.knobs), *placement.overrides()),
    )
    # Not worth sizing in private memory when the weights alone are beyond the RAM cap.
    beyond = placement.streamed_bytes > problem.books.budget.cap(CPU)
    return _mapped(settings) if beyond and problem.knobs.load_mode is None else settings


def _mapped(settings: EngineSettings) -> EngineSettings:
    """The kernel can drop the pages of a mapped file, so they are outside the RAM cap."""
    return replace(settings, load_mode="mmap", use_extra_bufts=False)


def evaluate(
    problem: Problem, choice: Choice, parts: Parts, placement: Placement, base: EngineSettings
) -> Search[Outcome]:
    """The ledger of a placement by the engine's own sizes, and whether it keeps every cap."""
    settings = settings_of(problem, placement, base)
    ledger = yield from _ledger(problem, settings)
    short = isinstance(ledger, tuple) and ledger[-1].left_bytes < 0
    if short and problem.knobs.load_mode is None and settings.load_mode != "mmap":
        settings = _mapped(settings)
        ledger = yield from _ledger(problem, settings)
    if isinstance(ledger, Failure):
        return ledger
    if any(device.left_bytes < 0 for device in ledger):
        return Failure(settings=settings, devices=ledger)
    traffic = _with_disk(traffic_of(problem, parts, placement), ledger[-1])
    return Solution(
        choice=choice,
        placement=placement,
        settings=settings,
        devices=ledger,
        traffic=traffic,
        turn_s=cost_s(traffic, problem.rates, settings, problem.workload),
    )


def _ledger(problem: Problem, settings: EngineSettings) -> Search[tuple[DevicePlan, ...] | Failure]:
    """The ledger of settings, or the engine's refusal to size them."""
    if problem.sizes is None:
        return device_plans(problem.books, settings, None)
    yield from ask_sizes(problem, [settings])
    sizing = problem.sizes[sizing_key(settings)]
    if isinstance(sizing, SizingFailure):
        devices = device_plans(problem.books, settings, None)
        return Failure(settings=settings, devices=devices, reason=sizing.reason)
    return device_plans(problem.books, settings, sizing, check=False)


def checked_devices(problem: Problem, settings: EngineSettings) -> tuple[DevicePlan, ...]:
    """The ledger of settings that were evaluated, with the header's formulas beside the engine."""
    sizing = problem.sizes.get(sizing_key(settings)) if problem.sizes is not None else None
    return device_plans(problem.books, settings, sizing if isinstance(sizing, Sizing) else None)


def ask_sizes(problem: Problem, wanted: Sequence[EngineSettings]) -> Search[None]:
    """Wait until the engine has sized all of `wanted`."""
    if problem.sizes is None:
        return
    keys = dict.fromkeys(sizing_key(settings) for settings in wanted)
    while missing := tuple(key for key in keys if key not in problem.sizes):
        yield NeedSizes(settings=missing)


def _with_disk(traffic: Traffic, host: DevicePlan) -> Traffic:
    """Mapped weights beyond what the cap leaves are read from the disk for every token."""
    beyond = max(0, host.mapped_bytes - max(0, host.left_bytes))
    return replace(traffic, disk_read_bytes=min(beyond, traffic.host_read_bytes))
