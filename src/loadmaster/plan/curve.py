"""What a byte of weights costs in a step, by the number of tokens that share the step.

A product of few tokens waits for memory, one of many for arithmetic. Measured points say where the
turn is; without them it is the larger of two lines (the roofline of Williams, Waterman and
Patterson, CACM 52(4), 2009).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

FAR = 1e9  # more tokens or cells than there are
_SINGLE = 64  # up to here a token more or less shows
# Where a mixture of curves is tabulated: the sizes of steps that occur.
GRID = (*range(1, _SINGLE + 1), 96, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds per byte at some token counts, ascending: straight between, and beyond the last in
    proportion to the tokens, as arithmetic is."""

    tokens: tuple[float, ...]
    s_per_byte: tuple[float, ...]

    def at(self, tokens: float) -> float:
        """Seconds per byte in a step of `tokens` tokens."""
        index = bisect_left(self.tokens, tokens)
        if index == 0:
            return self.s_per_byte[0]
        if index == len(self.tokens):
            return self.s_per_byte[-1] * tokens / self.tokens[-1]
        left, right = self.tokens[index - 1], self.tokens[index]
        share = (tokens - left) / (right - left)
        return self.s_per_byte[index - 1] * (1 - share) + self.s_per_byte[index] * share


def roofline(bytes_s: float, s_per_token: float) -> Curve:
    """Flat at the bandwidth until arithmetic, `s_per_token` per byte and token, takes longer."""
    floor = 1 / bytes_s
    knee = max(1.0, floor / s_per_token)
    return Curve(tokens=(knee,), s_per_byte=(max(floor, s_per_token),))


def flat(seconds: float) -> Curve:
    """The same at every count that occurs."""
    return Curve(tokens=(1.0, FAR), s_per_byte=(seconds, seconds))


def by_fours(curve: Curve) -> Curve:
    """Of weights in the CPU's own layout, from points at 1, 2, 4, 8 and multiples of 16.

    The kernels take 16 tokens at once, then four, and those beyond singly, which are read from the
    caches (forward_mul_mat_one_chunk and the gemm of AVX-512 in ggml-cpu). q4_K on two cores of a
    Xeon, ps per byte: 86 for 4 tokens, 116, 143 and 177 for 5 to 7, 236 for 12, 215 for 16.
    """
    first, four = curve.at(1), curve.at(8) - curve.at(4)
    single = max(0.0, curve.at(2) - first)

    def cost(tokens: int) -> float:
        if tokens < 4:
            return first + (tokens - 1) * single
        whole = tokens // 16 * 16
        fours = (tokens - whole) // 4
        below = curve.at(whole) + fours * four if whole else curve.at(4) + (fours - 1) * four
        return below + tokens % 4 * single

    return _dense(curve, cost)


def in_tiles(curve: Curve, width: int) -> Curve:
    """Of kernels that take `width` tokens at once: a tile that is not full costs as much, once
    there is more than one (q8_0 of four: 95 ps per byte for 4 tokens, 143 for 5, 138 for 8)."""

    def cost(tokens: int) -> float:
        return curve.at(tokens if tokens <= width else ceil(tokens / width) * width)

    return _dense(curve, cost)


def _dense(curve: Curve, cost: Callable[[int], float]) -> Curve:
    """`cost` where a token more or less shows, the curve's own points beyond."""
    beyond = [
        (tokens, seconds)
        for tokens, seconds in zip(curve.tokens, curve.s_per_byte, strict=True)
        if tokens > _SINGLE
    ]
    return Curve(
        tokens=(*range(1, _SINGLE + 1), *(tokens for tokens, _ in beyond)),
        s_per_byte=(*map(cost, range(1, _SINGLE + 1)), *(seconds for _, seconds in beyond)),
    )


def gathered(curve: Curve, n_expert: int, n_used: int) -> Curve:
    """Of experts, per byte that one token reads (`n_used` of `n_expert` experts).

    With n tokens E·(1 − (1 − u/E)^n) experts are in use, each by its share of the tokens, if
    routing is even; `curve` is of one expert by the tokens it gets.
    """

    def cost(tokens: int) -> float:
        in_use = n_expert * (1 - (1 - n_used / n_expert) ** tokens)
        return in_use / n_used * curve.at(tokens * n_used / in_use)

    return Curve(tokens=GRID, s_per_byte=tuple(cost(tokens) for tokens in GRID))


def mixed(parts: Sequence[tuple[Curve, float]]) -> Curve:
    """Weights of several types, each with its share of the bytes."""
    total = sum(share for _, share in parts)
    return Curve(
        tokens=GRID,
        s_per_byte=tuple(
            sum(curve.at(tokens) * share for curve, share in parts) / total for tokens in GRID
        ),
    )
