"""How fast torch works on the devices of a machine: as timed by `doctor --measure`, or from tables.

Tables have bandwidths, and published latencies of launching a layer's operations. Of quantized
weights on a CPU nothing is published: there only measurements tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loadmaster.machine.measurements import (
    AttentionTime,
    DeviceTimes,
    Measurements,
    ProductTime,
)
from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.curve import Curve
from loadmaster.plan.hf_weights import COMPUTE_BYTES
from loadmaster.plan.rates import (
    CPU_CORE_FLOPS,
    GPU_FLOP_PER_BYTE,
    RAM_SHARE,
    VRAM_SHARE,
    Basis,
)
from loadmaster.plan.types import CPU, TransformersSettings

# Seconds to launch one layer's operations, by what its matrices are: from the decode latencies of
# bitsandbytes' own benchmark (benchmarking/README.md at 1b7b9bb4: Llama 3.1 8B and Qwen 2.5 14B on
# an RTX 4090, 0.45.0; NF4 14.8 ms and 21.4 ms, double-quantized 17.5 and 25.6, LLM.int8 44.9 and
# 64.8), divided by 32 and 48 layers. BF16 waits for memory there; its figure is the H100's, 24.4 ms
# for 32 layers, by the ratio of NF4 on both.
LAUNCH_S: Mapping[str, float] = {
    "plain": 0.34e-3, "nf4": 0.45e-3, "nf4-double": 0.54e-3, "int8": 1.38e-3, "fp8": 0.45e-3,
}  # fmt: skip
# The same on the benchmark's H100 host takes 2.3 times as long (NF4: 33.1 ms against 14.8): server
# CPUs have slower single cores.
SERVER_SLOWDOWN = 2.3
_SERVER_CPUS = ("xeon", "epyc", "neoverse", "altra")
ENGINE = "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRates:
    """One device at work. Without curves a product takes its bytes or its arithmetic."""

    bytes_s: float  # what its memory gives to products
    flops: float
    launch_s: float  # of one layer's operations, however little there is to do
    part_s: float = 0.0  # of attention in a layer, for each prompt of a step
    curves: Mapping[str, Curve] = field(default_factory=dict)  # per byte, by what the weights are
    decode: Curve | None = None  # attention, per query element and cell, by cells
    prefill: Curve | None = None
    norm_s: float = 0.0  # per element
    gate_s: float = 0.0
    rope_s: float = 0.0

    def faster(self, times: float) -> "TorchRates":
        """The same with kernels and memory so many times as fast; launching takes what it took."""

        def quick(curve: Curve | None) -> Curve | None:
            return curve and _scaled(curve, 1 / times)

        return TorchRates(
            bytes_s=self.bytes_s * times,
            flops=self.flops * times,
            launch_s=self.launch_s,
            part_s=self.part_s,
            curves={kind: _scaled(curve, 1 / times) for kind, curve in self.curves.items()},
            decode=quick(self.decode),
            prefill=quick(self.prefill),
            norm_s=self.norm_s / times,
            gate_s=self.gate_s / times,
            rope_s=self.rope_s / times,
        )


def _scaled(curve: Curve, factor: float) -> Curve:
    return Curve(
        tokens=curve.tokens, s_per_byte=tuple(value * factor for value in curve.s_per_byte)
    )


def kind_of(model: CheckpointSpec, settings: TransformersSettings) -> str:
    """What the matrices of the layers are, as far as speed goes."""
    kind, double = str(settings.quantize), settings.double_quant
    if model.stored is not None:  # of that the settings say nothing
        kind = {"bnb4": "nf4", "bnb8": "int8"}.get(model.stored.method, "fp8")
        double = model.stored.double_quant
    if kind in ("nf4", "fp4"):
        return "nf4-double" if double else "nf4"
    return kind


def launch_of(machine: Machine, model: CheckpointSpec, settings: TransformersSettings) -> float:
    """Seconds to launch one layer for a GPU of this host."""
    name = (machine.cpu.name or "").lower()
    slow = SERVER_SLOWDOWN if any(word in name for word in _SERVER_CPUS) else 1.0
    return slow * LAUNCH_S.get(kind_of(model, settings), LAUNCH_S["plain"])


def timed(machine: Machine, device: str) -> DeviceTimes | None:
    """What was timed of torch on a device."""
    measured = measured_by_torch(machine)
    row = measured.device(device) if measured else None
    return row if row and row.products and row.attention else None


def measured_by_torch(machine: Machine) -> Measurements | None:
    """The measurements, if they are of this engine: llama.cpp has other kernels."""
    return machine.measured if machine.measured and machine.measured.engine == ENGINE else None


def gpu_rates(
    machine: Machine, gpu: Gpu, model: CheckpointSpec, settings: TransformersSettings
) -> TorchRates:
    row = timed(machine, gpu.id)
    if row is not None:
        return _measured(row, kind_of(model, settings))
    bytes_s = (gpu.bandwidth_bytes_s or 1) * VRAM_SHARE
    return TorchRates(
        bytes_s=bytes_s,
        flops=bytes_s * GPU_FLOP_PER_BYTE,
        launch_s=launch_of(machine, model, settings),
    )


def host_rates(
    machine: Machine, model: CheckpointSpec, settings: TransformersSettings
) -> TorchRates:
    row = timed(machine, CPU)
    if row is not None:
        return _measured(row, kind_of(model, settings), row.n_threads / settings.n_threads)
    cores = machine.cpu.physical_cores or machine.cpu.logical_cores
    bytes_s = (machine.ram.bandwidth_bytes_s or 1) * RAM_SHARE
    return TorchRates(bytes_s=bytes_s, flops=cores * CPU_CORE_FLOPS, launch_s=0.0)


def basis_of(
    machine: Machine,
    gpus: tuple[Gpu, ...],
    model: CheckpointSpec,
    settings: TransformersSettings,
    *,
    streams: bool,
) -> Basis:
    """What the rates of the devices in use rest on."""
    if not gpus:
        if timed(machine, CPU) is not None:
            return "measured"
        plain = settings.quantize == "none" and model.stored is None
        known = machine.ram.bandwidth_bytes_s is not None
        return "table" if plain and known else "unknown"
    if streams and gpus[0].link_bytes_s is None:
        return "unknown"
    if all(timed(machine, gpu.id) is not None for gpu in gpus):
        return "measured"
    known = all(gpu.bandwidth_bytes_s is not None or timed(machine, gpu.id) for gpu in gpus)
    return "table" if known else "unknown"


# ---- from measurements


def _measured(row: DeviceTimes, kind: str, slower: float = 1.0) -> TorchRates:
    """Rates from a device's times; with other threads than those measured, in proportion."""
    curves = {
        name: _scaled(_curve(row, name), slower) for name in {point.type for point in row.products}
    }
    if kind == "nf4-double" and "nf4-double" in curves:
        curves |= {"nf4": curves["nf4-double"], "fp4": curves["nf4-double"]}
    elif "nf4" in curves:
        curves["fp4"] = curves["nf4"]
    layers = {layer.kind: layer.seconds for layer in row.layers}
    return TorchRates(
        bytes_s=max(1 / point.s_per_byte for point in row.products if point.tokens == 1) / slower,
        flops=max(_flops(point) for point in row.products) / slower,
        launch_s=layers.get(kind) or layers.get("none") or 0.0,
        part_s=layers.get("part") or 0.0,
        curves=curves,
        decode=_by_cells([point for point in row.attention if point.tokens == 1], slower),
        prefill=_by_cells([point for point in row.attention if point.tokens > 1], slower),
        norm_s=slower * (row.norm_s or 0.0),
        gate_s=slower * (row.gate_s or 0.0),
        rope_s=slower * (row.rope_s or 0.0),
    )


def _flops(point: ProductTime) -> float:
    """Of weights that are as computed with; the others are unpacked first."""
    each = COMPUTE_BYTES.get(point.type)
    return 2 * point.tokens / (each * point.s_per_byte) if each else 1.0


def _curve(row: DeviceTimes, name: str) -> Curve:
    by_tokens = {point.tokens: point.s_per_byte for point in row.products if point.type == name}
    return Curve(
        tokens=tuple(sorted(by_tokens)),
        s_per_byte=tuple(by_tokens[tokens] for tokens in sorted(by_tokens)),
    )


def _by_cells(points: list[AttentionTime], slower: float) -> Curve | None:
    """By cells; beyond those that were timed as with the most of them."""
    at = {point.cells: slower * point.s_per_element for point in points}
    if not at:
        return None
    cells = sorted(at)
    return Curve(tokens=(*cells, 1e9), s_per_byte=(*(at[count] for count in cells), at[cells[-1]]))
