"""A draft model beside the open one: guesses tokens greedily, in cells of its own."""

from collections.abc import Mapping, Sequence

from loadmaster.engine.backends.llamacpp.batch import Batch
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.opened import OpenModel
from loadmaster.engine.draft_cells import DraftCells
from loadmaster.engine.types import SequenceWork
from loadmaster.errors import EngineError
from loadmaster.scheduler.types import DraftWanted

_NO_SLOT = 1


class Drafter:
    """Owns the draft model and what its cells hold."""

    def __init__(self, library: Library, opened: OpenModel, n_vocab: int) -> None:
        """`n_vocab`: tokens of the model that checks the guesses; others are not guessed."""
        self.opened = opened
        self._library, self._api = library, library.api
        self._n_vocab = n_vocab
        self._batch = Batch(self._api, opened.n_batch)
        self._sampler = self._api.llama_sampler_init_greedy()
        self._cells = DraftCells(
            n_slots=opened.capabilities().n_seq_max,
            n_cells=opened.n_ctx,
            n_chunk=opened.n_batch,
            n_known=opened.n_vocab,
            remove=opened.remove,
        )

    def guess(self, wanted: Sequence[DraftWanted]) -> Mapping[int, Sequence[int]]:
        """What follows in each sequence; nothing yet for one that is still being read."""
        return self._cells.guess(wanted, self._step, self._n_vocab)

    def _step(self, work: Sequence[SequenceWork]) -> dict[int, int] | None:
        """The likeliest token after each part that asks; None when the engine found no cells."""
        outputs = self._batch.fill(sorted(work, key=lambda part: part.seq_id))
        status = self._api.llama_decode(self.opened.context, self._batch.struct)
        if status == _NO_SLOT:
            return None
        if status != 0:
            raise EngineError(
                f"the engine failed a step of the draft model ({status}): {self._library.error()}"
            )
        sample, context = self._api.llama_sampler_sample, self.opened.context
        return {slot: sample(self._sampler, context, row) for slot, row in outputs}

    def close(self) -> None:
        self._api.llama_sampler_free(self._sampler)
        self.opened.close()
