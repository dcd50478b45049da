"""What a machine does with one model: its kernels' times, or tables, as curves of that model.

Where `doctor --measure` has been, the engine's own kernels were timed on this machine for each type
of weights; elsewhere nominal bandwidths from tables stand in, with the shares that inference is
known to reach. `basis` says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loadmaster.machine.measurements import (
    DeviceTimes,
    Layout,
    Measurements,
)
from loadmaster.machine.types import Gpu, Machine
from loadmaster.plan.curve import Curve, flat, gathered, mixed, roofline
from loadmaster.plan.kernel_rates import AttentionRate, attention_rate, product_curve
from loadmaster.plan.types import KV_TYPES
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
        found = [(product_curve(row, t, layout, gather), n) for t, n in types.items()]
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
        attention={kv: attention_rate(row, kv, mix) for kv in KV_TYPES},
        token_s=mix.norm_elements * (row.norm_s or 0.0)
        + mix.gate_elements * (row.gate_s or 0.0)
        + mix.rope_elements * (row.rope_s or 0.0),
        step_s=mix.n_nodes * (row.node_s or 0.0),
        bytes_s=max(1 / point.s_per_byte for point in row.products if point.tokens == 1),
    )
