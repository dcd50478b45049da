"""The search: choices around the knobs, numbers of GPU layers, fillings; the fastest that fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from loadmaster.plan.choices import (
    Choice,
    base_settings,
    first_choice,
    pinned_overrides,
    shrinking,
    smaller_cache,
)
from loadmaster.plan.fill import Order
from loadmaster.plan.layout import opened_gpus
from loadmaster.plan.objective import cost_s
from loadmaster.plan.orders import orders_to_try
from loadmaster.plan.parts import Parts, cut
from loadmaster.plan.placement import USUAL_ORDER, Placement, place
from loadmaster.plan.problem import (
    Failure,
    Outcome,
    Problem,
    Search,
    Solution,
    ask_sizes,
    evaluate,
    gpu_reads,
    placement_s,
    settings_of,
    traffic_from,
)
from loadmaster.plan.speed import Traffic
from loadmaster.plan.types import CPU, EngineSettings, Knobs

# Placements sized before the search settles; four are usual.
_MAX_ROUNDS = 10
# Layer counts whose fillings are worked out exactly, the best by estimate.
_EXACT_COUNTS = 3
# Fillings of one order: by a guess of the room, then by what the engine said.
_REFINE_ROUNDS = 3
# A q8_0 cache must make a turn this much faster to be taken over f16.
_CACHE_GAIN = 0.02


def search(problem: Problem, like: Outcome | None = None) -> Search[Outcome]:
    """The best choice and placement, or the closest miss; `like` is of a problem much like this."""
    choice = first_choice(problem.model, problem.workload, problem.knobs)
    outcome = yield from solve(problem, choice, like)
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
    outcome = yield from solve(problem, smaller, solution)
    if isinstance(outcome, Failure):
        return solution
    return outcome if outcome.turn_s < solution.turn_s * (1 - _CACHE_GAIN) else solution


def solve(problem: Problem, choice: Choice, like: Outcome | None = None) -> Search[Outcome]:
    """The best placement for one choice: on the GPUs if any fits, else on the host alone."""
    if not problem.books.gpus:
        return (yield from _solve_host(problem, choice))
    outcome = yield from _solve_gpus(problem, choice, like)
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
    settings = replace(base_of(problem, choice), op_offload=False)
    rules = [gpu.rules for gpu in problem.books.gpus]
    parts = cut(problem.model, settings, rules, pinned_overrides(problem.knobs))
    placement = place(parts, 0, (0,) * len(rules))
    assert placement is not None
    return (yield from evaluate(problem, choice, parts, placement, settings))


def base_of(problem: Problem, choice: Choice) -> EngineSettings:
    """Settings of a choice with nothing on a GPU yet."""
    cpu = problem.machine.cpu
    return base_settings(
        choice,
        problem.workload,
        problem.knobs,
        n_gpus=len(problem.books.gpus),
        n_threads=cpu.physical_cores or cpu.logical_cores,
    )


def _solve_gpus(problem: Problem, choice: Choice, like: Outcome | None) -> Search[Outcome]:
    """Place, size, correct the room by what the engine needs beside weights, and place again."""
    base, parts = _parts_of(problem, choice)
    reserves: dict[int, tuple[int, ...]] = {}
    tried: list[_Tried] = []
    probes = _probes(problem, parts, like)
    yield from ask_sizes(problem, [settings_of(problem, placement, base) for placement in probes])
    for placement in probes:
        outcome = yield from evaluate(problem, choice, parts, placement, base)
        tried.append(_Tried(placement, outcome))
        _reserve(tried[-1], reserves)
    for _ in range(_MAX_ROUNDS):
        best = _best_placement(problem, parts, base, reserves)
        if best is None:
            break
        outcome = yield from evaluate(problem, choice, parts, best, base)
        if any(outcome.settings == known.outcome.settings for known in tried):
            break
        tried.append(_Tried(best, outcome))
        _reserve(tried[-1], reserves)
    solved = [one for one in tried if isinstance(one.outcome, Solution)]
    if solved:
        return min(solved, key=_Tried.seconds).outcome
    failures = [one.outcome for one in tried if isinstance(one.outcome, Failure)]
    return min(failures, key=lambda failure: failure.overflow_bytes)


def _parts_of(problem: Problem, choice: Choice) -> tuple[EngineSettings, Parts]:
    base = base_of(problem, choice)
    rules = [gpu.rules for gpu in problem.books.gpus]
    return base, cut(problem.model, base, rules, pinned_overrides(problem.knobs))


@dataclass(frozen=True, slots=True)
class _Tried:
    """A placement, and what came of it."""

    placement: Placement
    outcome: Outcome

    def seconds(self) -> float:
        return self.outcome.turn_s if isinstance(self.outcome, Solution) else float("inf")


def refined(problem: Problem, solution: Solution) -> Search[Solution]:
    """The same layers with other matrices left on the host.

    What stays on the host passes through the GPU's compute buffer, and how much room that takes
    depends on which matrices of which layers they are: filled again with what each order needs.
    """
    if not opened_gpus(solution.settings) or solution.traffic.host_read_bytes == 0:
        return solution
    base, parts = _parts_of(problem, solution.choice)
    start = best = _Tried(solution.placement, solution)
    for order, saved_bytes in orders_to_try(parts, solution.placement):
        known = start
        for extra in (saved_bytes, *(0,) * _REFINE_ROUNDS):
            rooms = [room + extra for room in _rooms(problem, known)]
            placement = _place(problem, parts, solution.placement.n_gpu_layers, rooms, order)
            if placement is None:
                break
            outcome = yield from evaluate(problem, solution.choice, parts, placement, base)
            if outcome.settings == known.outcome.settings:
                break
            known = _Tried(placement, outcome)
            best = min(best, known, key=_Tried.seconds)
    assert isinstance(best.outcome, Solution)
    return best.outcome


def _rooms(problem: Problem, known: _Tried) -> list[int]:
    """Room for weights and caches, were all else as in a placement that was sized."""
    caps = [problem.books.budget.cap(gpu.id) for gpu in problem.books.gpus]
    return [cap - beside for cap, beside in zip(caps, _beside(known), strict=True)]


def _beside(known: _Tried) -> tuple[int, ...]:
    """What a sized placement takes on each GPU beside weights and caches."""
    planned = {device.id: device.planned_bytes for device in known.outcome.devices}
    placement = known.placement
    sums = zip(placement.gpu_weight_bytes, placement.gpu_cache_bytes, strict=True)
    return tuple(
        planned.get(f"gpu:{index}", 0) - weights - cache
        for index, (weights, cache) in enumerate(sums)
    )


def _reserve(known: _Tried, reserves: dict[int, tuple[int, ...]]) -> None:
    """Note in `reserves` what an evaluated placement needs beside weights and caches."""
    beside, count = _beside(known), known.placement.n_gpu_layers
    before = reserves.get(count)
    if before is not None and isinstance(known.outcome, Failure):
        beside = tuple(max(pair) for pair in zip(before, beside, strict=True))
    reserves[count] = beside


def _probes(problem: Problem, parts: Parts, like: Outcome | None) -> list[Placement]:
    """Placements sized first, because the engine's needs differ most between them."""
    n = len(parts.layers)
    counts = [n, n // 2, 1, 0] if problem.knobs.n_gpu_layers is None else _counts(problem, parts)
    if isinstance(like, Solution) and like.settings.n_gpu_layers in _counts(problem, parts):
        counts = [like.settings.n_gpu_layers]
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
    if n in counts and (bare := _place(problem, parts, n, _least_rooms(parts, caps))) is not None:
        placements.append(bare)
    return placements


def _least_rooms(parts: Parts, caps: Sequence[int]) -> list[int]:
    """Room for attention and caches of all layers, with their matrices on the host."""
    fixed = [layer.fixed_bytes(0) for layer in parts.layers]
    total = sum(caps) or 1
    slack = max(fixed) if len(caps) > 1 else 0
    return [
        sum(fixed) * cap // total + slack + pinned
        for cap, pinned in zip(caps, parts.pinned_gpu_bytes, strict=True)
    ]


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


def _place(
    problem: Problem,
    parts: Parts,
    count: int,
    rooms: Sequence[int],
    order: Order = USUAL_ORDER,
) -> Placement | None:
    return place(parts, count, rooms, runs=problem.knobs.layers_per_device, order=order)


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
        key=lambda it: (placement_s(problem, parts, base, it), -it.n_gpu_layers),
        default=None,
    )


def _estimate_s(
    problem: Problem, parts: Parts, base: EngineSettings, count: int, rooms: Sequence[int]
) -> float | None:
    """A turn's time if matrices were divisible; None when the fixed parts do not fit."""
    traffic = estimated_traffic(problem, parts, count, rooms)
    if traffic is None:
        return None
    return cost_s(traffic, problem.rates, base, problem.workload)


def estimated_traffic(
    problem: Problem, parts: Parts, count: int, rooms: Sequence[int]
) -> Traffic | None:
    """What a token moves if matrices were divisible; None when the fixed parts do not fit."""
    first = len(parts.layers) - count
    rooms = [room for room in rooms if room > 0]
    chosen = parts.layers[first:]
    fixed = sum(layer.fixed_bytes(0) for layer in chosen)
    left = sum(rooms) - sum(parts.pinned_gpu_bytes) - fixed
    if left < 0:
        return None
    handovers = (1 if count else 0) + 2 * _layers_apart(parts, first, left)
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
    gpus = gpu_reads(problem, (read, *zeros), (routed, *zeros), 0 if count else None)
    traffic = traffic_from(problem, parts, count, gpus, streamed=0, handovers=handovers)
    return replace(traffic, streamed_bytes=traffic.host_bytes)


def _layers_apart(parts: Parts, first: int, room: int) -> int:
    """Layers that are on both sides, were `room` filled with matrices layer by layer."""
    sizes = [sum(piece.gpu_bytes[0] for piece in layer.movable) for layer in parts.layers]
    home, guests = sum(sizes[first:]), sum(sizes[:first])
    each = max(1, (home + guests) // max(1, len(parts.layers) - 1))
    left = max(0, home - room)
    taken = min(guests, max(0, room - home))
    return ceil(left / each) + ceil(taken / each)
