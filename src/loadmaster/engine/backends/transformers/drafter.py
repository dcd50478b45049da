"""A draft model beside the open one: guesses tokens greedily, in slots of its own."""

from collections.abc import Mapping, Sequence

from loadmaster.engine.backends.transformers.opened import OpenModel
from loadmaster.engine.draft_cells import DraftCells
from loadmaster.engine.types import SequenceWork
from loadmaster.scheduler.types import DraftWanted


class Drafter:
    """Owns the draft model and what its slots hold."""

    def __init__(self, opened: OpenModel, n_vocab: int) -> None:
        """`n_vocab`: tokens of the model that checks the guesses; others are not guessed."""
        self.opened = opened
        self._n_vocab = n_vocab
        self._cells = DraftCells(
            n_slots=opened.n_seq_max,
            n_cells=opened.n_seq_max * opened.n_ctx_seq,
            n_chunk=min(opened.n_ubatch, opened.n_ctx_seq),
            n_known=opened.n_vocab,
            remove=opened.slots.remove,
        )

    def guess(self, wanted: Sequence[DraftWanted]) -> Mapping[int, Sequence[int]]:
        """What follows in each sequence; nothing yet for one that is still being read."""
        return self._cells.guess(wanted, self._step, self._n_vocab)

    def _step(self, work: Sequence[SequenceWork]) -> dict[int, int] | None:
        """The likeliest token after each part that asks."""
        done = self.opened.step(work)
        if done is None:
            return None
        packed, logits = done
        likeliest = logits.argmax(dim=-1).tolist()
        return {slot: likeliest[row] for slot, row in packed.outputs}
