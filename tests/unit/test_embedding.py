"""Packing prompts into steps, and vectors out of bytes."""

from array import array

import pytest

from loadmaster.engine.embedding import normalized, packed, vectors_of
from loadmaster.errors import EngineError


@pytest.mark.parametrize("n_prompts", [1, 3, 100])
@pytest.mark.parametrize("n_tokens", [9, 10, 64])
def test_every_prompt_is_in_one_step_that_it_fits(n_tokens: int, n_prompts: int) -> None:
    lengths = [3, 9, 1, 5, 5, 2, 8, 1, 1, 9]
    steps = list(packed(lengths, n_tokens, n_prompts))
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in step) <= n_tokens for step in steps)
    assert all(0 < len(step) <= n_prompts for step in steps)


def test_steps_are_filled() -> None:
    assert len(list(packed([4] * 16, 16, 4))) == 4
    assert list(packed([], 16, 4)) == []


def test_vectors_are_cut_from_bytes() -> None:
    payload = array("f", [1, 2, 3, 4]).tobytes()
    assert vectors_of(payload, 2, 2) == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(EngineError, match="16 bytes for 3"):
        vectors_of(payload, 3, 2)


def test_length_one() -> None:
    assert normalized([3.0, 4.0]) == [0.6, 0.8]
    assert normalized([0.0, 0.0]) == [0.0, 0.0]
