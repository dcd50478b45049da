"""Products of weights, by type, layout and number of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadmaster.engine.timing import TimeProducts
from loadmaster.machine.measurements import Layout, ProductTime
from loadmaster.model.quants import BY_NAME
from loadmaster.plan.types import CPU
from loadmaster.tasks.measuring.asking import RUNS, Ask, undisturbed
from loadmaster.tasks.measuring.scale import Scale

# What is timed at every number of tokens, and what at a few; the time limit cuts the end.
COMMON_TYPES = ("q4_K", "q6_K", "q8_0", "f16")
OTHER_TYPES = (
    "q5_K", "q4_0", "iq4_xs", "q3_K", "mxfp4", "iq3_xxs", "q2_K", "bf16", "iq2_xs", "q5_0",
    "iq4_nl",
)  # fmt: skip
REPACKED_TYPES = frozenset({"q4_0", "q4_K", "q2_K", "q5_K", "q6_K", "q8_0", "iq4_nl", "mxfp4"})
# The fewest tokens last: fresh weights are still on their way from the caches to memory at first.
ALL_POINTS = (512, 64, 16, 8, 4, 2, 1)
FEW_POINTS = (512, 8, 1)
# Timed a second time at the end: a neighbour on the same memory stays for seconds.
SECOND_POINTS = (16, 4, 1)
_SAME = 1.1
_EXPERT_POINTS = (64, 8, 1)
# Types that published files have their experts in.
EXPERT_TYPES = frozenset({"q4_K", "q6_K", "q8_0"})
_N_EXPERT = 8


def merged(products: Sequence[ProductTime], again: Sequence[ProductTime]) -> Iterator[ProductTime]:
    """Each time with what a second look some seconds later gave: their mean; the shorter one where
    they differ, for then something ran beside the other."""
    second = {(it.type, it.layout, it.gathered, it.tokens): it.s_per_byte for it in again}
    for row in products:
        key = (row.type, row.layout, row.gathered, row.tokens)
        low, high = sorted((row.s_per_byte, second.get(key, row.s_per_byte)))
        yield replace(row, s_per_byte=low if high > low * _SAME else (low + high) / 2)


def product_times(
    ask: Ask, device: str, quant: str, scale: Scale, tokens: Sequence[int]
) -> list[ProductTime]:
    """Times of one type; in the CPU's own layout too, where it has one. Of the rarer types that
    one alone: the engine takes it wherever no GPU wants page-locked weights."""
    repacked: list[ProductTime] = []
    if device == CPU and quant in REPACKED_TYPES:
        repacked = _rows(ask, device, quant, "repacked", scale, tokens)
    if repacked and quant in OTHER_TYPES:
        return repacked
    return _rows(ask, device, quant, "plain", scale, tokens) + repacked


def expert_times(ask: Ask, device: str, quant: str, scale: Scale) -> list[ProductTime]:
    layout: Layout = "plain"
    rows = _rows(ask, device, quant, layout, scale, _EXPERT_POINTS, n_expert=_N_EXPERT)
    if device == CPU and quant in REPACKED_TYPES:
        rows += _rows(ask, device, quant, "repacked", scale, _EXPERT_POINTS, n_expert=_N_EXPERT)
    return rows


def _rows(
    ask: Ask,
    device: str,
    quant: str,
    layout: Layout,
    scale: Scale,
    tokens: Sequence[int],
    *,
    n_expert: int = 0,
) -> list[ProductTime]:
    """Every token takes every expert, so that each expert gets a column from each token."""
    n_out = scale.n_out // max(1, n_expert)
    size = BY_NAME[quant].row_bytes(scale.n_in) * n_out * max(1, n_expert)
    n_matrices = max(1, scale.weight_bytes // size)
    flops = 2.0 * scale.n_in * n_out * max(1, n_expert)
    points = tuple(
        (count, max(1, min(n_matrices, int(scale.flops / (flops * count))))) for count in tokens
    )
    seconds = ask(
        TimeProducts(
            device=device,
            n_threads=scale.n_threads,
            type=quant,
            repacked=layout == "repacked",
            n_in=scale.n_in,
            n_out=n_out,
            n_matrices=n_matrices,
            points=points,
            runs=RUNS,
            n_expert=n_expert,
            n_used=n_expert,
        )
    )
    if seconds is None:
        return []
    return [
        ProductTime(
            type=quant,
            layout=layout,
            gathered=n_expert > 0,
            tokens=count,
            s_per_byte=undisturbed(seconds[i * RUNS : (i + 1) * RUNS]) / (size * used),
        )
        for i, (count, used) in enumerate(points)
    ]
