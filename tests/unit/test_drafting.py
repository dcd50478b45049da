"""Guesses from a sequence's own tokens, and the rule that says whether a draft pays."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.engine.drafts import step_costs, without_drafts
from loadmaster.engine.types import SequenceWork
from loadmaster.scheduler.drafting import NOMINAL_COSTS, cost_of, draft_length
from loadmaster.scheduler.guesses import Guesses, Record, n_agreeing
from loadmaster.scheduler.lookup import Lookup
from loadmaster.scheduler.types import Step, StepCosts, Stepped
from tests.scheduler_parts import Run, echoing_token, limits

FLAT = ((1, 1.0), (16, 1.0))
EACH_ITS_OWN = ((1, 1.0), (2, 2.0), (16, 16.0))


def test_what_followed_last_time_is_guessed() -> None:
    assert Lookup([5, 6, 7, 8, 9, 5, 6]).guess(3) == (7, 8, 9)
    assert Lookup([5, 6, 7, 8, 9, 6, 5]).guess(3) == ()
    assert Lookup([5]).guess(3) == Lookup([]).guess(3) == ()


def test_of_several_places_the_one_with_most_in_common_is_taken() -> None:
    tokens = [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3]
    assert Lookup(tokens).guess(1) == (50,)
    assert Lookup([*tokens[:8], 2, 3]).guess(1) == (60,)  # the later one of equals


def test_what_repeats_goes_on_repeating() -> None:
    assert Lookup([7, 1, 2, 3, 1, 2, 3]).guess(7) == (1, 2, 3, 1, 2, 3, 1)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 8))
def test_a_guess_is_what_followed_the_same_tokens(tokens: list[int], n: int) -> None:
    grown: list[int] = []
    lookup = Lookup(grown)
    for token in tokens:
        grown.append(token)
        guess = lookup.guess(n)
        assert guess == Lookup(list(grown)).guess(n)  # when it was asked makes no difference
        *before, last = itertools.pairwise(grown) if len(grown) > 1 else (None,)
        seen = last in before
        assert len(guess) == (n if seen else 0)


def test_a_record_fades() -> None:
    record = Record()
    for _ in range(40):
        record.note(4, 4)
    assert record.share > 0.95
    for _ in range(10):
        record.note(0, 4)
    assert record.share < 0.6


def test_guesses_that_were_not_fed_count_too() -> None:
    tokens = [1, 2, 3, 4]
    guesses = Guesses(tokens)
    before = guesses.record.share
    guesses.open = (5, 6, 7)
    guesses.note([5, 6])
    assert guesses.record.share > before
    guesses.open = (5,)
    guesses.note([9])
    guesses.note([5])  # there was no guess at this one
    assert guesses.record.wrong > 1


def test_agreement_is_counted_to_the_first_difference() -> None:
    assert n_agreeing((1, 2, 3), (1, 2, 4, 5)) == 2
    assert n_agreeing((1, 2), (1, 2, 3)) == n_agreeing((1, 2, 3), (1, 2)) == 2


def test_drafts_end_where_they_do_not_pay() -> None:
    assert draft_length(FLAT, 0.9, 1, 15) == 15
    assert draft_length(EACH_ITS_OWN, 1.0, 1, 15) == 0
    assert draft_length(NOMINAL_COSTS.costs, 0.01, 1, 15) == 0
    lengths = [draft_length(NOMINAL_COSTS.costs, share / 20, 1, 15) for share in range(20)]
    assert lengths == sorted(lengths)
    assert 0 < lengths[12] < 15


def test_costs_lie_on_lines_between_what_was_measured() -> None:
    costs = ((1, 10.0), (4, 13.0), (8, 29.0))
    assert [cost_of(costs, n) for n in (1, 3, 4, 6, 8, 16)] == [10, 12, 13, 21, 29, 58]
    assert cost_of(((1, 2.0),), 3) == 6


def test_more_sequences_have_shorter_drafts() -> None:
    lengths = [draft_length(((1, 1.0), (16, 3.0)), 0.7, n, 16 // n - 1) for n in (1, 2, 4)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    most = 0

    def note(step: Step) -> None:
        nonlocal most
        most = max(most, sum(len(part.tokens) for part in step.work if part.n_draft))

    run = Run(limits(n_draft=15, n_draft_step=8, n_ctx=600), on_step=note, speech=echoing_token)
    run.give(StepCosts(costs=FLAT))
    for i in range(3):
        run.submit(f"r{i}", (1, 2, 3, 1 + i, 1, 2, 3), 60)
    run.finish()
    run.check_streams()
    run.check_drafts()
    assert 2 < most <= 8
    assert run.core.stats().n_accepted_tokens > 0


def test_five_that_decode_bring_none() -> None:
    given_limits = limits(n_draft=3, n_draft_step=16, n_ctx=600, n_seq_max=5)
    run = Run(given_limits, speech=echoing_token)
    run.give(StepCosts(costs=FLAT))
    for i in range(5):
        run.submit(f"r{i}", (1, 2, 3, 1 + i, 1, 2, 3), 30)
    steps = 0
    while run.decide() is not None and not run.ends:
        assert run.step is not None
        drafted = any(part.n_draft for part in run.step.work)
        assert not drafted or len(run.step.work) < 5
        steps += run.run_step()
    assert steps > 5


@pytest.mark.parametrize("n_draft", [0, 15])
def test_drafts_take_no_room_from_the_many_that_bring_none(n_draft: int) -> None:
    """Each has its prompt and sixteen tokens; a step's drafts are of all of up to four."""
    given = {"n_draft": n_draft, "n_draft_step": 16, "n_seq_max": 6}
    prompts = [(10 + i, 1, 2, 3) for i in range(6)]
    for n_ctx, n_admitted in ((6 * 20, 6), (4 * 20 + 12, 4), (2 * 20 + 1, 1 if n_draft else 2)):
        run = Run(limits(n_ctx=n_ctx, **given), speech=echoing_token)
        for i, prompt in enumerate(prompts):
            run.submit(f"r{i}", prompt, 16)
        run.decide()
        assert len(run.admitted) == n_admitted
        run.finish()
        run.check_streams()


def test_a_rule_that_does_not_pay_lets_a_lone_sequence_decode_on() -> None:
    run = Run(limits(n_draft=7, n_draft_step=16, n_ctx=600), speech=echoing_token)
    run.give(StepCosts(costs=EACH_ITS_OWN))
    run.submit("a", (1, 2, 3, 1, 2, 3), 200)
    repeats = []
    while run.decide() is not None:
        assert run.step is not None
        repeats.append(run.step.repeat)
        run.run_step(n_run=99)
    assert run.n_drafted == 0
    assert max(repeats) == 16
    run.check_streams()


def test_a_step_that_found_no_cells_is_made_without_drafts() -> None:
    """The driver does: then nothing of the draft was accepted."""
    run = Run(limits(n_draft=7, n_draft_step=16), speech=echoing_token)
    run.give(StepCosts(costs=FLAT))
    run.submit("a", (1, 2, 3, 1, 2, 3), 20)
    while (step := run.decide()) is not None and not step.work[0].n_draft:
        run.run_step()
    assert step is not None
    (part,) = without_drafts(step.work)
    assert (part.tokens, part.n_draft) == (step.work[0].tokens[:1], 0)
    run.step = None
    run.pool.feed(part)
    token = echoing_token(run.pool.tokens(part.seq_id))
    run.streams["a"].append(token)
    run.give(Stepped(tokens={part.seq_id: token}))
    run.finish()
    run.check()
    run.check_streams()


class _Timed:
    """A backend whose steps take what a table says."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.now, self._seconds, self.widths = 0.0, seconds, list[int]()

    def remove(self, seq_id: int, start: int) -> bool:
        return True

    def start_sequence(self, *_: object) -> None: ...

    def end_sequence(self, seq_id: int) -> None: ...

    def step(self, work: list[SequenceWork]) -> None:
        width = len(work[0].tokens)
        assert work[0].n_draft == width - 1
        self.widths.append(width)
        self.now += self._seconds[width].pop(0)


def test_costs_are_the_least_of_a_few_and_never_fall() -> None:
    backend = _Timed({1: [0.02, 0.08, 0.04], 2: [0.03, 0.015, 0.05], 4: [0.03] * 3, 8: [0.09] * 3})
    costs = step_costs(backend, 8, clock=lambda: backend.now)  # type: ignore[arg-type]
    assert [n for n, _ in costs.costs] == [1, 2, 4, 8]
    assert [s for _, s in costs.costs] == pytest.approx([0.015, 0.015, 0.03, 0.09])
    assert backend.widths == [1, 2, 4, 8] * 3


def test_long_steps_are_timed_once() -> None:
    backend = _Timed({1: [3.0], 2: [3.5]})
    costs = step_costs(backend, 3, clock=lambda: backend.now)  # type: ignore[arg-type]
    assert costs.costs == ((1, 3.0), (2, 3.5))
    assert backend.widths == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_text_that_repeats_is_decoded_in_fewer_steps(seed: int) -> None:
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(1, 5) for _ in range(12))
    steps = []
    for n_draft in (0, 7):
        run = Run(limits(n_draft=n_draft, n_draft_step=16, n_ctx=400), speech=echoing_token)
        run.submit("a", prompt, 120)
        run.finish()
        run.check_streams()
        steps.append(run.core.stats().n_decode_steps)
    assert steps[1] < steps[0]


def test_a_draft_model_is_asked_before_the_step() -> None:
    fields = {"n_draft": 7, "n_draft_step": 16, "n_ctx": 400, "draft_model": True}
    run = Run(limits(**fields))
    run.submit("a", (1, 2, 3), 90)
    run.submit("b", (3, 2, 1), 90)
    run.finish(n_run=4)
    run.check_streams()
    run.check_drafts()
    stats = run.core.stats()
    assert stats.n_accepted_tokens > 40
    assert stats.n_decode_steps < 90


def test_a_draft_model_that_does_not_pay_gets_a_chance_now_and_then() -> None:
    fields = {"n_draft": 7, "n_draft_step": 16, "n_ctx": 1200, "draft_model": True}
    run = Run(limits(**fields))
    run.give(StepCosts(costs=EACH_ITS_OWN, drafted=0.5))
    run.submit("a", (1, 2, 3), 900)
    run.finish(n_run=99)
    run.check_streams()
    assert 0 < run.n_drafted <= 2 * (900 // 64 + 1)
