"""Where every piece goes: for a number of GPU layers and the room on each GPU, the best filling."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.plan.fill import Order, fill
from loadmaster.plan.parts import Layer, Parts, Piece, group_by_layer
from loadmaster.plan.patterns import number_regex
from loadmaster.plan.types import CPU, Override

USUAL_ORDER = Order()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A decision for every piece of `Parts`.

    The last `sum(layers_per_device)` layers (the output layer among them) are on GPUs, in runs, as
    the engine assigns them; `moved` are the exceptions: matrices of those layers that stay on the
    host, and matrices of host layers that are on a GPU.
    """

    layers_per_device: tuple[int, ...]
    moved: tuple[tuple[str, str], ...]  # tensor name → device
    gpu_weight_bytes: tuple[int, ...]
    gpu_cache_bytes: tuple[int, ...]
    gpu_read_bytes: tuple[int, ...]
    gpu_routed_bytes: tuple[int, ...]  # the part of it that are experts
    streamed_bytes: int
    handovers: int

    @property
    def n_gpu_layers(self) -> int:
        return sum(self.layers_per_device)

    def overrides(self) -> tuple[Override, ...]:
        """The exceptions as patterns for the engine, one for each role and device."""
        groups = group_by_layer(dict(self.moved))
        return tuple(
            Override(pattern=_pattern(role, layers), device=device)
            for (role, device), layers in sorted(groups.items())
        )


def place(
    parts: Parts,
    n_gpu_layers: int,
    rooms: Sequence[int],
    *,
    runs: Sequence[int] | None = None,
    order: Order = USUAL_ORDER,
) -> Placement | None:
    """The filling with the most bytes read from GPUs; None when the layers do not fit.

    `rooms` are the bytes on each GPU for weights and caches. Of several ways to cut the layers
    into runs, the one that gets the most weights onto GPUs is taken, unless `runs` fixes them.
    `order` says which matrices get room first.
    """
    on_gpu = parts.layers[len(parts.layers) - n_gpu_layers :]
    rooms = [room - pinned for room, pinned in zip(rooms, parts.pinned_gpu_bytes, strict=True)]
    if any(room < 0 and pinned for room, pinned in zip(rooms, parts.pinned_gpu_bytes, strict=True)):
        return None
    placements = [
        placement
        for cut in ([tuple(runs)] if runs is not None else _cuts(on_gpu, rooms))
        if (placement := _place_runs(parts, on_gpu, cut, rooms, order)) is not None
    ]
    return max(placements, key=lambda it: sum(it.gpu_read_bytes), default=None)


def _cuts(layers: Sequence[Layer], rooms: Sequence[int]) -> list[tuple[int, ...]]:
    """Ways to cut layers into one run for each GPU; a GPU without room gets none."""
    if not layers:
        return [(0,) * len(rooms)]
    roomy = [gpu for gpu, room in enumerate(rooms) if room > 0]
    if not roomy:
        return []
    kept = [rooms[gpu] for gpu in roomy]
    whole = [[layer.whole_bytes(gpu) for layer in layers] for gpu in roomy]
    fixed = [[layer.fixed_bytes(gpu) for layer in layers] for gpu in roomy]
    cuts = [
        _in_proportion(whole[0], kept),
        _in_proportion(fixed[0], kept),
        _first_fit(whole, kept),
        _first_fit(fixed, kept),
    ]
    found = list(dict.fromkeys(cut for cut in cuts if cut is not None))
    return [_spread(cut, roomy, len(rooms)) for cut in found]


def _spread(cut: tuple[int, ...], gpus: Sequence[int], n_gpus: int) -> tuple[int, ...]:
    counts = dict(zip(gpus, cut, strict=True))
    return tuple(counts.get(gpu, 0) for gpu in range(n_gpus))


def _in_proportion(sizes: Sequence[int], rooms: Sequence[int]) -> tuple[int, ...]:
    """Runs whose bytes are in proportion to the rooms: equal cards get equal work."""
    total, room_total = sum(sizes), sum(rooms)
    runs: list[int] = []
    done = begin = 0
    passed_room = 0
    for room in rooms[:-1]:
        passed_room += room
        end = begin
        while end < len(sizes) and (done + sizes[end] / 2) * room_total <= total * passed_room:
            done += sizes[end]
            end += 1
        runs.append(end - begin)
        begin = end
    return (*runs, len(sizes) - begin)


def _first_fit(sizes: Sequence[Sequence[int]], rooms: Sequence[int]) -> tuple[int, ...] | None:
    """Runs that fill each GPU before the next; None when they do not all fit."""
    runs: list[int] = []
    begin = 0
    for gpu, room in enumerate(rooms):
        end, used = begin, 0
        while end < len(sizes[gpu]) and used + sizes[gpu][end] <= room:
            used += sizes[gpu][end]
            end += 1
        runs.append(end - begin)
        begin = end
    return tuple(runs) if begin == len(sizes[0]) else None


def _place_runs(
    parts: Parts,
    on_gpu: Sequence[Layer],
    runs: tuple[int, ...],
    rooms: Sequence[int],
    order: Order,
) -> Placement | None:
    first = len(parts.layers) - len(on_gpu)
    runs_of_layers: list[Sequence[Layer]] = []
    begin = 0
    left = list(rooms)
    for gpu, run in enumerate(runs):
        layers = on_gpu[begin : begin + run]
        begin += run
        left[gpu] -= sum(layer.fixed_bytes(gpu) for layer in layers)
        runs_of_layers.append(layers)
    if any(room < 0 and runs[gpu] for gpu, room in enumerate(left)):
        return None
    home, guests = _fill(runs_of_layers, parts.layers[:first], left, order)
    return _describe(parts, runs, runs_of_layers, home, guests)


def _fill(
    runs_of_layers: Sequence[Sequence[Layer]],
    host_layers: Sequence[Layer],
    rooms: Sequence[int],
    order: Order,
) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """Matrices for each GPU: of its own layers, and of layers whose attention stays on the host."""
    home: list[list[Piece]] = []
    guests: list[list[Piece]] = []
    waiting = _pieces(host_layers, order)
    for gpu, (layers, room) in enumerate(zip(runs_of_layers, rooms, strict=True)):
        own = _pieces(layers, order)
        names = {piece.name for piece in fill([*own, *waiting], room, gpu, order.last)}
        home.append([piece for piece in own if piece.name in names])
        guests.append([piece for piece in waiting if piece.name in names])
        waiting = [piece for piece in waiting if piece.name not in names]
    return home, guests


def _pieces(layers: Sequence[Layer], order: Order) -> list[Piece]:
    """Layer by layer, so that whole layers come together."""
    ordered = layers if order.first_layers else reversed(layers)
    return [piece for layer in ordered for piece in layer.movable]


def _describe(
    parts: Parts,
    runs: tuple[int, ...],
    runs_of_layers: Sequence[Sequence[Layer]],
    home: Sequence[Sequence[Piece]],
    guests: Sequence[Sequence[Piece]],
) -> Placement:
    at_home = {piece.name for pieces in home for piece in pieces}
    stays = [
        piece
        for layers in runs_of_layers
        for layer in layers
        for piece in layer.movable
        if piece.name not in at_home
    ]
    moved = [(piece.name, CPU) for piece in stays]
    moved += [(piece.name, f"gpu:{gpu}") for gpu, pieces in enumerate(guests) for piece in pieces]
    gpus = range(parts.n_gpus)
    weights = tuple(
        sum(layer.base.gpu_bytes[gpu] for layer in runs_of_layers[gpu])
        + sum(piece.gpu_bytes[gpu] for piece in (*home[gpu], *guests[gpu]))
        + parts.pinned_gpu_bytes[gpu]
        for gpu in gpus
    )
    read = tuple(
        sum(layer.base.read_bytes for layer in runs_of_layers[gpu])
        + sum(piece.read_bytes for piece in (*home[gpu], *guests[gpu]))
        + (parts.pinned_read_bytes if gpu == 0 else 0)
        for gpu in gpus
    )
    routed = tuple(
        sum(p.read_bytes for p in (*home[gpu], *guests[gpu]) if p.role.endswith("_exps"))
        for gpu in gpus
    )
    n_runs = sum(1 for run in runs if run)
    apart = len({name.split(".")[1] for name, _ in moved})
    return Placement(
        layers_per_device=runs,
        moved=tuple(moved),
        gpu_weight_bytes=weights,
        gpu_cache_bytes=tuple(
            sum(layer.gpu_cache_bytes for layer in runs_of_layers[gpu]) for gpu in gpus
        ),
        gpu_read_bytes=read,
        gpu_routed_bytes=routed,
        streamed_bytes=_host_weight_bytes(parts, runs_of_layers, home, guests),
        handovers=n_runs + 2 * apart,
    )


def _host_weight_bytes(
    parts: Parts,
    runs_of_layers: Sequence[Sequence[Layer]],
    home: Sequence[Sequence[Piece]],
    guests: Sequence[Sequence[Piece]],
) -> int:
    everything = sum(
        layer.base.host_bytes + sum(piece.host_bytes for piece in layer.movable)
        for layer in parts.layers
    )
    on_gpu = sum(layer.base.host_bytes for layers in runs_of_layers for layer in layers)
    on_gpu += sum(piece.host_bytes for pieces in (*home, *guests) for piece in pieces)
    return everything - on_gpu


def _pattern(role: str, layers: Sequence[int]) -> str:
    """A regex for one role in some layers.

    The engine compiles every pattern once per tensor, so there are few of them and they are short.
    """
    return rf"^blk\.({number_regex(layers)})\.{role}\.weight$"
