"""Which matrices to leave on the host: those that take the least room on the way.

A matrix on the host is streamed through the compute buffer of the GPU that uses it. The buffer has
room for the largest matrix of each role that a layer may stream, so fewer roles and smaller sizes
leave more room for weights; and at one end of the model it may lie where other things lay before.
"""

from collections.abc import Mapping
from itertools import product

from loadmaster.plan.fill import Order
from loadmaster.plan.parts import Kind, Parts
from loadmaster.plan.placement import Placement
from loadmaster.plan.types import CPU

# Layers that the engine is asked to size for all orders together: it takes about half a millisecond
# for each.
_MAX_LAYERS = 400


def orders_to_try(parts: Parts, placement: Placement) -> list[tuple[Order, int]]:
    """Orders of filling that may need less beside weights than the usual one did, and how many
    bytes less at the most."""
    orders = [(Order(first_layers=True), 0)]
    for kinds, saved in _kinds_left(parts, placement):
        orders += [(Order(last=kinds, first_layers=first), saved) for first in (False, True)]
    return orders[: max(1, _MAX_LAYERS // len(parts.layers))]


def _kinds_left(parts: Parts, placement: Placement) -> list[tuple[frozenset[Kind], int]]:
    """Sets of kinds to leave on the host: first those with room for everything that is there now,
    the set that should need the least compute buffer before others; then sets that are there whole,
    with some of the others."""
    total, left = _bytes_by_kind(parts, placement)
    on_host = sum(left.values())
    if not on_host:
        return []
    now = _streamed(frozenset(left))
    ranked = []
    for kinds in _sets(total):
        room, saved = sum(total[kind] for kind in kinds), max(0, now - _streamed(kinds))
        short = room < on_host - saved
        if kinds != total.keys():
            ranked.append((short, -room if short else -saved, sorted(kinds), saved))
    return [(frozenset(kinds), saved) for _, _, kinds, saved in sorted(ranked)]


def _bytes_by_kind(
    parts: Parts, placement: Placement
) -> tuple[Mapping[Kind, int], Mapping[Kind, int]]:
    """Bytes of each kind: of all layers, and of those on the host."""
    moved = dict(placement.moved)
    first = len(parts.layers) - placement.n_gpu_layers
    total: dict[Kind, int] = {}
    left: dict[Kind, int] = {}
    for layer in parts.layers:
        for piece in layer.movable:
            total[piece.kind] = total.get(piece.kind, 0) + piece.host_bytes
            if moved.get(piece.name, CPU if layer.index < first else "") == CPU:
                left[piece.kind] = left.get(piece.kind, 0) + piece.host_bytes
    return total, left


def _streamed(kinds: frozenset[Kind]) -> int:
    """Room for the largest matrix of each role."""
    largest: dict[str, int] = {}
    for role, size in kinds:
        largest[role] = max(size, largest.get(role, 0))
    return sum(largest.values())


def _sets(total: Mapping[Kind, int]) -> list[frozenset[Kind]]:
    """For each role none of its kinds, or all up to one of its sizes."""
    roles: dict[str, list[int]] = {}
    for role, size in sorted(total):
        roles.setdefault(role, []).append(size)
    limits = [(0, *sizes) for sizes in roles.values()]
    found = [
        frozenset(
            (role, size)
            for (role, sizes), limit in zip(roles.items(), chosen, strict=True)
            for size in sizes
            if size <= limit
        )
        for chosen in product(*limits)
    ]
    return [kinds for kinds in found if kinds]
