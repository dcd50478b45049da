"""What the cells of a draft model hold, and what it has to be fed before it can guess. Pure."""

from collections.abc import Callable, Mapping, Sequence

from loadmaster.engine.types import SequenceWork
from loadmaster.scheduler.prefix import common_prefix
from loadmaster.scheduler.types import DraftWanted

Parts = list[tuple[DraftWanted, SequenceWork]]
Step = Callable[[Sequence[SequenceWork]], Mapping[int, int] | None]


class DraftCells:
    """The tokens in each of a draft model's slots. A sequence has a slot for as long as no other
    needs it; what it has in common with what it had before is not fed again."""

    def __init__(
        self,
        *,
        n_slots: int,
        n_cells: int,
        n_chunk: int,
        n_known: int,
        remove: Callable[[int, int], bool],
    ) -> None:
        """`remove` drops the cells of a slot from a position on; False when it dropped all.
        `n_known`: tokens that the draft model has; a sequence is read up to the first other one."""
        self._n_cells, self._n_chunk, self._n_known = n_cells, n_chunk, n_known
        self._remove = remove
        self._held: list[list[int]] = [[] for _ in range(n_slots)]
        self._slots: dict[int, int] = {}  # sequence → slot, the least recently used first

    def guess(
        self, wanted: Sequence[DraftWanted], step: Step, n_vocab: int
    ) -> Mapping[int, Sequence[int]]:
        """What follows in each sequence, by `step`, which gives the likeliest token of each slot
        that asks; None: it could not be made. Up to the first token from `n_vocab` on."""
        guesses: dict[int, list[int]] = {}
        work = self.catch_up(wanted)
        while work:
            said = step([part for _, part in work])
            if said is None:
                self.clear()
                return {}
            for one, part in work:
                if part.sample:
                    guesses.setdefault(one.seq_id, []).append(said[part.seq_id])
            work = self.go_on(work, guesses)
        return {seq_id: _known(tokens, n_vocab) for seq_id, tokens in guesses.items()}

    def catch_up(self, wanted: Sequence[DraftWanted]) -> Parts:
        """The tokens that the draft model does not have yet, a chunk of them at the most; it is
        asked for a guess where they are all."""
        work: Parts = []
        room = self._n_chunk
        wanted = self._fitting(wanted)
        for n_behind, one in zip(range(len(wanted), 0, -1), wanted, strict=True):
            slot = self._slot(one.seq_id)
            start = self._cut(slot, one.tokens)
            tokens = tuple(one.tokens[start : start + max(1, room // n_behind)])
            if max(tokens) >= self._n_known:
                continue
            room -= len(tokens)
            work.append((one, self._part(slot, tokens, start + len(tokens) == len(one.tokens))))
        self._make_room(work)
        return self._fed(work)

    def go_on(self, work: Parts, guesses: Mapping[int, Sequence[int]]) -> Parts:
        """The next token of each sequence that has not been guessed to its end."""
        following: Parts = []
        for one, part in work:
            guess = guesses.get(one.seq_id, ())
            if part.sample and len(guess) < one.n:
                following.append((one, self._part(part.seq_id, (guess[-1],), True)))
        return self._fed(following)

    def clear(self) -> None:
        """Forget all of it."""
        for slot in range(len(self._held)):
            self._drop(slot)
        self._slots.clear()

    def _fitting(self, wanted: Sequence[DraftWanted]) -> list[DraftWanted]:
        """Those for which there are cells to their ends: what sequences of the model share, each of
        them has to itself here."""
        room, found = self._n_cells, []
        for one in wanted:
            needed = len(one.tokens) + one.n
            if needed <= room:
                room -= needed
                found.append(one)
        return found

    def _part(self, slot: int, tokens: tuple[int, ...], whole: bool) -> SequenceWork:
        position = len(self._held[slot])
        return SequenceWork(seq_id=slot, tokens=tokens, position=position, sample=whole)

    def _fed(self, work: Parts) -> Parts:
        for _, part in work:
            self._held[part.seq_id] += part.tokens
        return work

    def _slot(self, seq_id: int) -> int:
        slot = self._slots.pop(seq_id, None)
        if slot is None and len(self._slots) < len(self._held):
            slot = min(set(range(len(self._held))) - set(self._slots.values()))
        elif slot is None:
            slot = self._slots.pop(next(iter(self._slots)))
        self._slots[seq_id] = slot
        return slot

    def _cut(self, slot: int, tokens: Sequence[int]) -> int:
        """Drop what a sequence has not; at least its last token is to be fed."""
        held = self._held[slot]
        n = min(common_prefix(held, tokens), len(tokens) - 1)
        if n < len(held):
            kept = self._remove(slot, n)
            del held[n if kept else 0 :]
        return len(held)

    def _make_room(self, work: Parts) -> None:
        """Slots that are not in use give way when the cells run out."""
        running = {part.seq_id for _, part in work}
        needed = sum(len(part.tokens) + one.n for one, part in work)
        for seq_id, slot in tuple(self._slots.items()):
            if needed + sum(map(len, self._held)) <= self._n_cells:
                return
            if slot not in running:
                self._drop(slot)
                del self._slots[seq_id]

    def _drop(self, slot: int) -> None:
        if self._held[slot]:
            self._remove(slot, 0)
            self._held[slot].clear()


def _known(tokens: list[int], n_vocab: int) -> list[int]:
    unknown = (n for n, token in enumerate(tokens) if token >= n_vocab)
    return tokens[: next(unknown, len(tokens))]
