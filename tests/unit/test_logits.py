"""The native library's work on a row of logits (logits.cpp)."""

import ctypes as c
import math
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from loadmaster.engine import builds

pytestmark = pytest.mark.engine
BAD_ARGUMENT = -1


@pytest.fixture(scope="module")
def native() -> c.CDLL:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return c.CDLL(str(builds.find_build().lib_dir / f"libloadmaster_native{suffix}"))


def row(values: Sequence[float]) -> Any:
    return (c.c_float * len(values))(*values)


def likeliest(native: c.CDLL, values: Sequence[float], n_top: int) -> tuple[int, list[int], float]:
    top, log_sum = (c.c_int32 * 64)(), c.c_double()
    n = native.lm_likeliest(row(values), len(values), n_top, top, c.byref(log_sum))
    return n, list(top[: max(0, n)]), log_sum.value


@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 1000])
def test_only_allowed_tokens_keep_their_logits(native: c.CDLL, n_vocab: int) -> None:
    rng = random.Random(n_vocab)
    allowed = {i for i in range(n_vocab) if rng.random() < 0.3}
    words = [
        sum(1 << i % 32 for i in allowed if i // 32 == word) for word in range(n_vocab // 32 + 1)
    ]
    logits = row([0.5] * n_vocab)
    native.lm_mask_logits(logits, n_vocab, (c.c_uint32 * len(words))(*words))
    assert {i for i in range(n_vocab) if logits[i] == 0.5} == allowed
    assert all(logits[i] == -math.inf for i in range(n_vocab) if i not in allowed)


@pytest.mark.parametrize("n_top", [0, 1, 20, 64])
def test_the_likeliest_in_order(native: c.CDLL, n_top: int) -> None:
    rng = random.Random(n_top)
    values = [rng.gauss(0, 4) for _ in range(500)]
    n, top, log_sum = likeliest(native, values, n_top)
    assert n == n_top
    assert top == sorted(range(500), key=lambda i: -values[i])[:n_top]
    assert log_sum == pytest.approx(math.log(sum(map(math.exp, values))), abs=1e-5)


def test_of_equals_the_smaller_token_comes_first(native: c.CDLL) -> None:
    assert likeliest(native, [1.0, 2.0, 1.0, 2.0], 3)[1] == [1, 3, 0]


def test_a_small_vocabulary_has_no_more(native: c.CDLL) -> None:
    assert likeliest(native, [0.0, 1.0], 20)[:2] == (2, [1, 0])


def test_large_logits_do_not_overflow(native: c.CDLL) -> None:
    assert likeliest(native, [1e4, -1e4], 1)[2] == pytest.approx(1e4)


@pytest.mark.parametrize("n_top", [-1, 65])
def test_an_impossible_number_is_refused(native: c.CDLL, n_top: int) -> None:
    assert likeliest(native, [0.0], n_top)[0] == BAD_ARGUMENT
