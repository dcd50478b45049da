"""Codes and their errors, by other ways to the same numbers; no library is asked."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

from loadmaster.model.codes import (
    DYNAMIC,
    FP4,
    INT4,
    INT8,
    NF4,
    Code,
    nested_scales,
    quantize,
    restored,
    unpacked,
)
from loadmaster.plan.formats import FORMATS
from loadmaster.plan.rounding import (
    GAUSSIAN,
    Tabulated,
    density_over_scale,
    relative_error,
    squared_error,
)

Numbers = npt.NDArray[np.float64]
N_DRAWN = 1 << 20  # of 4096 in a row just a whole nested block


def test_normal_float_is_quantiles_of_the_normal_distribution() -> None:
    outermost = 1 - (1 / 32 + 1 / 30) / 2

    def side(n: int) -> list[float]:
        steps = [outermost + (0.5 - outermost) * i / n for i in range(n)]
        return [NormalDist().inv_cdf(step) for step in steps]

    values = sorted([*side(8), 0.0, *(-value for value in side(7))])
    assert NF4.values == pytest.approx([value / max(values) for value in values], abs=1e-6)


def test_how_many_numbers_a_code_has() -> None:
    assert [len(code.levels) for code in (NF4, FP4, INT4, INT8, DYNAMIC)] == [16, 15, 15, 255, 256]
    assert all(code.levels[-1] == 1 for code in (NF4, FP4, INT4, INT8, DYNAMIC))
    assert DYNAMIC.levels[0] == pytest.approx(-0.9929687)  # the map has no -1


def test_a_block_by_hand() -> None:
    kept = quantize([0.5, -2.0, 0.0, 1.2, 0.9], INT4, 4)
    assert kept.scales == (2.0, 0.9)
    assert [INT4.values[index] * 7 for index in kept.indices] == pytest.approx([2, -7, 0, 4, 7])
    assert kept.weights == pytest.approx([4 / 7, -2, 0, 8 / 7, 0.9])


@pytest.mark.parametrize("code", [NF4, FP4, INT4, INT8])
def test_what_was_rounded_once_stays_as_it_is(code: Code) -> None:
    weights = np.random.default_rng(1).standard_normal(100).tolist()
    kept = quantize(weights, code, 32)
    assert quantize(kept.weights, code, 32).weights == pytest.approx(kept.weights)
    distances = [abs(a - b) for a, b in zip(weights, kept.weights, strict=True)]
    nearest = [
        min(abs(weight - kept.scales[at // 32] * level) for level in code.levels)
        for at, weight in enumerate(weights)
    ]
    assert distances == pytest.approx(nearest)


def test_a_block_of_zeros() -> None:
    assert quantize([0.0] * 4, NF4, 64).weights == [0.0] * 4


def test_halves_of_bytes_and_scales_of_scales() -> None:
    assert unpacked(b"\x1f\x20", 3) == [1, 15, 2]
    assert nested_scales([255, 0, 255], [2.0, 3.0], 1.0, 2) == pytest.approx(
        [3.0, 1 - 2 * 0.9929687, 4.0]
    )
    assert restored([15, 0], [0.5], NF4, 64) == [0.5, -0.5]


# ---- errors against Gaussian weights


def drawn(code: Code, block: int, nested_block: int | None) -> float:
    """The relative error of weights that are drawn and rounded, in numpy alone."""
    random = np.random.default_rng(5)
    weights = random.standard_normal((N_DRAWN // block // 256 * 256, block))
    scales = np.abs(weights).max(axis=1)
    ratios = weights / scales[:, None]
    if nested_block is not None:
        scales = scales.mean() + _rounded_blocks(scales - scales.mean(), DYNAMIC, nested_block)
    back = scales[:, None] * _rounded(ratios, code.levels)
    return float(np.sqrt(((weights - back) ** 2).mean() / (weights**2).mean()))


def _rounded(ratios: Numbers, levels: Sequence[float]) -> Numbers:
    numbers = np.array(levels)
    above = np.searchsorted(numbers, ratios).clip(1, len(numbers) - 1)
    nearer = np.abs(numbers[above] - ratios) < np.abs(numbers[above - 1] - ratios)
    found: Numbers = numbers[above - 1 + nearer]
    return found


def _rounded_blocks(values: Numbers, code: Code, block: int) -> Numbers:
    rows = values.reshape(-1, block)
    scales = np.abs(rows).max(axis=1, keepdims=True)
    found: Numbers = (scales * _rounded(rows / scales, code.levels)).reshape(-1)
    return found


@pytest.mark.parametrize(
    ("code", "block", "nested_block"),
    [
        (NF4, 64, None), (NF4, 64, 256), (NF4, 1024, None), (FP4, 64, None), (FP4, 64, 256),
        (INT4, 128, None), (INT8, 4096, None),
    ],
)  # fmt: skip
def test_the_error_is_that_of_drawn_weights(
    code: Code, block: int, nested_block: int | None
) -> None:
    computed = relative_error(code, block, nested_block)
    assert computed == pytest.approx(drawn(code, block, nested_block), rel=0.005)


def test_what_quantizing_scales_adds() -> None:
    """It is less than drawing shows in the sum, so it is looked at alone."""
    random = np.random.default_rng(6)
    scales = np.abs(random.standard_normal((256 * 100, 64))).max(axis=1)
    distances = scales - scales.mean()
    lost = distances - _rounded_blocks(distances, DYNAMIC, 256)
    points = np.linspace(distances.min(), distances.max(), 3001)
    counts, _ = np.histogram(distances, bins=points)
    middles = ((points[1:] + points[:-1]) / 2).tolist()
    table = Tabulated(middles, (counts / len(distances)).tolist())
    assert squared_error(table, DYNAMIC, 256) == pytest.approx(float((lost**2).mean()), rel=0.03)


def test_a_table_has_the_moments_of_what_it_tabulates() -> None:
    points = [i / 100 for i in range(-700, 701)]
    table = Tabulated(points, [NormalDist().pdf(x) / 100 for x in points])
    for x in (-9.0, -1.234, 0.0, 0.777, 2.5, 9.0):
        assert table.moments(x) == pytest.approx(GAUSSIAN.moments(x), abs=1e-4)


def test_larger_blocks_are_less_exact_and_nf4_the_most_exact_of_four_bits() -> None:
    for code in (NF4, FP4, INT4, INT8):
        errors = [relative_error(code, block) for block in (32, 64, 256)]
        assert errors == sorted(errors)
    assert relative_error(NF4, 64) < relative_error(INT4, 64) < relative_error(FP4, 64)


def test_the_density_is_one() -> None:
    steps = [i / 200 for i in range(-200, 201)]
    assert sum(density_over_scale(64, x) for x in steps) / 200 == pytest.approx(1, abs=0.003)


def test_bits_a_weight() -> None:
    bits = {one.name: one.bits(4096, 4096) for one in FORMATS}
    tables = {"nf4": 64, "nf4, double": 64 + 1024 + 4}
    assert bits["int8"] == 8 + 32 / 4096
    assert bits["nf4"] == 4 + 32 / 64 + 8 * tables["nf4"] / 4096**2
    double = 4 + 8 / 64 + 32 / (64 * 256) + 8 * tables["nf4, double"] / 4096**2
    assert bits["nf4, double"] == bits["fp4, double"] == double
