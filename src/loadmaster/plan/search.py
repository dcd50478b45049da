"""The search: from a machine, a model, a workload and a budget to the fastest placement that fits.

Pure and deterministic. What only the engine knows (compute buffers, exotic caches) is looked up in
`Problem.sizes`; a search is a generator that yields `NeedSizes` when a figure is missing, and goes
on once the caller has put it there.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec
from loadmaster.plan.choices import (
    Choice,
    base_settings,
    first_choice,
    pinned_overrides,
    shrinking,
    smaller_cache,
)
from loadmaster.plan.layout import opened_gpus
from loadmaster.plan.ledger import Books, device_plans, sizing_key
from loadmaster.plan.parts import Parts, cut
from loadmaster.plan.placement import Placement, place
from loadmaster.plan.rates import Rates, rates_of
from loadmaster.plan.speed import Reads, Traffic, turn_s
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

# Placements sized before the search settles; four are usual.
_MAX_ROUNDS = 10
# Layer counts whose fillings are worked out exactly, the best by estimate.
_EXACT_COUNTS = 3
# A q8_0 cache must make a turn this much faster to be taken over f16.
_CACHE_GAIN = 0.02


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
    settings: EngineSettings
    devices: tuple[DevicePlan, ...]
    traffic: Traffic
    turn_s: float


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


def search(problem: Problem) -> Search[Outcome]:
    """The best choice and placement, or the closest miss."""
    choice = first_choice(problem.model, problem.workload, problem.knobs)
    outcome = yield from solve(problem, choice)
    if isinstance(outcome, Solution):
        return (yield from _with_smaller_cache(problem, outcome))
    smaller = list(shrinking(problem.model, problem.workload, problem.knobs, choice))
    if not smaller:
        return outcome
    least = yield from solve(problem, smaller[-1])
    if isinstance(least, Failure):
        return min(outcome, least, key=lambda failure: failure.overflow_bytes)
    for candidate in smaller[:-1]:
        found = yield from solve(problem, candidate)
        if isinstance(found, Solution):
            return found
    return least


def _with_smaller_cache(problem: Problem, solution: Solution) -> Search[Outcome]:
    """Half the cache leaves room for weights: taken when the turn gets faster by it."""
    if not opened_gpus(solution.settings) or solution.traffic.host_read_bytes == 0:
        return solution
    smaller = smaller_cache(problem.model, problem.knobs, solution.choice)
    if smaller is None:
        return solution
    outcome = yield from solve(problem, smaller)
    if isinstance(outcome, Failure):
        return solution
    return outcome if outcome.turn_s < solution.turn_s * (1 - _CACHE_GAIN) else solution


def solve(problem: Problem, choice: Choice) -> Search[Outcome]:
    """The best placement for one choice: on the GPUs if any fits, else on the host alone."""
    if not problem.books.gpus:
        return (yield from _solve_host(problem, choice))
    outcome = yield from _solve_gpus(problem, choice)
    if isinstance(outcome, Solution) or _wants_gpu(problem.knobs):
        return outcome
    host = yield from _solve_host(problem, choice)
    if isinstance(host, Failure):
        return min(outcome, host, key=lambda failure: failure.overflow_bytes)
    return host


def _wants_gpu(knobs: Knobs) -> bool:
    """Whether the user fixed something on a GPU, so that leaving it empty is no answer."""
    named = any(override.device != CPU for override in knobs.overrides)
    return bool(knobs.n_gpu_layers or knobs.layers_per_device or named)


def _solve_host(problem: Problem, choice: Choice) -> Search[Outcome]:
    settings = replace(_base(problem, choice), op_offload=False)
    rules = [gpu.rules for gpu in problem.books.gpus]
    parts = cut(problem.model, settings, rules, pinned_overrides(problem.knobs))
    placement = place(parts, 0, (0,) * len(rules))
    assert placement is not None
    return (yield from _evaluate(problem, choice, parts, placement, settings))


def _base(problem: Problem, choice: Choice) -> EngineSettings:
    cpu = problem.machine.cpu
    return base_settings(
        choice,
        problem.workload,
        problem.knobs,
        n_gpus=len(problem.books.gpus),
        n_threads=cpu.physical_cores or cpu.logical_cores,
    )


def _solve_gpus(problem: Problem, choice: Choice) -> Search[Outcome]:
    """Place, size, correct the room by what the engine needs beside weights, and place again."""
    base = _base(problem, choice)
    rules = [gpu.rules for gpu in problem.books.gpus]
    parts = cut(problem.model, base, rules, pinned_overrides(problem.knobs))
    reserves: dict[int, tuple[int, ...]] = {}
    outcomes: list[Outcome] = []
    probes = _probes(problem, parts, base)
    yield from _ask(problem, [_settings_of(problem, placement, base) for placement in probes])
    for placement in probes:
        outcomes.append((yield from _evaluate(problem, choice, parts, placement, base)))
        _reserve(outcomes[-1], placement, reserves)
    for _ in range(_MAX_ROUNDS):
        best = _best_placement(problem, parts, base, reserves)
        if best is None:
            break
        outcome = yield from _evaluate(problem, choice, parts, best, base)
        if any(outcome.settings == known.settings for known in outcomes):
            break
        outcomes.append(outcome)
        _reserve(outcome, best, reserves)
    solutions = [outcome for outcome in outcomes if isinstance(outcome, Solution)]
    if solutions:
        return min(solutions, key=lambda solution: solution.turn_s)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    return min(failures, key=lambda failure: failure.overflow_bytes)


def _reserve(outcome: Outcome, placement: Placement, reserves: dict[int, tuple[int, ...]]) -> None:
    """Note in `reserves` what an evaluated placement needs beside weights and caches."""
    planned = {device.id: device.planned_bytes for device in outcome.devices}
    beside = tuple(
        planned.get(f"gpu:{index}", 0) - weights - cache
        for index, (weights, cache) in enumerate(
            zip(placement.gpu_weight_bytes, placement.gpu_cache_bytes, strict=True)
        )
    )
    known = reserves.get(placement.n_gpu_layers)
    if known is not None and isinstance(outcome, Failure):
        beside = tuple(max(pair) for pair in zip(known, beside, strict=True))
    reserves[placement.n_gpu_layers] = beside


def _probes(problem: Problem, parts: Parts, base: EngineSettings) -> list[Placement]:
    """Placements sized first, because the engine's needs differ most between them."""
    n = len(parts.layers)
    counts = [n, n // 2, 1, 0] if problem.knobs.n_gpu_layers is None else _counts(problem, parts)
    caps = _caps(problem)
    placements = []
    for count in dict.fromkeys(counts):
        placement = _place(problem, parts, count, caps)
        # One that cannot hold its attention and caches is squeezed in for its figures alone: the
        # ledger of a plan that does not fit is made from it.
        if placement is None:
            placement = _place(problem, parts, count, [_UNBOUNDED] * parts.n_gpus)
        if placement is not None:
            placements.append(placement)
    return placements


_UNBOUNDED = 1 << 60


def _counts(problem: Problem, parts: Parts) -> list[int]:
    """The numbers of GPU layers that the knobs allow."""
    if problem.knobs.layers_per_device is not None:
        return [min(sum(problem.knobs.layers_per_device), len(parts.layers))]
    if problem.knobs.n_gpu_layers is not None:
        return [min(problem.knobs.n_gpu_layers, len(parts.layers))]
    return list(range(len(parts.layers), -1, -1))


def _caps(problem: Problem) -> list[int]:
    overheads = problem.books.overheads.device_bytes
    return [
        problem.books.budget.cap(gpu.id) - overheads.get(gpu.id, 0) for gpu in problem.books.gpus
    ]


def _place(problem: Problem, parts: Parts, count: int, rooms: Sequence[int]) -> Placement | None:
    return place(parts, count, rooms, runs=problem.knobs.layers_per_device)


def _best_placement(
    problem: Problem,
    parts: Parts,
    base: EngineSettings,
    reserves: dict[int, tuple[int, ...]],
) -> Placement | None:
    """The fastest filling, with room reserved as the nearest sized layer count needs it."""
    caps = [problem.books.budget.cap(gpu.id) for gpu in problem.books.gpus]
    estimates: list[tuple[float, int, list[int]]] = []
    for count in _counts(problem, parts):
        nearest = min(reserves, key=lambda known, count=count: abs(known - count))  # type: ignore[misc]
        rooms = [cap - beside for cap, beside in zip(caps, reserves[nearest], strict=True)]
        seconds = _estimate_s(problem, parts, base, count, rooms)
        if seconds is not None:
            estimates.append((seconds, -count, rooms))
    estimates.sort(key=lambda estimate: estimate[:2])
    placements = [
        placement
        for _, negative, rooms in estimates[:_EXACT_COUNTS]
        if (placement := _place(problem, parts, -negative, rooms)) is not None
    ]
    return min(
        placements,
        key=lambda it: (_turn_s(problem, parts, base, it), -it.n_gpu_layers),
        default=None,
    )


def _estimate_s(
    problem: Problem, parts: Parts, base: EngineSettings, count: int, rooms: Sequence[int]
) -> float | None:
    """A turn's time if matrices were divisible; None when the fixed parts do not fit."""
    first = len(parts.layers) - count
    rooms = [room for room in rooms if room > 0]
    chosen = parts.layers[first:]
    fixed = sum(layer.fixed_bytes(0) for layer in chosen)
    left = sum(rooms) - sum(parts.pinned_gpu_bytes) - fixed
    if left < 0:
        return None
    read = sum(layer.base.read_bytes for layer in chosen) + parts.pinned_read_bytes
    routed = 0
    for dense in (True, False):
        pieces = [
            piece
            for layer in parts.layers
            for piece in layer.movable
            if piece.role.endswith("_exps") is not dense
        ]
        size = sum(piece.gpu_bytes[0] for piece in pieces)
        share = min(1.0, left / size) if size else 0.0
        moved = int(share * sum(piece.read_bytes for piece in pieces))
        read += moved
        routed += 0 if dense else moved
        left -= min(left, size)
    zeros = (0,) * (parts.n_gpus - 1)
    gpus = _gpu_reads(problem, (read, *zeros), (routed, *zeros), 0 if count else None)
    traffic = _traffic(problem, parts, count, gpus, streamed=0, handovers=0)
    return turn_s(traffic, problem.rates, base, problem.workload)


def _turn_s(problem: Problem, parts: Parts, base: EngineSettings, placement: Placement) -> float:
    return turn_s(_traffic_of(problem, parts, placement), problem.rates, base, problem.workload)


def _traffic_of(problem: Problem, parts: Parts, placement: Placement) -> Traffic:
    used = [gpu for gpu, count in enumerate(placement.layers_per_device) if count]
    return _traffic(
        problem,
        parts,
        placement.n_gpu_layers,
        _gpu_reads(
            problem,
            placement.gpu_read_bytes,
            placement.gpu_routed_bytes,
            used[-1] if used else None,
        ),
        streamed=placement.streamed_bytes,
        handovers=placement.handovers,
    )


def _gpu_reads(
    problem: Problem, read: Sequence[int], routed: Sequence[int], output_gpu: int | None
) -> tuple[Reads, ...]:
    """What each GPU reads for a token; the output matrix is on the last that has layers."""
    found = []
    for gpu, (total, experts) in enumerate(zip(read, routed, strict=True)):
        output = min(total - experts, problem.mix.output_bytes) if gpu == output_gpu else 0
        dense = total - experts - output
        found.append(Reads(dense_bytes=dense, routed_bytes=experts, output_bytes=output))
    return tuple(found)


def _traffic(
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
    )


def _host_reads(problem: Problem, parts: Parts, gpus: Sequence[Reads]) -> Reads:
    """What is left for the host: of each kind, the model's less what the GPUs read."""
    total = max(0, parts.read_bytes - sum(reads.total_bytes for reads in gpus))
    experts = sum(problem.mix.experts.values()) - sum(reads.routed_bytes for reads in gpus)
    routed = min(total, max(0, experts))
    on_gpu = sum(reads.output_bytes for reads in gpus)
    output = 0 if on_gpu else min(total - routed, problem.mix.output_bytes)
    return Reads(dense_bytes=total - routed - output, routed_bytes=routed, output_bytes=output)


def _settings_of(problem: Problem, placement: Placement, base: EngineSettings) -> EngineSettings:
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


def _evaluate(
    problem: Problem, choice: Choice, parts: Parts, placement: Placement, base: EngineSettings
) -> Search[Outcome]:
    """The ledger of a placement by the engine's own sizes, and whether it keeps every cap."""
    settings = _settings_of(problem, placement, base)
    ledger = yield from _ledger(problem, settings)
    short = isinstance(ledger, tuple) and ledger[-1].left_bytes < 0
    if short and problem.knobs.load_mode is None and settings.load_mode != "mmap":
        settings = _mapped(settings)
        ledger = yield from _ledger(problem, settings)
    if isinstance(ledger, Failure):
        return ledger
    if any(device.left_bytes < 0 for device in ledger):
        return Failure(settings=settings, devices=ledger)
    traffic = _with_disk(_traffic_of(problem, parts, placement), ledger[-1])
    return Solution(
        choice=choice,
        settings=settings,
        devices=ledger,
        traffic=traffic,
        turn_s=turn_s(traffic, problem.rates, settings, problem.workload),
    )


def _ledger(problem: Problem, settings: EngineSettings) -> Search[tuple[DevicePlan, ...] | Failure]:
    """The ledger of settings, or the engine's refusal to size them."""
    if problem.sizes is None:
        return device_plans(problem.books, settings, None)
    yield from _ask(problem, [settings])
    sizing = problem.sizes[sizing_key(settings)]
    if isinstance(sizing, SizingFailure):
        devices = device_plans(problem.books, settings, None)
        return Failure(settings=settings, devices=devices, reason=sizing.reason)
    return device_plans(problem.books, settings, sizing, check=False)


def checked_devices(problem: Problem, settings: EngineSettings) -> tuple[DevicePlan, ...]:
    """The ledger of settings that were evaluated, with the header's formulas beside the engine."""
    sizing = problem.sizes.get(sizing_key(settings)) if problem.sizes is not None else None
    return device_plans(problem.books, settings, sizing if isinstance(sizing, Sizing) else None)


def _ask(problem: Problem, wanted: Sequence[EngineSettings]) -> Search[None]:
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
