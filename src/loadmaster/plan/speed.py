"""Speed from bytes moved: a roofline over RAM, VRAM, the link between them and the disk.

Decode reads every weight once per token from wherever it lives, so its time is a sum of bytes over
bandwidths (memory-bandwidth-bound; `docs/plan.md` has the sources). Prefill either computes
CPU-resident weights on the CPU or streams them over the link once per ubatch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loadmaster.machine.types import Machine
from loadmaster.plan.types import EngineSettings, Prediction, Workload

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
# A step's cost of handing over between devices, per boundary in the graph.
HANDOVER_S = 30e-6
# A drive's sequential read rate when nothing is known of it: a PCIe 3 NVMe.
DISK_BYTES_S = 2.0e9

# What an unknown rate is taken to be when two placements are compared. They only rank; a
# prediction never rests on them.
_ASSUMED_RAM_BYTES_S = 50e9
_ASSUMED_VRAM_BYTES_S = 500e9
_ASSUMED_LINK_BYTES_S = 12e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes per second that inference gets, and arithmetic rates."""

    ram_bytes_s: float
    vram_bytes_s: tuple[float, ...]
    link_bytes_s: tuple[float, ...]
    cpu_flops: float
    gpu_flops: tuple[float, ...]
    basis: Literal["table", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one token moves under a placement."""

    host_read_bytes: int  # weights read from RAM for one token
    gpu_read_bytes: tuple[int, ...]
    host_cache_bytes: int  # cache at full n_ctx, by where it lives
    gpu_cache_bytes: tuple[int, ...]
    disk_read_bytes: int  # weights beyond the RAM budget, read again for every token
    streamed_bytes: int  # CPU-resident weights sent to a GPU for a prefill of one ubatch
    handovers: int  # times the graph crosses from one device to another
    host_attention_width: int  # query elements, summed over layers whose cache is on the host
    flops_per_token: float


def rates_of(machine: Machine) -> Rates:
    """The rates of a machine from its table figures; unknown ones are marked by `basis`."""
    known = machine.ram.bandwidth_bytes_s is not None and all(
        gpu.bandwidth_bytes_s is not None and gpu.link_bytes_s is not None for gpu in machine.gpus
    )
    cores = machine.cpu.physical_cores or machine.cpu.logical_cores
    vram = tuple(
        (gpu.bandwidth_bytes_s or _ASSUMED_VRAM_BYTES_S) * VRAM_SHARE for gpu in machine.gpus
    )
    return Rates(
        ram_bytes_s=(machine.ram.bandwidth_bytes_s or _ASSUMED_RAM_BYTES_S) * RAM_SHARE,
        vram_bytes_s=vram,
        link_bytes_s=tuple(
            float(gpu.link_bytes_s or _ASSUMED_LINK_BYTES_S) for gpu in machine.gpus
        ),
        cpu_flops=cores * CPU_CORE_FLOPS,
        gpu_flops=tuple(rate * GPU_FLOP_PER_BYTE for rate in vram),
        basis="table" if known else "unknown",
    )


def decode_costs(traffic: Traffic, rates: Rates, fill: float) -> Mapping[str, float]:
    """Seconds per token by what bounds them, with the cache `fill` full (0…1)."""
    cache_rate = rates.ram_bytes_s * CPU_ATTENTION_SHARE
    vram = sum(
        (weights + fill * cache) / rate
        for weights, cache, rate in zip(
            traffic.gpu_read_bytes, traffic.gpu_cache_bytes, rates.vram_bytes_s, strict=True
        )
    )
    return {
        "ram-bandwidth": traffic.host_read_bytes / rates.ram_bytes_s
        + fill * traffic.host_cache_bytes / cache_rate,
        "vram-bandwidth": vram,
        "disk": traffic.disk_read_bytes / DISK_BYTES_S,
        "handover": traffic.handovers * HANDOVER_S,
    }


def prefill_costs(
    traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload, depth: float
) -> Mapping[str, float]:
    """Seconds for `workload.prompt_tokens`, by what bounds them, at `depth` cells in use."""
    tokens = workload.prompt_tokens
    n_ubatches = -(-tokens // settings.n_ubatch)
    all_read = traffic.host_read_bytes + sum(traffic.gpu_read_bytes)
    host_share = traffic.host_read_bytes / max(1, all_read)
    attention = 4.0 * tokens * depth * traffic.host_attention_width
    flops = traffic.flops_per_token * tokens
    streams = (
        settings.op_offload
        and rates.gpu_flops
        and min(tokens, settings.n_ubatch) >= settings.op_offload_min_batch
    )
    if streams:
        link = n_ubatches * traffic.streamed_bytes / max(rates.link_bytes_s)
        host_flops, gpu_flops = 0.0, flops
    else:
        link = 0.0
        host_flops, gpu_flops = flops * host_share, flops * (1 - host_share)
    return {
        "compute": (host_flops + attention) / rates.cpu_flops
        + (gpu_flops / max(rates.gpu_flops) if rates.gpu_flops else 0.0),
        "link": link,
        "disk": n_ubatches * traffic.disk_read_bytes / DISK_BYTES_S,
    }


def turn_s(traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload) -> float:
    """Seconds of one turn, prompt and answer, in a conversation that fills half of n_ctx.

    This is what a placement for `chat` minimises.
    """
    depth = settings.n_ctx / settings.n_seq_max / 2
    prefill = sum(prefill_costs(traffic, rates, settings, workload, depth).values())
    decode = sum(decode_costs(traffic, rates, 0.5).values())
    return prefill + workload.output_tokens * decode


def predict(
    traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload
) -> Prediction:
    """Speed at the start of a conversation. Without bandwidths there is no figure to give."""
    decode = decode_costs(traffic, rates, 0.0)
    if rates.basis == "unknown":
        return Prediction(
            decode_tok_s=None,
            prefill_tok_s=None,
            ttft_s=None,
            bound_by=max(decode, key=lambda cause: decode[cause]),
            basis="unknown",
        )
    prefill = sum(
        prefill_costs(traffic, rates, settings, workload, workload.prompt_tokens / 2).values()
    )
    decode_s = sum(decode.values())
    return Prediction(
        decode_tok_s=1 / decode_s,
        prefill_tok_s=workload.prompt_tokens / prefill,
        ttft_s=prefill + decode_s,
        bound_by=max(decode, key=lambda cause: decode[cause]),
        basis=rates.basis,
    )
