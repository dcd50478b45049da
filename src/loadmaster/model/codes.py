"""The numbers that quantized weights stand for: NormalFloat, 4-bit floats and evenly spaced ones.

Pure. A block of weights is kept as its largest magnitude (the scale) and, for each weight, the
index of a number from -1 to 1 that is multiplied by it. Formats differ in those numbers and in what
is a block. Values are bitsandbytes 0.50.2's (`functional.py`: get_4bit_type, create_dynamic_map).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# What one weight is divided by when a whole block is zero (`quantize_4bit`).
_TINY = 1e-38


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Numbers from -1 to 1 by the index that stands for them."""

    name: str
    bits: int
    values: tuple[float, ...]
    origin: int = 0  # the index that is kept as 0: even codes keep signed numbers

    @property
    def levels(self) -> tuple[float, ...]:
        """The numbers in order, each once."""
        return tuple(sorted(set(self.values)))

    @property
    def edges(self) -> tuple[float, ...]:
        """Between which two levels the nearer one changes."""
        return tuple((low + high) / 2 for low, high in pairwise(self.levels))


def _even(name: str, bits: int) -> Code:
    """Symmetric and evenly spaced: whole numbers up to 2^(bits-1) - 1 either way, over the last."""
    last = 2 ** (bits - 1) - 1
    values = tuple(i / last for i in range(-last, last + 1))
    return Code(name=name, bits=bits, values=values, origin=last)


def _dynamic_map() -> tuple[float, ...]:
    """Eight bits with more digits the larger the number: seven decades, of 1, 2, 4, … 64 steps
    (Dettmers, arXiv 1511.04561; `create_dynamic_map`). 1 is in it, -1 is not."""
    values = [0.0, 1.0]
    for decade in range(7):
        n, top = 2**decade, 10.0 ** (decade - 6)
        edges = [0.1 + 0.9 * i / n for i in range(n + 1)]
        middles = [top * (low + high) / 2 for low, high in pairwise(edges)]
        values += middles + [-middle for middle in middles]
    return tuple(sorted(values))


# QLoRA (arXiv 2305.14314), appendix E. Each side of zero is quantiles of the normal distribution,
# evenly spaced in probability from ½ to 1 - (1/32 + 1/30) / 2, over the largest of them: eight
# above zero, seven below (`create_normal_map`).
NF4 = Code(
    name="nf4",
    bits=4,
    values=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
# A sign, two bits of exponent and one of fraction, by bit pattern, over the largest. Zero is in it
# twice: fifteen numbers.
_FP4_HALF = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = Code(name="fp4", bits=4, values=(*_FP4_HALF, *(0.0 - value for value in _FP4_HALF)))
INT4 = _even("int4", 4)  # no format of the engine: what NF4 and FP4 are compared with
INT8 = _even("int8", 8)
DYNAMIC = Code(name="dynamic", bits=8, values=_dynamic_map())  # of scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Weights as kept: an index for each, a scale for each block."""

    code: Code
    block: int
    indices: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers that are in memory for them."""
        return tuple(index - self.code.origin for index in self.indices)

    @property
    def weights(self) -> list[float]:
        """What they are multiplied out to."""
        return restored(self.indices, self.scales, self.code, self.block)


def quantize(weights: Sequence[float], code: Code, block: int) -> Quantized:
    """Every weight by the nearest number of the code times its block's scale."""
    blocks = [weights[start : start + block] for start in range(0, len(weights), block)]
    scales = [max(map(abs, part)) for part in blocks]
    edges, index_of = code.edges, [code.values.index(level) for level in code.levels]
    indices = [
        index_of[bisect_right(edges, weight / max(scale, _TINY))]
        for part, scale in zip(blocks, scales, strict=True)
        for weight in part
    ]
    return Quantized(code=code, block=block, indices=tuple(indices), scales=tuple(scales))


def restored(
    indices: Sequence[int], scales: Sequence[float], code: Code, block: int
) -> list[float]:
    """Weights from indices and scales; the last block may be a part of one."""
    return [code.values[index] * scales[at // block] for at, index in enumerate(indices)]


def unpacked(packed: bytes, n: int) -> list[int]:
    """Indices of four bits, the first of each byte in its upper half."""
    return [half for byte in packed for half in (byte >> 4, byte & 15)][:n]


def nested_scales(
    indices: Sequence[int], scales: Sequence[float], offset: float, block: int
) -> list[float]:
    """Scales that were quantized themselves, after their mean was taken off."""
    return [value + offset for value in restored(indices, scales, DYNAMIC, block)]
