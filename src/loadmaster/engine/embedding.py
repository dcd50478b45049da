"""Prompts to vectors and ranks: packing prompts into steps, and what comes back. Pure."""

import math
from array import array
from collections.abc import Iterator, Sequence

from loadmaster.engine.types import LoadedModel
from loadmaster.errors import ContextLengthError, EngineError, UsageError


def check_prompts(prompts: Sequence[Sequence[int]], loaded: LoadedModel) -> None:
    """Raises UsageError: the model was not opened for it, or a prompt is empty or too long."""
    if loaded.pooling is None:
        raise UsageError(
            "the model was opened to write text, not for embeddings",
            hint="open it with a pooling: mean, cls, last or rank",
        )
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= loaded.n_embed_max:
            raise ContextLengthError(
                f"prompt {index} has {len(prompt)} tokens, an embedding takes 1 to"
                f" {loaded.n_embed_max}",
                hint="split the text, or raise `--ubatch`",
                numbers={"n_prompt": len(prompt), "n_ctx": loaded.n_embed_max},
            )


def packed(lengths: Sequence[int], n_tokens: int, n_prompts: int) -> Iterator[list[int]]:
    """Indices of prompts by step: at most so many tokens and prompts, similar lengths together."""
    step: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if step and (used + lengths[index] > n_tokens or len(step) >= n_prompts):
            yield step
            step, used = [], 0
        step.append(index)
        used += lengths[index]
    if step:
        yield step


def vectors_of(payload: bytes, n_prompts: int, width: int) -> list[list[float]]:
    """The vectors of a step, from the worker's bytes.

    Raises:
        EngineError: they are not as many as they must be.
    """
    if len(payload) != 4 * n_prompts * width:
        raise EngineError(f"the worker sent {len(payload)} bytes for {n_prompts} embeddings")
    numbers = array("f", payload)
    return [numbers[i * width : (i + 1) * width].tolist() for i in range(n_prompts)]


def normalized(vector: Sequence[float]) -> list[float]:
    """Scaled to length 1; a vector of zeros stays one."""
    length = math.hypot(*vector)
    return [number / length for number in vector] if length else list(vector)
