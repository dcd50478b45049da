"""What a machine does with one model: its kernels' times, or tables, as curves of that model.

Where `doctor --measure` has been, the engine's own kernels were timed on this machine for each type
of weights; elsewhere nominal bandwidths from tables stand in, with the shares that inference is
known to reach. `basis` says which.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loadmaster.machine.measurements import (
    AttentionTime,
    DeviceTimes,
    Layout,
    Measurements,
)
from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.quants import BY_NAME
from loadmaster.plan.curve import FAR, Curve, by_fours, flat, gathered, in_tiles, mixed, roofline
from loadmaster.plan.types import CPU, KV_TYPES
from loadmaster.plan.weights import WeightMix

Basis = Literal["measured", "table", "unknown"]

# Shares of a nominal bandwidth that inference reaches. Dense decode reaches 75–85 % of the RAM's
# theoretical rate on desktops; cards reach 70–85 % of theirs.
RAM_SHARE = 0.80
VRAM_SHARE = 0.75
# Attention on the CPU reads its cache at about half the rate that it reads weights.
CPU_ATTENTION_SHARE = 0.5
# Peak half-precision rate per byte of memory bandwidth: 76 (RTX 3090) to 295 (H100); the low end.
GPU_FLOP_PER_BYTE = 70
# Multiply-adds that one CPU core does per second on quantized weights, times two.
CPU_CORE_FLOPS = 40e9
# What a cell that the mask hides costs one core, for each head (1.2 ns on two cores of a 2.3 GHz
# Xeon).
CPU_HIDDEN_CELL_S = 2.4e-9
# A multiplication and an addition for the score, and the same for the value.
_ATTENTION_FLOP = 4.0
# Attention is timed by itself; in a model the weights between two layers have displaced what it
# left in the caches. With products of 32 MiB between attentions over 512 to 4,096 cells it took 4
# to 20 % longer than alone, 10 % in the middle (2.3 GHz Xeon).
CPU_COLD_ATTENTION = 1.1
# Tokens that the CPU's kernels take at once where weights are not in its own layout: tinyBLAS
# (llamafile/sgemm.cpp), and the columns of a chunk of ggml_compute_forward_mul_mat.
_TILES = {"q8_0": 4, "q4_0": 4, "q5_0": 4, "iq4_nl": 4, "q4_K": 16, "q5_K": 16, "q6_K": 16}
# What a curve of repacked weights needs to be told apart between its points.
_STEPS = frozenset((1, 2, 4, 8, 16))
# A drive's sequential read rate when nothing is known of it: a PCIe 3 NVMe.
DISK_BYTES_S = 2.0e9

# Sampling a token costs this much for each entry of the vocabulary: an array of all candidates is
# filled and searched (1.45–1.57 ns on a 2.3 GHz Xeon, 32,000 entries, greedy or the usual chain).
SAMPLE_S = 1.5e-9

# What an unknown rate is taken to be when two placements are compared. They only rank; a
# prediction never rests on them.
_ASSUMED_RAM_BYTES_S = 50e9
_ASSUMED_VRAM_BYTES_S = 500e9
_ASSUMED_LINK_BYTES_S = 12e9


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


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """One device at work on one model."""

    dense: Curve
    experts: Curve
    output: Curve  # the output matrix: one row of logits for each sequence
    attention: Mapping[str, AttentionRate]  # by the type of K
    token_s: float  # per token: norms, activations, positions, of all layers
    step_s: float  # per step: the operations of all layers, however little data they have
    bytes_s: float  # the memory's own rate, to tell what bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A machine at work on one model."""

    host: DeviceRates
    gpus: tuple[DeviceRates, ...]
    link_bytes_s: tuple[float, ...]
    disk_bytes_s: float
    step_s: float  # outside the graph
    sequence_s: float  # sampling, for each sequence
    basis: Basis


def rates_of(
    machine: Machine,
    mix: WeightMix,
    *,
    repacked: bool | None = None,
    n_threads: int | None = None,
) -> Rates:
    """The rates of a machine for a model's mixture of weights.

    `repacked` says whether weights in RAM are in the CPU's own layout; None: as the engine does it
    unasked, which is wherever no GPU wants them page-locked. `n_threads` None: as many as were
    measured with.
    """
    measured = machine.measured
    if repacked is None:
        repacked = not any(gpu.rules.pinned_host for gpu in machine.gpus)
    rows = [_device(measured, gpu.id) for gpu in machine.gpus]
    host_row = _device(measured, "cpu", n_threads)
    layout: Layout = "repacked" if repacked else "plain"
    return Rates(
        host=_measured(host_row, mix, layout, n_threads)
        if host_row
        else _host_from_table(machine, mix),
        gpus=tuple(
            _measured(row, mix, "plain") if row else _gpu_from_table(gpu, mix)
            for gpu, row in zip(machine.gpus, rows, strict=True)
        ),
        link_bytes_s=tuple(
            _link_bytes_s(gpu, row) for gpu, row in zip(machine.gpus, rows, strict=True)
        ),
        disk_bytes_s=(measured.disk_read_bytes_s if measured else None) or DISK_BYTES_S,
        step_s=(measured.step_s if measured else None) or 0.0,
        sequence_s=mix.n_vocab * (measured.sample_s or SAMPLE_S) if measured else 0.0,
        basis=_basis(machine, host_row, rows),
    )


def _basis(machine: Machine, host: DeviceTimes | None, gpus: Sequence[DeviceTimes | None]) -> Basis:
    if host and all(gpus):
        return "measured"
    known = (host is not None or machine.ram.bandwidth_bytes_s is not None) and all(
        row is not None or (gpu.bandwidth_bytes_s is not None and gpu.link_bytes_s is not None)
        for gpu, row in zip(machine.gpus, gpus, strict=True)
    )
    return "table" if known else "unknown"


def _device(
    measured: Measurements | None, device_id: str, n_threads: int | None = None
) -> DeviceTimes | None:
    """The device's times, if there is anything in them to predict from; of several, those with
    the nearest number of threads."""
    rows = [
        row
        for row in (measured.devices if measured else ())
        if row.id == device_id and row.products and row.attention
    ]
    if n_threads is None:
        return rows[0] if rows else None
    return min(rows, key=lambda row: abs(row.n_threads - n_threads), default=None)


def _link_bytes_s(gpu: Gpu, row: DeviceTimes | None) -> float:
    """Weights that stay in RAM are page-locked where the backend offers it."""
    found = (row.pinned_bytes_s if gpu.rules.pinned_host else row.pageable_bytes_s) if row else None
    return float(found or gpu.link_bytes_s or _ASSUMED_LINK_BYTES_S)


# ---- from a table


def _host_from_table(machine: Machine, mix: WeightMix) -> DeviceRates:
    cores = machine.cpu.physical_cores or machine.cpu.logical_cores
    bytes_s = (machine.ram.bandwidth_bytes_s or _ASSUMED_RAM_BYTES_S) * RAM_SHARE
    hidden_s = CPU_HIDDEN_CELL_S / cores / max(1, mix.head_dim)
    return _from_table(mix, bytes_s, cores * CPU_CORE_FLOPS, CPU_ATTENTION_SHARE, hidden_s)


def _gpu_from_table(gpu: Gpu, mix: WeightMix) -> DeviceRates:
    bytes_s = (gpu.bandwidth_bytes_s or _ASSUMED_VRAM_BYTES_S) * VRAM_SHARE
    return _from_table(mix, bytes_s, bytes_s * GPU_FLOP_PER_BYTE, 1.0)


def _from_table(
    mix: WeightMix, bytes_s: float, flops: float, attention_share: float, hidden_s: float = 0.0
) -> DeviceRates:
    curve = roofline(bytes_s, 2 * mix.elements_per_byte / flops)
    return DeviceRates(
        dense=curve,
        experts=gathered(curve, mix.n_expert, mix.n_expert_used) if mix.n_expert else curve,
        output=curve,
        attention={
            kv: AttentionRate(
                decode=flat(mix.cache_bytes(kv) / (bytes_s * attention_share)),
                prefill=flat(_ATTENTION_FLOP / flops),
                hidden_s=hidden_s,
            )
            for kv in KV_TYPES
        },
        token_s=0.0,
        step_s=0.0,
        bytes_s=bytes_s,
    )


# ---- from measurements


def _measured(
    row: DeviceTimes, mix: WeightMix, layout: Layout, n_threads: int | None = None
) -> DeviceRates:
    """Rates from a device's times; with other threads than those measured, in proportion."""
    slower = row.n_threads / n_threads if n_threads and row.n_threads else 1.0

    def curves(types: Mapping[str, int], gather: bool) -> Curve:
        found = [(_curve(row, t, layout, gather), n) for t, n in types.items()]
        whole = mixed(found)
        return Curve(
            tokens=whole.tokens, s_per_byte=tuple(value * slower for value in whole.s_per_byte)
        )

    dense = curves(mix.dense or mix.output, False)
    experts = dense
    if mix.experts:
        experts = gathered(curves(mix.experts, True), mix.n_expert, mix.n_expert_used)
    return DeviceRates(
        dense=dense,
        experts=experts,
        output=curves(mix.output, False) if mix.output else dense,
        attention={kv: _attention(row, kv, mix) for kv in KV_TYPES},
        token_s=mix.norm_elements * (row.norm_s or 0.0)
        + mix.gate_elements * (row.gate_s or 0.0)
        + mix.rope_elements * (row.rope_s or 0.0),
        step_s=mix.n_nodes * (row.node_s or 0.0),
        bytes_s=max(1 / point.s_per_byte for point in row.products if point.tokens == 1),
    )


def _curve(row: DeviceTimes, type_name: str, layout: Layout, gather: bool) -> Curve:
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


def _attention(row: DeviceTimes, kv: str, mix: WeightMix) -> AttentionRate:
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
