"""The scheduler's decisions, one situation at a time."""

from loadmaster.scheduler.core import Scheduler
from loadmaster.scheduler.types import (
    Admitted,
    Cancelled,
    Finish,
    Preempt,
    Progress,
    Ready,
    Refuse,
    SequenceWork,
    Step,
    StepCut,
    Stepped,
    Submitted,
)
from tests.scheduler_parts import Run, limits, solo

PREFIX = tuple(range(100, 120))


def lengths(step: Step | None) -> list[tuple[int, int]]:
    return [(part.seq_id, len(part.tokens)) for part in step.work] if step else []


# -- one request


def test_a_prompt_is_fed_in_chunks_and_sampled_at_its_end() -> None:
    run = Run(limits(n_batch=4))
    run.submit("a", tuple(range(6)))
    step = run.decide()
    assert step is not None
    first = SequenceWork(seq_id=0, tokens=(0, 1, 2, 3), position=0, sample=False)
    assert step.work == (first,)
    run.run_step()
    step = run.decide()
    assert step is not None
    assert step.work == (SequenceWork(seq_id=0, tokens=(4, 5), position=4, sample=True),)


def test_a_long_prompt_reports_progress() -> None:
    core = Scheduler(limits(n_batch=4))
    core.on_event(Submitted(request_id="a", prompt=tuple(range(6)), max_tokens=1), 0.0)
    core.on_event(Ready(), 0.0)
    core.on_event(Admitted(seq_id=0, n_kept=0), 0.0)
    core.on_event(Ready(), 0.0)
    assert core.on_event(Stepped(tokens={}), 1.0) == [
        Progress(request_id="a", n_done=4, n_prompt=6)
    ]


def test_a_lone_sequence_may_decode_on() -> None:
    run = Run(limits())
    run.submit("a", (1, 2), max_tokens=5)
    run.run_step()
    step = run.decide()
    assert step is not None
    assert step.repeat == 4
    run.run_step(n_run=3)
    assert run.core.stats().n_decode_steps == 3
    step = run.decide()
    assert step is not None
    assert (step.work[0].position, step.repeat) == (5, 1)
    run.finish()
    run.check_streams()


def test_two_do_not_decode_on() -> None:
    run = Run(limits())
    run.submit("a", (1, 2), max_tokens=5)
    run.submit("b", (3, 4), max_tokens=5)
    run.run_step()
    step = run.decide()
    assert step is not None
    assert (len(step.work), step.repeat) == (2, 1)


def test_one_decodes_on_while_another_waits_for_its_place() -> None:
    run = Run(limits(n_seq_max=1))
    run.submit("a", (1, 2), max_tokens=9)
    run.submit("b", (3, 4), max_tokens=9)
    run.run_step()
    step = run.decide()
    assert step is not None
    assert step.repeat == 8


def test_times_and_counts_of_an_end() -> None:
    core = Scheduler(limits())
    core.on_event(Submitted(request_id="a", prompt=(1, 2), max_tokens=2), 0.0)
    core.on_event(Ready(), 1.0)
    core.on_event(Admitted(seq_id=0, n_kept=0), 1.0)
    core.on_event(Ready(), 1.0)
    core.on_event(Stepped(tokens={0: 5}), 3.0)
    core.on_event(Ready(), 3.0)
    end = core.on_event(Stepped(tokens={0: 6}), 4.5)[0]
    assert end == Finish(
        request_id="a", seq_id=0, finish_reason="length", n_prompt=2, n_cached=0, n_generated=2,
        n_preempted=0, prefill_s=2.0, decode_s=1.5,
    )  # fmt: skip
    assert core.idle


def test_a_full_sequence_ends_by_length() -> None:
    run = Run(limits(n_ctx=6))
    run.submit("a", (1, 2, 3), max_tokens=None)
    run.finish()
    assert run.reasons() == {"a": "length"}
    assert len(run.streams["a"]) == 3


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    run = Run(limits(n_ctx=4))
    run.submit("a", (1, 2, 3, 4))
    run.submit("b", ())
    assert run.ends["a"] == Refuse(request_id="a", n_prompt=4, n_ctx=4)
    assert run.ends["b"] == Refuse(request_id="b", n_prompt=0, n_ctx=4)
    assert run.core.idle


# -- steps of many


def test_decoding_sequences_share_a_step_with_a_chunk() -> None:
    run = Run(limits(n_ubatch=6))
    run.submit("a", (1, 2), max_tokens=9)
    run.run_step()
    run.submit("b", tuple(range(10, 30)), max_tokens=9)
    assert lengths(run.decide()) == [(0, 1), (1, 5)]  # n_ubatch in all


def test_a_prompt_gets_on_beside_many_decodes() -> None:
    run = Run(limits(n_seq_max=8, n_ubatch=4, n_ctx=400))
    for index in range(7):
        run.submit(f"r{index}", (index, 50), max_tokens=30)
    run.run_step()
    run.submit("late", tuple(range(60, 70)), max_tokens=1)
    assert lengths(run.decide())[-1] == (7, 1)


def test_first_come_first_served() -> None:
    run = Run(limits(n_seq_max=1))
    for name in ("a", "b", "c"):
        run.submit(name, (ord(name),), max_tokens=1)
    run.finish()
    assert list(run.ends) == ["a", "b", "c"]


def test_a_small_request_does_not_overtake_one_that_waits_for_cells() -> None:
    run = Run(limits(n_ctx=40))
    run.submit("a", tuple(range(20)), max_tokens=10)
    run.run_step()
    run.submit("large", tuple(range(50, 70)), max_tokens=4)
    run.submit("small", (1,), max_tokens=1)
    run.finish()
    assert run.admitted == ["a", "large", "small"]


# -- when cells run out


def test_admission_does_not_set_all_of_max_tokens_aside() -> None:
    run = Run(limits(n_ctx=100))
    for index in range(3):
        run.submit(f"r{index}", (index,) * 10, max_tokens=80)
    run.run_step()
    assert run.core.stats().n_running == 3
    run.finish()
    run.check_streams()
    assert set(run.reasons().values()) == {"length"}


def test_the_last_gives_up_and_goes_on_from_its_state() -> None:
    run = Run(limits(n_ctx=100))
    for index in range(3):
        run.submit(f"r{index}", (index,) * 10, max_tokens=60)
    run.finish()
    stats = run.core.stats()
    assert set(run.preempted) == {"r1", "r2"}
    assert stats.n_restored == stats.n_preempted == len(run.preempted)
    assert stats.n_prefilled_tokens == 30  # nothing was fed twice
    assert stats.state_bytes == 0 < stats.state_peak_bytes <= 10_000
    run.check_streams()


def test_without_room_for_states_it_is_fed_again() -> None:
    run = Run(limits(n_ctx=100, state_bytes=0))
    for index in range(3):
        run.submit(f"r{index}", (index,) * 10, max_tokens=60)
    run.finish()
    assert run.preempted
    assert run.core.stats().n_restored == 0
    assert run.core.stats().n_prefilled_tokens > 30
    run.check_streams()


def test_a_shared_beginning_is_not_saved() -> None:
    run = Run(limits(n_ctx=120))
    for index in range(3):
        run.submit(f"r{index}", (*PREFIX, index), max_tokens=40)
    taken: list[Preempt] = []
    give = run._preempt  # what the driver is asked

    def note(action: Preempt) -> object:
        taken.append(action)
        return give(action)

    run._preempt = note  # type: ignore[method-assign, assignment]
    run.finish()
    assert {action.start for action in taken} == {len(PREFIX)}
    assert run.core.stats().n_restored
    run.check_streams()


def test_the_engine_may_have_fewer_cells_than_we_count() -> None:
    run = Run(limits(n_ctx=100))
    run.submit("old", (9,) * 20, max_tokens=1)
    run.finish()
    run.submit("a", (1,) * 20)
    run.submit("b", (2,) * 20)
    run.run_step()
    run.cut_step(no_room=True)
    assert run.preempted == []  # what was kept goes first
    run.cut_step(no_room=True)
    assert run.preempted == ["b"]
    run.finish()
    run.check_streams()


# -- priorities


def test_a_person_goes_before_a_job() -> None:
    run = Run(limits(n_seq_max=1, n_ctx=200))
    run.submit("item", tuple(range(50, 80)), max_tokens=30, priority=1)
    run.run_step()
    run.run_step()
    run.run_step()
    run.submit("person", (1, 2, 3), max_tokens=2)
    run.run_step()
    assert run.fed[-1] == "person"
    assert run.preempted == ["item"]
    run.finish()
    assert list(run.ends) == ["person", "item"]
    end = run.ends["item"]
    assert isinstance(end, Finish)
    assert end.n_preempted == 1
    run.check_streams()


def test_a_person_takes_cells_from_a_job() -> None:
    run = Run(limits(n_ctx=64))
    run.submit("item", tuple(range(50, 90)), max_tokens=20, priority=1)
    run.run_step()
    run.submit("person", tuple(range(40)), max_tokens=8)
    run.run_step()
    assert run.fed[-1] == "person"
    run.finish()
    run.check_streams()


def test_items_do_not_preempt_each_other_to_get_in() -> None:
    run = Run(limits(n_seq_max=1))
    run.submit("a", (1, 2), max_tokens=8, priority=1)
    run.run_step()
    run.submit("b", (3, 4), max_tokens=8, priority=1)
    run.finish()
    assert run.preempted == []


# -- cancelling


def test_cancel_in_the_queue_while_running_and_during_a_step() -> None:
    run = Run(limits(n_seq_max=1))
    for name in ("a", "b", "c"):
        run.submit(name, (1, 2), max_tokens=9)
    run.run_step()
    run.cancel("b")
    run.cancel("a")
    run.cancel("a")
    assert run.reasons() == {"a": "cancelled", "b": "cancelled"}
    step = run.decide()
    assert step is not None
    assert run.core.on_event(Cancelled(request_id="c"), 1.0) == []  # the step is under way
    run.run_step()
    assert run.reasons()["c"] == "cancelled"
    assert run.core.idle


def test_cancelled_cells_are_free_for_the_next_step() -> None:
    run = Run(limits(n_ctx=64))
    run.submit("a", tuple(range(50)), max_tokens=10)
    run.run_step()
    run.submit("b", tuple(range(60, 110)), max_tokens=10)
    assert run.core.stats().n_running == 1
    run.cancel("a")
    run.run_step()
    assert run.fed[-1] == "b"


def test_a_cut_step_never_was() -> None:
    run = Run(limits(n_batch=4))
    run.submit("a", tuple(range(6)))
    run.decide()
    run.step = None
    run.core.on_event(Cancelled(request_id="a"), 1.0)
    run.give(StepCut())
    assert run.reasons() == {"a": "cancelled"}
    assert run.pool.n_used == run.core.stats().n_cells_used == 0


def test_a_cut_that_takes_all_cells_feeds_them_again() -> None:
    run = Run(limits())
    run.submit("a", (1, 2, 3), max_tokens=6)
    run.run_step()
    step = run.decide()
    assert step is not None
    run.step = None
    run.pool.remove(0, 0)
    run.give(StepCut(lost=[0]))
    run.finish()
    assert tuple(run.streams["a"]) == solo((1, 2, 3), 6)


# -- prompts beside prompts


def test_who_needs_little_is_fed_beside_a_long_prompt_and_others_after_it() -> None:
    run = Run(limits(n_ctx=400, n_batch=16, n_ubatch=16))
    run.submit("long", tuple(range(1, 5)) * 10)
    run.submit("middling", (7,) * 6)  # more than a quarter of a step
    run.submit("little", (8,) * 4)
    assert lengths(run.decide()) == [(0, 12), (2, 4)]


def test_the_first_prompt_has_half_of_a_step_at_least() -> None:
    run = Run(limits(n_ctx=400, n_seq_max=8, n_batch=16, n_ubatch=16))
    run.submit("long", tuple(range(1, 5)) * 10)
    for index in range(7):
        run.submit(f"little {index}", (index,) * 3)
    assert lengths(run.decide()) == [(0, 10), (1, 3), (2, 3)]


def test_of_the_items_of_a_job_each_has_a_token_at_least() -> None:
    run = Run(limits(n_ctx=400, n_batch=16, n_ubatch=16))
    for name in "abc":
        run.submit(name, (ord(name),) * 30, priority=1)
    assert lengths(run.decide()) == [(0, 14), (1, 1), (2, 1)]


# -- answers beside prompts
