"""Whose cells a prompt goes on from: those of the past, and those that others are feeding."""

import pytest

from loadmaster.scheduler.core import Scheduler
from loadmaster.scheduler.types import (
    Admit,
    Admitted,
    Finish,
    Forget,
    Offered,
    Ready,
    SequenceWork,
    Step,
    Submitted,
)
from tests.scheduler_parts import Run, limits

PREFIX = tuple(range(100, 120))


# -- cells of the past


def test_the_next_prompt_goes_on_from_kept_cells() -> None:
    run = Run(limits())
    run.submit("a", (1, 2, 3), max_tokens=1)
    run.finish()
    run.submit("b", (1, 2, 8, 9))
    step = run.decide()
    assert step is not None
    assert step.work[0].position == 2
    run.finish()
    end = run.ends["b"]
    assert isinstance(end, Finish)
    assert end.n_cached == 2
    run.check_streams()


def test_an_equal_prompt_feeds_its_last_token_again() -> None:
    run = Run(limits())
    for name in ("a", "b"):
        run.submit(name, (1, 2, 3), max_tokens=3)
        run.finish()
    assert run.n_fed_prompt == 4
    run.check_streams()


def test_scopes_share_nothing() -> None:
    run = Run(limits())
    run.submit("a", PREFIX, scope="one")
    run.submit("b", PREFIX, scope="two")
    run.submit("c", PREFIX, scope="one")
    run.finish()
    assert run.n_fed_prompt == 2 * len(PREFIX) + 1


def test_without_partial_removal_cells_are_kept_only_as_a_whole() -> None:
    run = Run(
        limits(
            partial_removal=False,
            n_seq_max=1,
            n_seq_ids=None,
            shared_prefix=False,
            shared_at_end=True,
        )
    )
    run.submit("a", (1, 2, 3), max_tokens=3)
    run.finish()
    cells = run.core.cells(0)
    assert len(cells) == 5
    run.submit("b", (1, 2, 8))
    run.finish()
    assert run.n_fed_prompt == 6
    run.submit("c", (*run.core.cells(0), 4))
    run.finish()
    assert run.n_fed_prompt == 7
    run.check_streams()


def test_what_the_backend_could_not_keep_is_fed_again() -> None:
    core = Scheduler(limits(n_seq_ids=None, n_seq_max=1))
    core.on_event(Offered(tokens=(1, 2, 3)), 0.0)
    core.on_event(Submitted(request_id="a", prompt=(1, 2, 3, 4), max_tokens=1), 0.0)
    (admit,) = core.on_event(Ready(), 0.0)
    assert isinstance(admit, Admit)
    assert (admit.n_keep, admit.source) == (3, None)
    core.on_event(Admitted(seq_id=0, n_kept=0), 0.0)
    (step,) = core.on_event(Ready(), 0.0)
    assert isinstance(step, Step)
    assert step.work == (SequenceWork(seq_id=0, tokens=(1, 2, 3, 4), position=0, sample=True),)


def test_kept_cells_give_way_the_oldest_first() -> None:
    run = Run(limits(n_ctx=400))
    for index, name in enumerate("abcd"):
        run.submit(name, (index,) * 95, max_tokens=5)
        run.finish()
    run.submit("e", (9,) * 195, max_tokens=5)
    run.finish()
    run.check()
    for name, token, fed in (("f", 3, 1), ("g", 0, 95)):
        before = run.n_fed_prompt
        run.submit(name, (token,) * 95, max_tokens=2)
        run.finish()
        assert run.n_fed_prompt - before == fed


def test_of_ended_items_one_prompt_is_kept() -> None:
    run = Run(limits(n_ctx=400))
    for index in range(5):
        run.submit(f"item {index}", (*PREFIX, index, index), max_tokens=8, priority=1)
        run.finish()
        assert run.pool.n_used == len(PREFIX) + 2
    assert run.n_fed_prompt == len(PREFIX) + 5 * 2


def test_where_nothing_is_shared_every_place_keeps_its_prompt() -> None:
    run = Run(limits(n_ctx=400, n_seq_max=2, n_seq_ids=None, shared_prefix=False))
    for index in range(8):
        run.submit(f"item {index}", (*PREFIX, index), max_tokens=4, priority=1)
    run.finish()
    assert run.n_fed_prompt == 2 * len(PREFIX) + 8
    run.check_streams()


def test_forgotten_cells_are_free() -> None:
    run = Run(limits())
    run.submit("a", (1, 2, 3))
    run.finish()
    assert run.pool.n_used
    run.give(Forget())
    assert run.pool.n_used == run.core.stats().n_cells_used == 0


# -- shared prefixes


def test_a_cold_shared_prefix_is_fed_once() -> None:
    run = Run(limits(n_ctx=200, n_seq_max=8))
    for index in range(8):
        run.submit(f"r{index}", (*PREFIX, index, index + 1), max_tokens=3)
    run.finish()
    assert run.n_fed_prompt == len(PREFIX) + 8 * 2
    run.check_streams()


def test_shared_cells_count_once() -> None:
    run = Run(limits(n_ctx=72, n_seq_max=8))
    for index in range(8):
        run.submit(f"r{index}", (*PREFIX, index, index + 1), max_tokens=4)
    most = 0
    while run.run_step():
        most = max(most, run.core.stats().n_running)
        run.check()
    assert most == 8  # 8 * 25 cells would not fit; 20 + 8 * 5 do
    assert run.preempted == []


def test_others_wait_only_as_far_as_the_shared_part() -> None:
    run = Run(limits(n_ctx=400, n_batch=10))
    run.submit("long", (*PREFIX, *range(200, 300)))
    run.submit("short", (*PREFIX, 7, 8))
    run.submit("other", (1, 2))
    seen = []
    while "short" not in run.ends:
        run.run_step()
        seen.append(set(run.by_seq.values()))
    assert "long" not in run.ends
    assert "other" in run.ends  # it shares nothing and waits for nobody
    assert not run.streams["long"]


def test_the_shared_part_may_end_inside_what_another_feeds() -> None:
    run = Run(limits(n_ctx=400, n_seq_max=4))
    run.submit("a", (*PREFIX, *range(50, 60)))
    run.submit("b", (*PREFIX, *range(50, 55), 9))
    run.submit("c", (*PREFIX[:10], 4, 4))
    run.finish()
    assert run.n_fed_prompt == 30 + 1 + 2
    run.check_streams()


def test_a_follower_feeds_the_prefix_itself_when_its_leader_goes() -> None:
    run = Run(limits(n_ctx=400, n_batch=10))
    run.submit("a", (*PREFIX, 1, 2))
    run.submit("b", (*PREFIX, 3, 4))
    run.submit("c", (*PREFIX, 5, 6))
    run.run_step()
    run.cancel("a")
    run.finish()
    assert run.n_fed_prompt == len(PREFIX) + 2 * 2  # the ten tokens that `a` fed are used
    run.check_streams()


def test_a_few_equal_tokens_are_not_waited_for() -> None:
    run = Run(limits(min_wait_tokens=8))
    run.submit("a", (1, 2, 3))
    run.submit("b", (1, 2, 4))
    run.run_step()
    assert run.fed == ["a", "b"]


def test_recurrent_state_is_shared_where_its_sequence_halts() -> None:
    run = Run(
        limits(
            n_ctx=400,
            n_seq_ids=None,
            partial_removal=False,
            shared_at_end=True,
            partial_state=False,
        )
    )
    for index in range(4):
        run.submit(f"r{index}", (*PREFIX, index, index + 1))
    run.finish()
    assert run.n_fed_prompt == len(PREFIX) + 4 * 2
    run.check_streams()


@pytest.mark.parametrize("partial_removal", [True, False])
def test_a_prefix_outlives_those_that_moved_on_from_it(partial_removal: bool) -> None:
    run = Run(
        limits(
            n_ctx=2000, n_seq_max=16, n_seq_ids=None, partial_removal=partial_removal,
            shared_at_end=True, partial_state=False,
        )
    )  # fmt: skip
    for index in range(60):
        run.submit(f"item {index}", (*PREFIX, index, index + 1), 3 + index % 7, priority=1)
    while run.run_step():
        run.check()
    assert run.n_fed_prompt == len(PREFIX) + 60 * 2
    run.submit("other", tuple(range(500, 520)))
    run.finish()
    run.check_streams()


def test_an_anchor_takes_no_place_from_those_who_do_not_need_it() -> None:
    run = Run(
        limits(
            n_ctx=2000, n_seq_max=8, n_seq_ids=None, shared_at_end=True, partial_state=False,
            partial_removal=False,
        )
    )  # fmt: skip
    for index in range(3):
        run.submit(f"shared {index}", (*PREFIX, index), 30)
    run.run_step()
    run.run_step()
    run.run_step()
    for index in range(8):
        run.submit(f"other {index}", (index, 50, 60), 30)
    run.run_step()
    run.run_step()
    assert run.core.stats().n_running == 8
    run.finish()
    run.check_streams()
