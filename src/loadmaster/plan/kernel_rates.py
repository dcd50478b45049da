"""What one device's kernels were timed to take, as curves of one model: products, attention."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadmaster.machine.measurements import AttentionTime, DeviceTimes, Layout
from loadmaster.model.quants import BY_NAME
from loadmaster.plan.curve import FAR, Curve, by_fours, flat, in_tiles
from loadmaster.plan.types import CPU
from loadmaster.plan.weights import WeightMix

# Attention is timed by itself; in a model the weights between two layers have displaced what it
# left in the caches. With products of 32 MiB between attentions over 512 to 4,096 cells it took 4
# to 20 % longer than alone, 10 % in the middle (2.3 GHz Xeon).
CPU_COLD_ATTENTION = 1.1
# Tokens that the CPU's kernels take at once where weights are not in its own layout: tinyBLAS
# (llamafile/sgemm.cpp), and the columns of a chunk of ggml_compute_forward_mul_mat.
_TILES = {"q8_0": 4, "q4_0": 4, "q5_0": 4, "iq4_nl": 4, "q4_K": 16, "q5_K": 16, "q6_K": 16}
# What a curve of repacked weights needs to be told apart between its points.
_STEPS = frozenset((1, 2, 4, 8, 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRate:
    """Seconds per query element and cell: of a decoded token, by the cells that it sees; of a
    prompt's token; and of a cell that the mask hides."""

    decode: Curve
    prefill: Curve
    hidden_s: float = 0.0

    def decode_s(self, cells: float) -> float:
        """Seconds per query element for all of `cells` cells."""
        return cells * self.decode.at(min(cells, self.decode.tokens[-1]))

    def prefill_s(self, cells: float) -> float:
        """The same for a token of a prompt."""
        return cells * self.prefill.at(min(cells, self.prefill.tokens[-1]))


def product_curve(row: DeviceTimes, type_name: str, layout: Layout, gather: bool) -> Curve:
    """The points of a type, or of the one nearest in bits that was measured.

    Where the type has no repacked kernel the engine leaves it plain; where experts were not timed
    apart, they count as dense.
    """
    known = [point for point in row.products if point.gathered is gather]
    if not known:
        known = [point for point in row.products if not point.gathered]
    nearest = min(
        {point.type for point in known},
        key=lambda name: (abs(_bits(name) - _bits(type_name)), name != type_name, name),
    )
    nearest = type_name if any(point.type == type_name for point in known) else nearest
    points = [point for point in known if point.type == nearest and point.layout == layout]
    points = points or [point for point in known if point.type == nearest]
    by_tokens = {point.tokens: point.s_per_byte for point in points}
    scale = _bits(nearest) / _bits(type_name)
    if nearest == type_name:
        scale = 1.0
    curve = Curve(
        tokens=tuple(sorted(by_tokens)),
        s_per_byte=tuple(by_tokens[tokens] * scale for tokens in sorted(by_tokens)),
    )
    return _stepped(curve, nearest, points[0].layout) if row.id == CPU else curve


def _stepped(curve: Curve, type_name: str, layout: Layout) -> Curve:
    """Between the points: how the CPU's kernels take several tokens at once."""
    if layout == "repacked":
        return by_fours(curve) if set(curve.tokens) >= _STEPS else curve
    return in_tiles(curve, _TILES[type_name]) if type_name in _TILES else curve


def _bits(type_name: str) -> float:
    quant = BY_NAME[type_name]
    return quant.block_bytes * 8 / quant.block_size


def attention_rate(row: DeviceTimes, kv: str, mix: WeightMix) -> AttentionRate:
    """The times of this cache type; a type not timed is as slow as the nearest in bits."""
    types = {point.type for point in row.attention}
    nearest = min(types, key=lambda name: (abs(_bits(name) - _bits(kv)), name))
    points = [point for point in row.attention if point.type == nearest]
    decode = [point for point in points if point.tokens == 1] or points
    prompt = [point for point in points if point.tokens > 1] or points
    # Bytes behind a query element, against those of the f16 cache that reading was timed with.
    reading, share = _reading(row).at, _bits(kv) / _bits("f16")

    def unlike(cells: int, shared: int) -> float:
        return cold * share * reading(cells) * (1 / mix.heads_per_kv - 1 / shared)

    base = _base_width(decode)
    wider = _by_width(row, mix.row_width, base).at
    cold = CPU_COLD_ATTENTION if row.id == CPU else 1.0
    decode = [point for point in decode if _row_width(point) == base]
    return AttentionRate(
        decode=_by_cells(decode, mix.head_dim, lambda cells, s: cold * wider(cells) * s, unlike),
        prefill=_by_cells(prompt, mix.head_dim, lambda _, s: s, lambda *_: 0.0),
        hidden_s=(row.hidden_cell_s or 0.0) / max(1, mix.head_dim),
    )


def _by_width(row: DeviceTimes, width: int, base: int) -> Curve:
    """What an element costs in cells of this width over one in cells of the `base` width, by the
    number of cells: in between in proportion, beyond the widths that were timed no more."""
    ratios: dict[int, dict[int, float]] = {}
    for one, other in _pairs(row, lambda p: (p.type, p.head_dim, p.heads_per_kv, p.cells)):
        if _row_width(one) == base:
            by_width = ratios.setdefault(one.cells, {base: 1.0})
            by_width[_row_width(other)] = other.s_per_element / one.s_per_element
    return _over_cells({cells: _between(known, width) for cells, known in ratios.items()}, 1.0)


def _between(known: Mapping[int, float], width: int) -> float:
    widths = sorted(known)
    width = min(max(width, widths[0]), widths[-1])
    curve = Curve(tokens=tuple(widths), s_per_byte=tuple(known[one] for one in widths))
    return curve.at(width)


def _row_width(point: AttentionTime) -> int:
    return point.n_head_kv * point.head_dim


def _reading(row: DeviceTimes) -> Curve:
    """Seconds per element of K and V read from memory, by cells: two timings with the same
    arithmetic, one of which reads more. 0 where there are no two."""
    at: dict[int, float] = {}
    for few, many in _pairs(row, lambda p: (p.type, p.head_dim, p.n_head_kv, p.cells)):
        if many.heads_per_kv < few.heads_per_kv:
            more = 1 / many.heads_per_kv - 1 / few.heads_per_kv
            at[few.cells] = max(0.0, (many.s_per_element - few.s_per_element) / more)
    return _over_cells(at, 0.0)


def _pairs(
    row: DeviceTimes, key: Callable[[AttentionTime], object]
) -> Iterator[tuple[AttentionTime, AttentionTime]]:
    """Timings of decode with an f16 cache that have the same key, each pair in both orders."""
    decode = [p for p in row.attention if p.tokens == 1 and p.type == "f16"]
    return ((a, b) for a in decode for b in decode if a is not b and key(a) == key(b))


def _over_cells(at: Mapping[int, float], otherwise: float) -> Curve:
    if not at:
        return flat(otherwise)
    cells = tuple(sorted(at))
    return Curve(tokens=(*cells, FAR), s_per_byte=(*(at[c] for c in cells), at[cells[-1]]))


def _by_cells(
    points: Sequence[AttentionTime],
    head_dim: int,
    scaled: Callable[[int, float], float],
    extra: Callable[[int, int], float],
) -> Curve:
    """Seconds per query element and cell, by cells, from the rows that the most heads share;
    `scaled` and `extra` are for models that are otherwise."""
    shared = max(point.heads_per_kv for point in points)
    kept = [point for point in points if point.heads_per_kv == shared]
    cells = sorted({point.cells for point in kept})
    seconds = [
        scaled(count, _per_element([p for p in kept if p.cells == count], head_dim))
        + extra(count, shared)
        for count in cells
    ]
    return Curve(tokens=tuple(cells), s_per_byte=tuple(max(0.0, value) for value in seconds))


def _base_width(points: Sequence[AttentionTime]) -> int:
    """The width of a cell at which the most head sizes were timed."""
    sizes: dict[int, set[int]] = {}
    for point in points:
        sizes.setdefault(_row_width(point), set()).add(point.head_dim)
    return max(sizes, key=lambda width: (len(sizes[width]), -width))


def _per_element(points: Sequence[AttentionTime], head_dim: int) -> float:
    """A cell costs each head something by itself and something for each of its elements: a straight
    line through the time per head and cell of two head sizes."""
    times = sorted((point.head_dim, point.s_per_element * point.head_dim) for point in points)
    (small, low), (large, high) = times[0], times[-1]
    if small == large or head_dim <= 0:
        return points[0].s_per_element
    slope = (high - low) / (large - small)
    return max(low * min(1.0, head_dim / small), low + slope * (head_dim - small)) / head_dim
