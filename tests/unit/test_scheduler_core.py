"""The scheduler's decisions, event by event."""

from loadmaster.scheduler.core import Scheduler, common_prefix
from loadmaster.scheduler.types import (
    Action,
    Admit,
    Admitted,
    Cancelled,
    Evict,
    Finish,
    Limits,
    Progress,
    Refuse,
    Restored,
    SequenceWork,
    Step,
    StepCut,
    Stepped,
    Submitted,
)


def scheduler(
    n_seq_max: int = 1, n_ctx: int = 64, n_batch: int = 8, partial_removal: bool = True
) -> Scheduler:
    return Scheduler(
        Limits(
            n_ctx=n_ctx,
            n_ctx_seq=n_ctx,
            n_seq_max=n_seq_max,
            n_batch=n_batch,
            n_ubatch=min(4, n_batch),
            partial_removal=partial_removal,
        )
    )


def submit(
    core: Scheduler, name: str, prompt: tuple[int, ...], max_tokens: int | None = 4
) -> list[Action]:
    """Submit and answer the admission, if there is one."""
    actions = core.on_event(
        Submitted(request_id=name, prompt=prompt, max_tokens=max_tokens), now=0.0
    )
    for action in list(actions):
        if isinstance(action, Admit):
            actions += core.on_event(Admitted(slot=action.slot, n_kept=action.n_keep), now=0.0)
    return actions


def steps(actions: list[Action]) -> list[tuple[SequenceWork, ...]]:
    return [action.work for action in actions if isinstance(action, Step)]


def test_a_prompt_is_fed_in_chunks_and_sampled_at_its_end() -> None:
    core = scheduler(n_batch=4)
    (first,) = steps(submit(core, "a", tuple(range(6))))
    assert first == (SequenceWork(seq_id=0, tokens=(0, 1, 2, 3), position=0, sample=False),)
    actions = core.on_event(Stepped(tokens={}), now=1.0)
    assert Progress(request_id="a", n_done=4, n_prompt=6) in actions
    assert steps(actions) == [(SequenceWork(seq_id=0, tokens=(4, 5), position=4, sample=True),)]


def test_a_sampled_token_is_fed_next() -> None:
    core = scheduler()
    submit(core, "a", (1, 2))
    actions = core.on_event(Stepped(tokens={0: 77}), now=1.0)
    assert steps(actions) == [(SequenceWork(seq_id=0, tokens=(77,), position=2, sample=True),)]


def test_a_lone_sequence_may_decode_on() -> None:
    core = scheduler()
    submit(core, "a", (1, 2), max_tokens=5)
    (step,) = core.on_event(Stepped(tokens={0: 5}), now=1.0)
    assert isinstance(step, Step)
    assert step.repeat == 4
    (step,) = core.on_event(Stepped(tokens={0: 6}, run=(7, 8)), now=2.0)
    assert core.cells(0) == (1, 2, 5, 6, 7)
    assert isinstance(step, Step)
    assert (step.work[0].tokens, step.work[0].position, step.repeat) == ((8,), 5, 1)


def test_nobody_decodes_on_while_others_wait() -> None:
    core = scheduler()
    submit(core, "a", (1, 2), max_tokens=5)
    submit(core, "b", (3, 4), max_tokens=5)
    (step,) = core.on_event(Stepped(tokens={0: 5}), now=1.0)
    assert isinstance(step, Step)
    assert step.repeat == 1


def test_times_and_counts_of_an_end() -> None:
    core = scheduler()
    submit(core, "a", (1, 2), max_tokens=2)
    core.on_event(Stepped(tokens={0: 5}), now=3.0)
    (end,) = core.on_event(Stepped(tokens={0: 6}), now=4.5)
    assert end == Finish(
        request_id="a",
        slot=0,
        finish_reason="length",
        n_prompt=2,
        n_cached=0,
        n_generated=2,
        prefill_s=3.0,
        decode_s=1.5,
    )
    assert core.idle


def test_a_stopped_stream_ends() -> None:
    core = scheduler()
    submit(core, "a", (1, 2))
    (end,) = core.on_event(Stepped(tokens={0: 5}, stopped=[0]), now=1.0)
    assert isinstance(end, Finish)
    assert (end.finish_reason, end.n_generated) == ("stop", 1)


def test_a_full_sequence_ends_by_length() -> None:
    core = scheduler(n_ctx=4)
    submit(core, "a", (1, 2, 3), max_tokens=None)
    (end,) = core.on_event(Stepped(tokens={0: 5}), now=1.0)
    assert isinstance(end, Finish)
    assert end.finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    core = scheduler(n_ctx=4)
    assert submit(core, "a", (1, 2, 3, 4)) == [Refuse(request_id="a", n_prompt=4, n_ctx=4)]
    assert core.idle


def test_the_next_prompt_goes_on_from_kept_cells() -> None:
    core = scheduler()
    submit(core, "a", (1, 2, 3), max_tokens=1)
    core.on_event(Stepped(tokens={0: 9}), now=1.0)
    actions = submit(core, "b", (1, 2, 8, 9))
    assert actions[0] == Admit(slot=0, request_id="b", n_keep=2)
    assert steps(actions) == [(SequenceWork(seq_id=0, tokens=(8, 9), position=2, sample=True),)]


def test_an_equal_prompt_feeds_its_last_token_again() -> None:
    core = scheduler()
    submit(core, "a", (1, 2, 3), max_tokens=1)
    core.on_event(Stepped(tokens={0: 9}), now=1.0)
    assert submit(core, "b", (1, 2, 3))[0] == Admit(slot=0, request_id="b", n_keep=2)


def test_without_partial_removal_cells_are_kept_only_as_a_whole() -> None:
    core = scheduler(partial_removal=False)
    submit(core, "a", (1, 2, 3), max_tokens=1)
    core.on_event(Stepped(tokens={0: 9}), now=1.0)
    assert core.cells(0) == (1, 2, 3)
    actions = submit(core, "b", (1, 2, 8))
    assert actions[0] == Admit(slot=0, request_id="b", n_keep=0)
    core.on_event(Cancelled(request_id="b"), now=2.0)
    core.on_event(StepCut(), now=2.0)
    core.on_event(Restored(slot=0, tokens=(1, 2, 3)), now=3.0)
    assert submit(core, "c", (1, 2, 3, 4))[0] == Admit(slot=0, request_id="c", n_keep=3)


def test_what_the_backend_could_not_keep_is_fed_again() -> None:
    core = scheduler()
    core.on_event(Restored(slot=0, tokens=(1, 2, 3)), now=0.0)
    core.on_event(Submitted(request_id="a", prompt=(1, 2, 4), max_tokens=1), now=0.0)
    actions = core.on_event(Admitted(slot=0, n_kept=0), now=0.0)
    assert steps(actions) == [(SequenceWork(seq_id=0, tokens=(1, 2, 4), position=0, sample=True),)]


def test_decoding_sequences_share_a_step_with_a_short_chunk() -> None:
    core = scheduler(n_seq_max=2)
    submit(core, "a", (1, 2), max_tokens=9)
    submit(core, "b", tuple(range(10, 20)), max_tokens=9)
    actions = core.on_event(Stepped(tokens={0: 5}), now=1.0)
    for action in list(actions):
        if isinstance(action, Admit):
            actions += core.on_event(Admitted(slot=action.slot, n_kept=0), now=1.0)
    actions += core.on_event(Stepped(tokens={0: 6}), now=2.0)
    mixed = steps(actions)[-1]
    assert [(part.seq_id, len(part.tokens)) for part in mixed] == [(0, 1), (1, 3)]  # n_ubatch 4


def test_first_come_first_served() -> None:
    core = scheduler()
    submit(core, "a", (1,), max_tokens=1)
    submit(core, "b", (2,), max_tokens=1)
    submit(core, "c", (3,), max_tokens=1)
    actions = core.on_event(Stepped(tokens={0: 9}), now=1.0)
    assert [a.request_id for a in actions if isinstance(a, Admit)] == ["b"]


def test_a_request_waits_until_its_cells_are_free() -> None:
    core = scheduler(n_seq_max=2, n_ctx=16)
    submit(core, "a", (1,), max_tokens=11)
    assert core.reserved_cells == 12
    core.on_event(Submitted(request_id="b", prompt=(2,), max_tokens=9), now=0.0)
    actions = core.on_event(Stepped(tokens={0: 9}, stopped=[0]), now=1.0)
    assert [a.request_id for a in actions if isinstance(a, Admit)] == ["b"]


def test_idle_cells_give_way_to_a_reservation() -> None:
    core = scheduler(n_seq_max=2, n_ctx=16)
    core.on_event(Restored(slot=0, tokens=tuple(range(12))), now=0.0)
    actions = submit(core, "a", (90, 91), max_tokens=None)
    assert Evict(slot=0) in actions or Admit(slot=0, request_id="a", n_keep=0) in actions
    assert core.reserved_cells == 16
    assert len(core.cells(0)) + len(core.cells(1)) == 0


def test_cancel_in_the_queue_and_in_a_step() -> None:
    core = scheduler()
    submit(core, "a", (1, 2))
    submit(core, "b", (3, 4))
    (queued,) = core.on_event(Cancelled(request_id="b"), now=1.0)
    assert isinstance(queued, Finish)
    assert (queued.request_id, queued.slot, queued.finish_reason) == ("b", None, "cancelled")
    assert core.on_event(Cancelled(request_id="a"), now=1.0) == []
    (running,) = core.on_event(Stepped(tokens={0: 5}), now=2.0)
    assert isinstance(running, Finish)
    assert running.finish_reason == "cancelled"
    assert core.on_event(Cancelled(request_id="a"), now=3.0) == []


def test_a_cut_step_never_was() -> None:
    core = scheduler(n_batch=4)
    submit(core, "a", tuple(range(6)))
    core.on_event(Cancelled(request_id="a"), now=1.0)
    (end,) = core.on_event(StepCut(), now=1.0)
    assert isinstance(end, Finish)
    assert core.cells(0) == ()


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((), (1,)) == 0
    assert common_prefix((1, 2), (1, 2, 3)) == 2
    assert common_prefix(tuple(range(100_000)), tuple(range(99_999))) == 99_999
