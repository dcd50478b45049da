"""How far quantized weights are from what they were, if those are Gaussian: by integrals. Pure.

A block's scale is its largest magnitude m. Given m, the other weights are a Gaussian cut off at ±m,
whose squared distance to the nearest of m times the code's numbers is a sum over the code's bins of
closed forms. The distribution of m is known: all of the block are within m. What is left is one
integral over m, a sum here. Scales that are quantized too (double quantization) go the same way,
with the distribution of m less its mean in place of the Gaussian.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import erf, exp, pi, sqrt
from typing import Protocol

from loadmaster.model.codes import DYNAMIC, Code

Moments = tuple[float, float, float]  # integrals of 1, x and x² over the density

_N_STEPS = 200  # of the integral over m; 400 change the result by less than 10⁻⁵ of it
_N_FINE = 1024  # of the table of scales
_REACH = 8.0  # standard deviations: beyond are 10⁻¹⁵ of a Gaussian
_NEGLIGIBLE = 1e-10  # of a step's probability


class Spread(Protocol):
    """A distribution."""

    reach: float  # all of it is within ±reach

    def moments(self, x: float) -> Moments:
        """The integrals from below up to x."""
        ...


class Gaussian:
    """The normal distribution of mean 0 and variance 1."""

    reach = _REACH

    def moments(self, x: float) -> Moments:
        mass, density = (1 + erf(x / sqrt(2))) / 2, exp(-x * x / 2) / sqrt(2 * pi)
        return mass, -density, mass - x * density


class Tabulated:
    """A distribution by probabilities of points in order, each spread evenly around its point."""

    def __init__(self, points: Sequence[float], probabilities: Sequence[float]) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(points)]
        self._edges = [2 * points[0] - middles[0], *middles, 2 * points[-1] - middles[-1]]
        rows = [(p, p * x, p * x * x) for x, p in zip(points, probabilities, strict=True)]
        columns = (list(accumulate(column, initial=0.0)) for column in zip(*rows, strict=True))
        self._sums: list[Moments] = list(zip(*columns, strict=True))
        self.reach = max(map(abs, self._edges))

    def moments(self, x: float) -> Moments:
        index = bisect_right(self._edges, x)
        if index in (0, len(self._edges)):
            return self._sums[max(0, index - 1)]
        low, high = self._edges[index - 1], self._edges[index]
        part = (x - low) / (high - low)
        before, after = self._sums[index - 1], self._sums[index]
        return (
            before[0] + part * (after[0] - before[0]),
            before[1] + part * (after[1] - before[1]),
            before[2] + part * (after[2] - before[2]),
        )


GAUSSIAN = Gaussian()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Largest:
    """A value of the largest magnitude of a block, its probability, and how often it is above 0."""

    value: float
    probability: float
    above: float


def squared_error(spread: Spread, code: Code, block: int) -> float:
    """The mean squared distance of a number of a block to what is restored of it."""
    levels = code.levels
    total = 0.0
    for m in _largest(spread, block, _N_STEPS):
        rest = _within(spread, code, m.value)
        top = m.above * (1 - levels[-1]) ** 2 + (1 - m.above) * (1 + levels[0]) ** 2
        total += m.probability * ((block - 1) * rest + top * m.value**2) / block
    return total


def _largest(spread: Spread, block: int, n_steps: int) -> Iterator[_Largest]:
    """The distribution of a block's largest magnitude, in steps."""
    edges = [spread.reach * i / n_steps for i in range(n_steps + 1)]
    above = [spread.moments(edge)[0] for edge in edges]
    below = [spread.moments(-edge)[0] for edge in edges]
    for i, (low, high) in enumerate(pairwise(edges)):
        inner, outer = above[i] - below[i], above[i + 1] - below[i + 1]
        probability = max(outer, 0.0) ** block - max(inner, 0.0) ** block
        if probability > _NEGLIGIBLE:
            part = (above[i + 1] - above[i]) / (outer - inner)
            yield _Largest(value=(low + high) / 2, probability=probability, above=part)


def _within(spread: Spread, code: Code, m: float) -> float:
    """The same of numbers within ±m, for a scale of m."""
    edges = [-m, *(m * edge for edge in code.edges), m]
    moments = [spread.moments(edge) for edge in edges]
    total = 0.0
    for level, before, after in zip(code.levels, moments, moments[1:], strict=False):
        value = m * level
        mass, first, second = after[0] - before[0], after[1] - before[1], after[2] - before[2]
        total += second - 2 * value * first + value * value * mass
    return total / (moments[-1][0] - moments[0][0])


# ---- figures


@lru_cache(maxsize=64)
def relative_error(code: Code, block: int, nested_block: int | None = None) -> float:
    """The root of the mean squared error over that of the weights themselves.

    With `nested_block` scales are quantized once more. Their error multiplies the code's numbers;
    it is taken as independent of the weights' own, which adds the squares.
    """
    squared = squared_error(GAUSSIAN, code, block)
    if nested_block is not None:
        squared += _mean_square(code, block) * squared_error(_scales(block), DYNAMIC, nested_block)
    return sqrt(squared)


def _scales(block: int) -> Tabulated:
    """Scales of blocks of Gaussian weights, less their mean."""
    steps = list(_largest(GAUSSIAN, block, _N_FINE))
    mean = sum(step.value * step.probability for step in steps)
    return Tabulated(
        [step.value - mean for step in steps], [step.probability for step in steps]
    )  # fmt: skip


def _mean_square(code: Code, block: int) -> float:
    """Of the numbers that stand for the weights of a block."""
    total = 0.0
    for m in _largest(GAUSSIAN, block, _N_STEPS):
        edges = [-m.value, *(m.value * edge for edge in code.edges), m.value]
        masses = [b - a for a, b in pairwise(GAUSSIAN.moments(edge)[0] for edge in edges)]
        inner = sum(p * level**2 for p, level in zip(masses, code.levels, strict=True))
        total += m.probability * ((block - 1) * inner / sum(masses) + 1) / block
    return total


def density_over_scale(block: int, ratio: float) -> float:
    """How densely Gaussian weights lie at a ratio to their block's scale, the largest left out."""
    total = 0.0
    for m in _largest(GAUSSIAN, block, _N_STEPS // 2):
        inside = erf(m.value / sqrt(2))
        density = exp(-((ratio * m.value) ** 2) / 2) / sqrt(2 * pi)
        total += m.probability * m.value * density / inside
    return total
