"""Sampling in torch, held against what llama.cpp's order of samplers gives."""

from collections import Counter
from typing import Any

import pytest
import torch

from loadmaster.engine.backends.transformers.sampling import Sampler
from loadmaster.engine.types import SamplingParams

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
PLAIN: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def sampler(recent: tuple[int, ...] = (), **changes: Any) -> Sampler:
    return Sampler(SamplingParams(**(PLAIN | changes)), recent, n_ctx=64)


def drawn(n: int = 400, recent: tuple[int, ...] = (), **changes: Any) -> Counter[int]:
    one = sampler(recent, **changes)
    return Counter(one.sample(torch.tensor(LOGITS)) for _ in range(n))


def test_frequencies_follow_probabilities() -> None:
    found = drawn(4000)
    expected = torch.softmax(torch.tensor(LOGITS), dim=-1)
    for token, share in enumerate(expected.tolist()):
        assert found[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"temperature": 0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"temperature": 0, "logit_bias": ((4, 10.0),)}, {4}),
        ({"typical_p": 0.2}, {1}),  # its surprise is nearest the mean one
    ],
)
def test_what_may_be_drawn(changes: dict[str, Any], tokens: set[int]) -> None:
    assert set(drawn(**changes)) == tokens


def test_a_seed_repeats() -> None:
    assert drawn(50, seed=3) == drawn(50, seed=3)
    rows = [[s.sample(torch.tensor(LOGITS)) for _ in range(30)] for s in map(_seeded, (1, 1, 2))]
    assert rows[0] == rows[1] != rows[2]


def _seeded(seed: int) -> Sampler:
    return sampler(seed=seed)


def test_penalties_count_the_prompt_and_what_was_drawn() -> None:
    strong: dict[str, Any] = {"temperature": 0, "repeat_last_n": -1}
    assert set(drawn(1, recent=(0,), presence_penalty=5.0, **strong)) == {1}
    assert set(drawn(1, recent=(0,), repeat_penalty=4.0, **strong)) == {1}
    one = sampler(frequency_penalty=0.6, **strong)
    assert [one.sample(torch.tensor(LOGITS)) for _ in range(5)] == [0, 0, 1, 0, 2]


def test_the_past_is_as_long_as_asked() -> None:
    changes: dict[str, Any] = {"temperature": 0, "presence_penalty": 5.0, "repeat_last_n": 1}
    assert set(drawn(1, recent=(0, 1), **changes)) == {0}


def test_what_is_forbidden_is_never_drawn() -> None:
    logits = torch.tensor(LOGITS)
    logits[:4] = float("-inf")
    for changes in ({}, {"typical_p": 0.9}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.1}):
        one = sampler(**changes)
        assert {one.sample(logits.clone()) for _ in range(60)} <= {4, 5}
