"""Embeddings and ranks: one vector for each prompt of a step, pooled by the engine."""

from collections.abc import Sequence
from typing import Any

from loadmaster.engine.backends.llamacpp.batch import Batch
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.opened import OpenModel
from loadmaster.engine.types import SequenceWork
from loadmaster.errors import EngineError

_ABORTED = 2


def _check(prompts: Sequence[Sequence[int]], n_seq_max: int, n_ubatch: int) -> None:
    """Raises EngineError: the engine would abort. The parent packs steps that pass."""
    n_tokens = sum(map(len, prompts))
    if not all(prompts) or len(prompts) > n_seq_max or n_tokens > n_ubatch:
        raise EngineError(
            f"{len(prompts)} prompts of {n_tokens} tokens in a step of {n_seq_max} prompts and"
            f" n_ubatch {n_ubatch}"
        )


def embed(
    library: Library, opened: OpenModel, batch: Batch, prompts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The vector of each prompt, as the engine pooled it.

    Raises:
        EngineError: the step failed or was interrupted.
    """
    _check(prompts, opened.capabilities().n_seq_max, opened.n_ubatch)
    api: Any = library.api
    opened.clear()
    batch.fill([
        SequenceWork(seq_id=seq_id, tokens=tuple(prompt), position=0, sample=False)
        for seq_id, prompt in enumerate(prompts)
    ])  # fmt: skip
    batch.want_all()
    status = api.llama_decode(opened.context, batch.struct)
    if status == _ABORTED:
        raise EngineError("the step was interrupted")
    if status != 0:
        raise EngineError(f"the engine failed a step ({status}): {library.error()}")
    vectors = [api.llama_get_embeddings_seq(opened.context, s) for s in range(len(prompts))]
    if not all(vectors):
        raise EngineError("the engine gave no embedding: the model has none of this pooling")
    return [vector[: opened.n_embd] for vector in vectors]
