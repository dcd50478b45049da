"""What a draft model is fed: nothing twice that is still true, and what there is room for."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.engine.draft_cells import DraftCells
from loadmaster.engine.types import SequenceWork
from loadmaster.scheduler.types import DraftWanted

KNOWN = 50_000


class Model:
    """Counts up from a sequence's last token; remembers what its slots hold."""

    def __init__(self, n_slots: int = 2, n_cells: int = 64, n_chunk: int = 8) -> None:
        self.slots: list[list[int]] = [[] for _ in range(n_slots)]
        self.n_cells, self.n_fed, self.n_steps = n_cells, 0, 0
        self.fails = False
        self.cells = DraftCells(
            n_slots=n_slots, n_cells=n_cells, n_chunk=n_chunk, n_known=KNOWN, remove=self.remove
        )

    def remove(self, slot: int, start: int) -> bool:
        assert start <= len(self.slots[slot])
        del self.slots[slot][start:]
        return True

    def step(self, work: Sequence[SequenceWork]) -> dict[int, int] | None:
        if self.fails:
            return None
        self.n_steps += 1
        for part in work:
            assert part.position == len(self.slots[part.seq_id])
            self.slots[part.seq_id] += part.tokens
            self.n_fed += len(part.tokens)
        assert sum(map(len, self.slots)) <= self.n_cells
        return {part.seq_id: part.tokens[-1] + 1 for part in work if part.sample}

    def guess(
        self, *wanted: tuple[int, list[int], int], n_vocab: int = 10_000
    ) -> dict[int, object]:
        asked = [DraftWanted(seq_id=s, tokens=tokens, n=n) for s, tokens, n in wanted]
        return dict(self.cells.guess(asked, self.step, n_vocab))


def test_what_was_accepted_is_not_fed_again() -> None:
    model = Model()
    assert model.guess((7, [1, 2, 3], 3)) == {7: [4, 5, 6]}
    assert model.n_fed == 5  # the last guess is fed to nobody
    assert model.guess((7, [1, 2, 3, 4, 5, 9], 2)) == {7: [10, 11]}
    assert model.n_fed == 5 + 2
    assert model.slots[0] == [1, 2, 3, 4, 5, 9, 10]


def test_long_prompts_are_read_in_chunks_before_anything_is_guessed() -> None:
    model, prompt = Model(), list(range(20))
    assert model.guess((0, prompt, 2)) == {}
    assert model.guess((0, prompt, 2)) == {}
    assert model.guess((0, prompt, 2)) == {0: [20, 21]}
    assert model.n_fed == 21


def test_sequences_are_guessed_side_by_side() -> None:
    model = Model()
    assert model.guess((0, [1, 2], 3), (5, [8], 1)) == {0: [3, 4, 5], 5: [9]}
    assert model.n_steps == 3


def test_the_least_recently_used_slot_gives_way() -> None:
    model = Model()
    model.guess((0, [1, 2], 1))
    model.guess((1, [3, 4], 1))
    model.guess((0, [1, 2, 3], 1))
    assert model.guess((2, [5, 6], 2)) == {2: [7, 8]}
    fed = model.n_fed
    model.guess((0, [1, 2, 3, 4], 1))
    assert model.n_fed == fed + 1


def test_cells_that_run_out_are_taken_from_who_is_not_asked() -> None:
    model = Model(n_slots=2, n_cells=12, n_chunk=8)
    model.guess((0, [1, 2, 3, 4, 5, 6], 2))
    assert model.guess((1, [1, 2, 3, 4, 5, 6], 2)) == {1: [7, 8]}
    assert model.slots[0] == []


def test_tokens_that_the_other_model_does_not_have_are_not_guessed() -> None:
    assert Model().guess((0, [1, 2], 5), n_vocab=5) == {0: [3, 4]}


def test_a_step_that_cannot_be_made_ends_the_guess_and_forgets() -> None:
    model = Model()
    model.guess((0, [1, 2, 3], 2))
    model.fails = True
    assert model.guess((0, [1, 2, 3, 4], 2)) == {}
    model.fails = False
    assert model.guess((0, [1, 2, 3, 4], 2)) == {0: [5, 6]}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 5)), max_size=12))
def test_a_guess_never_depends_on_what_came_before(asked: list[tuple[int, int, int]]) -> None:
    model = Model(n_slots=2, n_cells=40, n_chunk=16)
    for seq_id, length, n in asked:
        tokens = [100 * seq_id + i for i in range(length)]
        assert model.guess((seq_id, tokens, n)) == {seq_id: [tokens[-1] + 1 + i for i in range(n)]}


def test_a_token_that_the_draft_model_does_not_have_is_not_fed() -> None:
    model = Model()
    assert model.guess((7, [1, KNOWN, 3], 2), (8, [1, 2], 2)) == {8: [3, 4]}
    assert KNOWN not in model.slots[0] + model.slots[1]


def test_a_sequence_without_cells_to_its_end_is_not_read() -> None:
    model = Model(n_cells=16)
    assert model.guess((7, [1] * 8, 2), (8, [1] * 8, 2)) == {7: [2, 3]}
    assert model.guess((7, [1] * 8 + [2], 2), (8, [1] * 8, 2)) == {7: [3, 4]}
    assert model.n_steps == 4  # none to read what will not fit
