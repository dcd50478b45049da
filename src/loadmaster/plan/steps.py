"""What one step costs that feeds several sequences: tokens of answers, and tokens of prompts.

The same sum as in `speed`, for any mixture of the two: products by the number of tokens that share
the step, attention by the cells that each token passes over.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loadmaster.plan.kernel_rates import AttentionRate
from loadmaster.plan.rates import DeviceRates, Rates
from loadmaster.plan.speed import (
    BANDWIDTH_BOUND,
    HANDOVER_S,
    TILE_TOKENS,
    Reads,
    Traffic,
    host_bound,
    rest_s,
    seen_s,
    weights_s,
    without_output,
)
from loadmaster.plan.types import EngineSettings

Costs = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step feeds, and the cells that its tokens see in the mean."""

    n_decode: int
    n_prefill: int = 0
    n_outputs: int = 0  # rows of logits
    decode_cells: float = 0.0
    prefill_cells: float = 0.0
    used_cells: float = 0.0  # of the whole cache, shared ones once
    n_chunks: int = 0  # prompts that are fed

    @property
    def n_tokens(self) -> int:
        return self.n_decode + self.n_prefill


@dataclass(frozen=True, slots=True)
class Pass:
    """So many tokens that go over the weights together, `times` times in the mean."""

    n_tokens: int
    n_outputs: int
    times: float = 1.0


class StepCosts:
    """Costs of steps under one placement. Products are kept by their numbers of tokens, because a
    job asks for the same ones again and again."""

    def __init__(self, traffic: Traffic, rates: Rates, settings: EngineSettings) -> None:
        self.traffic = traffic
        self.rates = rates
        self.settings = settings
        self._products: dict[tuple[int, int], Costs] = {}

    def of(self, step: Step, passes: Sequence[Pass] = ()) -> dict[str, float]:
        """Seconds by what bounds them; `passes` over the weights, if it takes several."""
        costs = {"attention": _attention_s(self.traffic, self.rates, self.settings, step)}
        for part in passes or (Pass(step.n_tokens, step.n_outputs),):
            for cause, seconds in self._products_of(part.n_tokens, part.n_outputs).items():
                _add(costs, cause, part.times * seconds)
        return costs

    def _products_of(self, n_tokens: int, n_outputs: int) -> Costs:
        key = n_tokens, n_outputs
        if key not in self._products:
            self._products[key] = _product_costs(self.traffic, self.rates, self.settings, *key)
        return self._products[key]

    def seconds(self, step: Step) -> float:
        """Seconds of the step."""
        return sum(self.of(step).values())


def streams(settings: EngineSettings, rates: Rates, tokens: int) -> bool:
    """Whether the engine sends host weights to a GPU for a product of so many tokens."""
    return settings.op_offload and bool(rates.gpus) and tokens >= settings.op_offload_min_batch


def _product_costs(
    traffic: Traffic, rates: Rates, settings: EngineSettings, tokens: int, n_outputs: int
) -> Costs:
    """Everything but attention."""
    costs = {
        "disk": traffic.disk_read_bytes / rates.disk_bytes_s,
        "handover": traffic.handovers * HANDOVER_S,
        "overhead": rates.step_s
        + n_outputs * rates.sequence_s
        + rest_s(traffic, rates, steps=1, tokens=tokens),
    }
    for reads, gpu in zip(traffic.gpus, rates.gpus, strict=True):
        _add(costs, _gpu_bound(reads, gpu, tokens), weights_s(reads, gpu, tokens, n_outputs))
    layers = without_output(traffic.host)
    output = Reads(output_bytes=traffic.host.output_bytes)
    for part, n in ((layers, tokens), (output, n_outputs)):
        if part.total_bytes and streams(settings, rates, n):
            fastest = max(range(len(rates.gpus)), key=lambda gpu: rates.link_bytes_s[gpu])
            gpu = rates.gpus[fastest]
            _add(costs, _gpu_bound(part, gpu, n), weights_s(part, gpu, n, n))
            _add(costs, "link", _sent_bytes(traffic, part, n) / rates.link_bytes_s[fastest])
        elif part.total_bytes:
            seconds = weights_s(part, rates.host, n, n)
            _add(costs, host_bound(traffic, rates, seconds), seconds)
    return costs


def _add(costs: dict[str, float], cause: str, seconds: float) -> None:
    costs[cause] = costs.get(cause, 0.0) + seconds


def _gpu_bound(reads: Reads, gpu: DeviceRates, tokens: int) -> str:
    seconds = weights_s(reads, gpu, tokens, tokens)
    computes = reads.total_bytes / gpu.bytes_s < BANDWIDTH_BOUND * seconds
    return "gpu-compute" if computes else "vram-bandwidth"


def _sent_bytes(traffic: Traffic, part: Reads, tokens: int) -> float:
    """Bytes that go over the link: of experts only those that some token uses."""
    if part.output_bytes:
        return part.output_bytes
    whole = traffic.streamed_bytes - traffic.host.output_bytes
    if not traffic.expert_share:
        return whole
    experts = min(float(whole), traffic.host.routed_bytes / traffic.expert_share)
    return whole - experts * (1 - traffic.expert_share) ** tokens


# ---- attention


# Caches that the CPU's attention takes in tiles (use_tiled in ggml-cpu/ops.cpp).
_TILED_TYPES = ("f16", "f32")
# Arithmetic of the CPU's attention without tiles against that with them: 5.2 times as slow with a
# q8_0 cache and 256 tokens, 5.5 to 6.4 times with f16 and one (2.3 GHz Xeon, head size 128).
_UNTILED_SLOWER = 5.0


def _attention_s(traffic: Traffic, rates: Rates, settings: EngineSettings, step: Step) -> float:
    host = _Side(traffic.host_width, traffic.host_window_width, traffic.window)
    measured = rates.basis == "measured"
    seconds = _host_s(host, rates.host.attention[settings.type_k], settings, step, measured)
    if rates.gpus:
        gpu = _Side(traffic.gpu_width, traffic.gpu_window_width, traffic.window)
        seconds += _gpu_s(gpu, rates.gpus[0].attention[settings.type_k], settings, step)
    return seconds


@dataclass(frozen=True, slots=True)
class _Side:
    """Query elements of the layers whose cache is on the host, or on GPUs."""

    width: int
    window_width: int
    window: int

    def seen_s(self, cells: float, cost: Callable[[float], float]) -> float:
        """Seconds of one token that sees so many cells."""
        return seen_s(self.width, self.window_width, self.window, cells, cost)

    def all_s(self, cells: float, n_sequences: int, cost: Callable[[float], float]) -> float:
        """The same where it passes over the cells of all sequences."""
        windowed = min(cells, self.window * max(1, n_sequences)) if self.window else cells
        return self.width * cost(cells) + self.window_width * cost(windowed)


def _host_s(
    side: _Side, rate: AttentionRate, settings: EngineSettings, step: Step, measured: bool
) -> float:
    """A token sees its own cells and skips those of others. In tiles a cell that one token sees is
    computed for all: those of answers lie mixed, so that every token computes them all."""
    if not side.width and not side.window_width:
        return 0.0
    together = settings.kv_unified or step.n_decode <= 1
    # Tiles are of tokens of one cache: with a cache for each sequence an answer is alone in its.
    decode_many = together and step.n_tokens >= TILE_TOKENS
    prefill_many = (step.n_tokens if together else step.n_prefill) >= TILE_TOKENS
    tiled = settings.type_k in _TILED_TYPES
    if tiled and decode_many and step.n_decode > 1:
        decode = side.all_s(step.used_cells, step.n_decode, rate.prefill_s)
    else:
        cost = _host_cost(rate, step, decode_many, tiled, measured)
        decode = side.seen_s(step.decode_cells, cost)
        decode += _hidden_s(side, rate, settings, step.used_cells - step.decode_cells)
    cost = _host_cost(rate, step, prefill_many, tiled, measured)
    prefill = side.seen_s(step.prefill_cells, cost)
    prefill += _hidden_s(side, rate, settings, step.used_cells - step.prefill_cells)
    return step.n_decode * decode + step.n_prefill * prefill


def _host_cost(
    rate: AttentionRate, step: Step, many: bool, tiled: bool, measured: bool
) -> Callable[[float], float]:
    """Of a token among many or of one by itself. A table has one rate of arithmetic, of tiles."""
    if measured or step.n_tokens == 1 or (many and tiled):
        return rate.prefill_s if many else rate.decode_s
    return _untiled(rate)


def _untiled(rate: AttentionRate) -> Callable[[float], float]:
    """From a table: whichever is slower, reading or arithmetic without tiles."""
    return lambda cells: max(rate.decode_s(cells), _UNTILED_SLOWER * rate.prefill_s(cells))


def _hidden_s(side: _Side, rate: AttentionRate, settings: EngineSettings, cells: float) -> float:
    """Seconds of one token for the cells of others, whom the mask hides."""
    if not settings.kv_unified or cells <= 0:
        return 0.0
    return (side.width + side.window_width) * cells * rate.hidden_s


def _gpu_s(side: _Side, rate: AttentionRate, settings: EngineSettings, step: Step) -> float:
    """In a unified cache every token computes every cell in use (the kernels skip none but those
    behind the last), and the cells are read once for all tokens of a tile."""
    if not side.width and not side.window_width:
        return 0.0
    cost = rate.prefill_s if step.n_tokens >= TILE_TOKENS else rate.decode_s
    if not settings.kv_unified:
        decode = step.n_decode * side.seen_s(step.decode_cells, rate.decode_s)
        return decode + step.n_prefill * side.seen_s(step.prefill_cells, cost)
    reading = side.all_s(step.used_cells, step.n_decode, rate.decode_s)
    computing = step.n_tokens * side.all_s(step.used_cells, step.n_decode, rate.prefill_s)
    return max(reading, computing)


# ---- where weights in RAM are multiplied


def crossing_tokens(traffic: Traffic, rates: Rates, most: int) -> int | None:
    """From how many tokens on (a power of two) sending the host's weights to a GPU is quicker than
    computing there; None where it is not at `most` either."""
    crossing = None
    tokens = 1 << (max(1, most).bit_length() - 1)
    while tokens >= 1 and _sent_s(traffic, rates, tokens) < _stayed_s(traffic, rates, tokens):
        crossing = tokens
        tokens //= 2
    return crossing


def _sent_s(traffic: Traffic, rates: Rates, tokens: int) -> float:
    fastest = max(range(len(rates.gpus)), key=lambda gpu: rates.link_bytes_s[gpu])
    layers = without_output(traffic.host)
    sent = _sent_bytes(traffic, layers, tokens) / rates.link_bytes_s[fastest]
    return sent + weights_s(layers, rates.gpus[fastest], tokens, 0)


def _stayed_s(traffic: Traffic, rates: Rates, tokens: int) -> float:
    return weights_s(without_output(traffic.host), rates.host, tokens, 0)
