"""Filling the room left on a device with matrices: as many bytes as fit, by exact counts.

The pieces of a model fall into few sizes (a quantization mix gives two or three for each role), so
the choice is a bounded subset sum over counts, not over pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.plan.parts import Kind, Piece

# Sums kept while counts are combined. Beyond it, sums are thinned evenly; with 1,024 of them the
# loss stays under 1/1024 of the room left after the bulk.
_MAX_SUMS = 1024
# Pieces of each size left for the exact search after the bulk was taken; the slack that the search
# can close is far below one piece with this many of each.
_EXACT_COUNT = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which matrices get room on a GPU before others that are read as often."""

    last: frozenset[Kind] = frozenset()  # kinds that come after all others
    first_layers: bool = False  # among equals the first layers' matrices, not the last layers'


def fill(
    pieces: Sequence[Piece], room_bytes: int, gpu: int, last: frozenset[Kind] = frozenset()
) -> list[Piece]:
    """Choose pieces for `gpu` that fit in `room_bytes`.

    Pieces that are read whole for every token come before experts, which are read in part, and the
    kinds in `last` after the others; inside each group, the most bytes that fit. Earlier pieces are
    preferred among equals.
    """
    chosen: list[Piece] = []
    if room_bytes <= 0:
        return chosen
    for group in _in_order(pieces, last):
        taken = _subset(group, room_bytes, gpu)
        chosen += taken
        room_bytes -= sum(piece.gpu_bytes[gpu] for piece in taken)
    return chosen


def _in_order(pieces: Sequence[Piece], last: frozenset[Kind]) -> list[list[Piece]]:
    """Groups of pieces with the same share read per token, the densest first."""
    groups: dict[tuple[int, bool], list[Piece]] = {}
    for piece in pieces:
        share = round(64 * piece.read_bytes / max(1, piece.host_bytes))
        groups.setdefault((share, piece.kind not in last), []).append(piece)
    return [groups[key] for key in sorted(groups, reverse=True)]


def _subset(pieces: Sequence[Piece], room_bytes: int, gpu: int) -> list[Piece]:
    by_size: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_size.setdefault(piece.gpu_bytes[gpu], []).append(piece)
    if sum(size * len(group) for size, group in by_size.items()) <= room_bytes:
        return list(pieces)
    counts = _counts([(size, len(group)) for size, group in by_size.items()], room_bytes)
    wanted = dict(zip(by_size, counts, strict=True))
    return [piece for size, group in by_size.items() for piece in group[: wanted[size]]]


def _counts(sizes: Sequence[tuple[int, int]], room_bytes: int) -> list[int]:
    """How many of each (size, available) give the largest sum within `room_bytes`."""
    bulk = _bulk(sizes, room_bytes)
    room_bytes -= sum(size * n for (size, _), n in zip(sizes, bulk, strict=True))
    # Sum → the counts that reach it, extended size by size.
    sums: dict[int, tuple[int, ...]] = {0: ()}
    for (size, available), taken in zip(sizes, bulk, strict=True):
        extended: dict[int, tuple[int, ...]] = {}
        for total, counts in sums.items():
            most = min(available - taken, (room_bytes - total) // size if size else 0)
            for n in range(min(most, 2 * _EXACT_COUNT) + 1):
                extended.setdefault(total + n * size, (*counts, n))
        sums = _thin(extended)
    best = sums[max(sums)]
    return [taken + extra for taken, extra in zip(bulk, best, strict=True)]


def _bulk(sizes: Sequence[tuple[int, int]], room_bytes: int) -> list[int]:
    """Counts taken before the exact search: an even share of each size, short of the room."""
    reserve = sum(size * min(available, _EXACT_COUNT) for size, available in sizes)
    spare = room_bytes - reserve
    total = sum(size * available for size, available in sizes)
    if spare <= 0 or not total:
        return [0] * len(sizes)
    share = min(1.0, spare / total)
    return [max(0, min(available - _EXACT_COUNT, int(available * share))) for _, available in sizes]


def _thin(sums: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    if len(sums) <= _MAX_SUMS:
        return sums
    ordered = sorted(sums)
    step = len(ordered) / _MAX_SUMS
    kept = {ordered[int(index * step)] for index in range(_MAX_SUMS)} | {ordered[-1]}
    return {total: sums[total] for total in kept}
