"""Speed from bytes moved: a roofline for each step, over RAM, VRAM, the link and the disk.

A step reads every weight that its tokens use once, from wherever it lives; what a byte costs then
depends on how many tokens share the step (`curve`, `rates`). Attention adds for every cell in use,
and the rest (norms, activations, handing over between devices) is counted too. `docs/speed.md` has
the formulas with their sources.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loadmaster.plan.rates import DeviceRates, Rates
from loadmaster.plan.types import EngineSettings, Prediction, Workload

# A step's cost of handing over between devices, per boundary in the graph.
HANDOVER_S = 30e-6
# From this many tokens on, the engine's flash attention works in tiles (GGML_FA_TILE_Q of
# ggml-cpu/common.h; the matrix kernels of CUDA begin lower).
TILE_TOKENS = 64
# Weights that arrive at less than this share of the memory's own rate wait for arithmetic.
BANDWIDTH_BOUND = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Weights on one device that one token reads."""

    dense_bytes: int = 0
    routed_bytes: int = 0
    output_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.routed_bytes + self.output_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a token moves and attends to under a placement.

    Widths are query elements, summed over the layers whose cache is on that side; windowed layers
    see no more than `window` cells.
    """

    host: Reads
    gpus: tuple[Reads, ...]
    host_width: int
    gpu_width: int
    host_window_width: int = 0
    gpu_window_width: int = 0
    window: int = 0
    host_layers: float = 1.0  # share of the layers that compute on the host
    disk_read_bytes: int = 0  # weights beyond the RAM budget, read again for every token
    streamed_bytes: int = 0  # CPU-resident weights sent to a GPU for a prefill of one ubatch
    handovers: int = 0  # times the graph crosses from one device to another
    expert_share: float = 0.0  # of a layer's experts, those that one token uses

    @property
    def host_read_bytes(self) -> int:
        return self.host.total_bytes

    @property
    def host_bytes(self) -> int:
        """All weights on the host that products are made with, every expert counted."""
        experts = self.host.routed_bytes
        whole = int(experts / self.expert_share) if self.expert_share else experts
        return self.host.total_bytes - experts + whole


def weights_s(reads: Reads, rates: DeviceRates, tokens: float, n_outputs: float) -> float:
    """Seconds for the products of a step: each byte once, at the rate that `tokens` allow."""
    return (
        reads.dense_bytes * rates.dense.at(tokens)
        + reads.routed_bytes * rates.experts.at(tokens)
        + reads.output_bytes * rates.output.at(n_outputs)
    )


def decode_costs(
    traffic: Traffic, rates: Rates, settings: EngineSettings, depth: float, n_sequences: int = 1
) -> Mapping[str, float]:
    """Seconds of a decode step by what bounds them: one token for each of `n_sequences`, each
    with `depth` cells in use."""
    host = weights_s(traffic.host, rates.host, n_sequences, n_sequences)
    vram = sum(
        weights_s(reads, gpu, n_sequences, n_sequences)
        for reads, gpu in zip(traffic.gpus, rates.gpus, strict=True)
    )
    return {
        host_bound(traffic, rates, host): host,
        "vram-bandwidth": vram,
        "attention": n_sequences
        * _decode_attention_s(traffic, rates, settings, depth, n_sequences),
        "disk": traffic.disk_read_bytes / rates.disk_bytes_s,
        "handover": traffic.handovers * HANDOVER_S,
        "overhead": rates.step_s
        + n_sequences * rates.sequence_s
        + rest_s(traffic, rates, steps=1, tokens=n_sequences),
    }


def host_bound(traffic: Traffic, rates: Rates, seconds: float) -> str:
    at_full_rate = traffic.host_read_bytes / rates.host.bytes_s
    return "cpu-compute" if at_full_rate < BANDWIDTH_BOUND * seconds else "ram-bandwidth"


def _decode_attention_s(
    traffic: Traffic, rates: Rates, settings: EngineSettings, depth: float, n_sequences: int
) -> float:
    """Seconds for one token. In a unified cache it also passes over the cells of the others, whom
    the mask hides."""
    host = rates.host.attention[settings.type_k]
    hidden = depth * (n_sequences - 1) if settings.kv_unified else 0.0
    seconds = seen_s(
        traffic.host_width, traffic.host_window_width, traffic.window, depth, host.decode_s
    )
    seconds += (traffic.host_width + traffic.host_window_width) * hidden * host.hidden_s
    if rates.gpus:
        gpu = rates.gpus[0].attention[settings.type_k]
        seconds += seen_s(
            traffic.gpu_width, traffic.gpu_window_width, traffic.window, depth, gpu.decode_s
        )
        seconds += (traffic.gpu_width + traffic.gpu_window_width) * hidden * gpu.hidden_s
    return seconds


def seen_s(
    width: int, window_width: int, window: int, depth: float, cost: Callable[[float], float]
) -> float:
    """Seconds of one token's attention to the cells it sees."""
    windowed = min(depth, window) if window else depth
    return width * cost(depth) + window_width * cost(windowed)


def rest_s(traffic: Traffic, rates: Rates, *, steps: float, tokens: float) -> float:
    """Norms, activations, positions: a cost for each step and one for each token."""
    host, share = rates.host, traffic.host_layers
    seconds = share * (steps * host.step_s + tokens * host.token_s)
    if rates.gpus:
        gpu = rates.gpus[0]
        seconds += (1 - share) * (steps * gpu.step_s + tokens * gpu.token_s)
    return seconds


def prefill_costs(
    traffic: Traffic,
    rates: Rates,
    settings: EngineSettings,
    tokens: int,
    depth: float,
) -> Mapping[str, float]:
    """Seconds for a prompt of `tokens`, by what bounds them, at `depth` cells in use on average."""
    n_ubatch = max(1, min(tokens, settings.n_ubatch))
    whole, rest = divmod(tokens, n_ubatch)
    chunks = [(whole, n_ubatch)] + ([(1, rest)] if rest else [])
    link = compute = 0.0
    for count, size in chunks:
        seconds, streamed = _chunk_s(traffic, rates, settings, size)
        compute += count * seconds
        link += count * streamed
    compute += traffic.host.output_bytes * rates.host.output.at(1)
    compute += sum(
        reads.output_bytes * gpu.output.at(1)
        for reads, gpu in zip(traffic.gpus, rates.gpus, strict=True)
    )
    n_steps = whole + bool(rest)
    return {
        "compute": compute,
        "attention": tokens * _prefill_attention_s(traffic, rates, settings, depth, n_ubatch),
        "link": link,
        "disk": n_steps * traffic.disk_read_bytes / rates.disk_bytes_s,
        "overhead": n_steps * rates.step_s + rest_s(traffic, rates, steps=n_steps, tokens=tokens),
    }


def _chunk_s(
    traffic: Traffic, rates: Rates, settings: EngineSettings, tokens: int
) -> tuple[float, float]:
    """Seconds of the products of one ubatch, and of sending weights for it over the link.

    From `op_offload_min_batch` tokens on the engine computes host weights on a GPU; the copy and
    the product do not overlap (ggml_backend_tensor_copy is synchronous for host sources).
    """
    gpus = sum(
        weights_s(without_output(reads), gpu, tokens, 0)
        for reads, gpu in zip(traffic.gpus, rates.gpus, strict=True)
    )
    streams = settings.op_offload and bool(rates.gpus) and tokens >= settings.op_offload_min_batch
    if not streams:
        return gpus + weights_s(without_output(traffic.host), rates.host, tokens, 0), 0.0
    fastest = max(range(len(rates.gpus)), key=lambda index: rates.link_bytes_s[index])
    there = weights_s(without_output(traffic.host), rates.gpus[fastest], tokens, 0)
    return gpus + there, traffic.streamed_bytes / rates.link_bytes_s[fastest]


def without_output(reads: Reads) -> Reads:
    """Without the output matrix, which a prompt needs once and not for each token."""
    return Reads(dense_bytes=reads.dense_bytes, routed_bytes=reads.routed_bytes)


def _prefill_attention_s(
    traffic: Traffic, rates: Rates, settings: EngineSettings, depth: float, n_ubatch: int
) -> float:
    """Seconds for one token of a prompt."""
    if n_ubatch < TILE_TOKENS:
        return _decode_attention_s(traffic, rates, settings, depth, 1)
    host = rates.host.attention[settings.type_k].prefill_s
    seconds = seen_s(traffic.host_width, traffic.host_window_width, traffic.window, depth, host)
    if rates.gpus:
        gpu = rates.gpus[0].attention[settings.type_k].prefill_s
        seconds += seen_s(traffic.gpu_width, traffic.gpu_window_width, traffic.window, depth, gpu)
    return seconds


# ---- what is asked of it


def turn_s(traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload) -> float:
    """Seconds of one turn, prompt and answer, in a conversation that fills half of n_ctx.

    This is what a placement for `chat` is chosen by.
    """
    depth = settings.n_ctx / settings.n_seq_max / 2
    prefill = sum(prefill_costs(traffic, rates, settings, workload.prompt_tokens, depth).values())
    decode = sum(decode_costs(traffic, rates, settings, depth).values())
    return prefill + workload.output_tokens * decode


def predict(
    traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload
) -> Prediction:
    """Speed of a first prompt and of the answer to it. Without bandwidths there is no figure."""
    prompt = workload.prompt_tokens
    costs = decode_costs(traffic, rates, settings, prompt)
    bound_by = max(costs, key=lambda cause: costs[cause])
    if rates.basis == "unknown":
        return Prediction(
            decode_tok_s=None, prefill_tok_s=None, ttft_s=None, bound_by=bound_by, basis="unknown"
        )
    prefill = sum(prefill_costs(traffic, rates, settings, prompt, prompt / 2).values())
    decode = sum(costs.values())
    return Prediction(
        decode_tok_s=1 / decode,
        prefill_tok_s=prompt / prefill,
        ttft_s=prefill + decode,
        bound_by=bound_by,
        basis=rates.basis,
        jobs_per_hour=_jobs_per_hour(traffic, rates, settings, workload, prefill),
    )


def _jobs_per_hour(
    traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload, prefill_s: float
) -> float:
    """Prompts and answers of the workload's lengths, with as many sequences at once as planned."""
    n = settings.n_seq_max
    depth = workload.prompt_tokens + workload.output_tokens / 2
    step = sum(decode_costs(traffic, rates, settings, depth, n).values())
    return 3600 * n / (n * prefill_s + workload.output_tokens * step)
