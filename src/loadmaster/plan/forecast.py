"""The speed of settings that are given, at any depth and for any number of sequences."""

from collections import Counter
from dataclasses import dataclass

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec, TensorSpec
from loadmaster.plan import layout
from loadmaster.plan.rates import Rates, rates_of
from loadmaster.plan.speed import Reads, Traffic, decode_costs, prefill_costs
from loadmaster.plan.types import CPU, EngineSettings
from loadmaster.plan.weights import is_output, is_routed, layer_widths, weight_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a machine will do with a model under fixed settings."""

    traffic: Traffic
    rates: Rates
    settings: EngineSettings

    def decode_s(self, depth: float, n_sequences: int = 1) -> float:
        """Seconds of a decode step of so many sequences, each with `depth` cells."""
        costs = decode_costs(self.traffic, self.rates, self.settings, depth, n_sequences)
        return sum(costs.values())

    def prefill_s(self, tokens: int, start: int = 0) -> float:
        """Seconds for a prompt of `tokens` behind `start` cells."""
        depth = start + tokens / 2
        return sum(prefill_costs(self.traffic, self.rates, self.settings, tokens, depth).values())


def forecast(machine: Machine, model: ModelSpec, settings: EngineSettings) -> Forecast:
    """Look at where the settings put everything."""
    pinned = any(machine.gpu(gpu).rules.pinned_host for gpu in layout.opened_gpus(settings))
    rates = rates_of(
        machine,
        weight_mix(model),
        repacked=settings.use_extra_bufts and not pinned,
        n_threads=settings.n_threads,
    )
    return Forecast(traffic=traffic_under(model, settings), rates=rates, settings=settings)


def traffic_under(model: ModelSpec, settings: EngineSettings) -> Traffic:
    """What a token moves where, tensor by tensor."""
    devices = layout.layer_devices(model, settings)
    read: dict[str, Counter[str]] = {name: Counter() for name in (*devices, CPU)}
    read |= {gpu: Counter() for gpu in layout.device_ids(settings)}
    apart: set[int] = set()
    host_bytes = 0
    for placed in layout.placed_tensors(model, settings):
        tensor, device = placed.tensor, placed.device
        use = _use(model, tensor)
        if use == "output" and tensor.name == "token_embd.weight":
            device = devices[-1]  # tied: products are made from the copy beside the last layer
            use = None if placed.duplicate else use
        if use is not None:
            read[device][use] += _read_bytes(model, tensor)
            host_bytes += int(tensor.size_bytes) if device == CPU else 0
        if tensor.layer is not None and device != devices[tensor.layer]:
            apart.add(tensor.layer)
    homes = [device if settings.offload_kqv else CPU for device in devices]
    widths = list(zip(layer_widths(model), homes, strict=False))
    on_host = [width for width, home in widths if home == CPU]
    on_gpu = [width for width, home in widths if home != CPU]
    return Traffic(
        host=_reads(read[CPU]),
        gpus=tuple(_reads(read[gpu]) for gpu in layout.device_ids(settings)),
        host_width=sum(width.full for width in on_host),
        gpu_width=sum(width.full for width in on_gpu),
        host_window_width=sum(width.windowed for width in on_host),
        gpu_window_width=sum(width.windowed for width in on_gpu),
        window=model.n_swa,
        host_layers=devices.count(CPU) / len(devices),
        streamed_bytes=host_bytes,
        handovers=len({device for device in devices if device != CPU}) + 2 * len(apart),
        expert_share=model.n_expert_used / model.n_expert if model.n_expert else 0.0,
    )


def _use(model: ModelSpec, tensor: TensorSpec) -> str | None:
    """How a step reads the tensor; None for rows that are looked up."""
    if tensor.name.partition(".")[0] in layout.ROW_LOOKUPS:
        tied = layout.is_tied(model) and tensor.name == "token_embd.weight"
        return "output" if tied else None
    if is_output(tensor):
        return "output"
    return "routed" if is_routed(model, tensor) else "dense"


def _read_bytes(model: ModelSpec, tensor: TensorSpec) -> int:
    size = int(tensor.size_bytes)
    return size * model.n_expert_used // model.n_expert if is_routed(model, tensor) else size


def _reads(sums: Counter[str]) -> Reads:
    return Reads(
        dense_bytes=sums["dense"], routed_bytes=sums["routed"], output_bytes=sums["output"]
    )
