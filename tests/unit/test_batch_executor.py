"""The executor on a real worker with the fake backend: order, deaths, limits, windows."""

import json
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from loadmaster.engine.backends.fake import ANSWER
from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import EngineError, OverBudgetError, UsageError
from loadmaster.jobs.store import JobStore
from loadmaster.tasks.batch.executor import Executor
from loadmaster.tasks.batch.model import Vectors
from loadmaster.tasks.batch.policy import Clock, Policy, StopReason, parse_window
from loadmaster.tasks.batch.progress import RunState
from tests.batch_parts import FakeModel, Seen, answers, chat, completion, failures, new_store


def run(
    store: JobStore, model: FakeModel, seen: Seen | None = None, policy: Policy | None = None
) -> StopReason:
    executor = Executor(store, model, policy or Policy(), seen or Seen())
    try:
        return executor.run()
    finally:
        executor.close()


def test_every_item_gets_its_answer_once(tmp_path: Path) -> None:
    lines = [chat(f"c{i}") if i % 2 else completion(f"c{i}", max_tokens=8) for i in range(100)]
    seen = Seen()
    with FakeModel() as model, new_store(tmp_path, lines) as store:
        assert run(store, model, seen) == "finished"
        found, counts = answers(store), store.counts()
    assert set(found) == {f"c{i}" for i in range(100)}
    assert found["c2"]["choices"][0]["text"] == "This is "
    assert found["c1"]["choices"][0]["message"]["content"] == "This"
    assert sorted(seen.acknowledged) == list(range(1, 101))
    assert (counts.done, counts.failed, counts.left) == (100, 0, 0)
    assert counts.generated_tokens == 50 * 8 + 50 * 4
    assert seen.states[-1].counts == counts


def test_several_prompts_and_choices_make_one_answer(tmp_path: Path) -> None:
    line = completion("c", ["a", "b", [72, 105]], n=2, seed=1, temperature=1.0)
    with FakeModel() as model, new_store(tmp_path, [line]) as store:
        run(store, model)
        body = answers(store)["c"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in body["choices"]] == ["his ", "is i"] * 3
    assert body["usage"]["prompt_tokens"] == 1 + 1 + 2
    assert body["usage"]["completion_tokens"] == 6 * 4


def test_a_seed_is_fixed_for_an_item_that_names_none(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with FakeModel() as model, new_store(tmp_path / name, [completion("c")]) as store:
            run(store, model)
            found.append(model.started[0].sampling.seed)
    assert found[0] == found[1]


def test_items_that_begin_alike_go_together_and_long_ones_first(tmp_path: Path) -> None:
    lines = [
        completion("a1", "A" * 300, max_tokens=4),
        completion("b1", "B" * 300 + "x", max_tokens=8),
        completion("a2", "A" * 300, max_tokens=16),
        completion("b2", "B" * 300, max_tokens=4),
    ]
    with FakeModel() as model, new_store(tmp_path, lines) as store:
        assert [item.custom_id for item in store.pending()] == ["a2", "a1", "b1", "b2"]
        run(store, model)
        assert list(answers(store)) == ["a1", "b1", "a2", "b2"]  # as in the file


def test_a_prompt_that_can_never_fit_fails_alone_with_both_numbers(tmp_path: Path) -> None:
    lines = [completion("long", "x" * 600), *(completion(f"c{i}") for i in range(5))]
    with FakeModel(n_ctx=512) as model, new_store(tmp_path, lines) as store:
        run(store, model)
        assert len(answers(store)) == 5
        response = failures(store)["long"]["response"]
    assert response["status_code"] == 400
    assert response["body"]["error"]["code"] == "context_length_exceeded"
    assert response["body"]["error"]["numbers"] == {"n_prompt": 600, "n_ctx": 512}


def test_a_token_that_is_none_fails_before_the_engine_sees_it(tmp_path: Path) -> None:
    with FakeModel() as model, new_store(tmp_path, [completion("c", [5, 257])]) as store:
        run(store, model)
        error = failures(store)["c"]["response"]["body"]["error"]
        assert not model.started
    assert "token 257" in error["message"]


def test_a_worker_that_dies_is_replaced_and_no_result_is_lost(tmp_path: Path) -> None:
    seen = Seen()
    openings: list[dict[str, object]] = [{"fault": {"kind": "kill", "at_step": 40}}, {}]
    lines = [completion(f"c{i}", f"prompt {i}") for i in range(40)]
    with FakeModel(*openings) as model, new_store(tmp_path, lines) as store:
        assert run(store, model, seen) == "finished"
        assert len(answers(store)) == 40
        assert model.n_opened == 2
    assert sorted(seen.acknowledged) == list(range(1, 41))
    assert any("opening the model again" in line for line in seen.lines)


def test_an_item_that_kills_two_workers_fails_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", "poison" if i == 17 else f"prompt {i}") for i in range(40)]
    with FakeModel({"poison": "poison"}) as model, new_store(tmp_path, lines) as store:
        assert run(store, model) == "finished"
        found, failed = answers(store), failures(store)
        assert model.n_opened == 3
    assert set(found) == {f"c{i}" for i in range(40) if i != 17}
    assert failed["c17"]["response"] is None
    assert failed["c17"]["error"]["code"] == "engine_crashed"
    assert failed["c17"]["error"]["message"].startswith("2 workers died while it ran")


def test_an_old_item_that_kills_late_is_found_by_running_it_alone(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", f"prompt {i}", max_tokens=40) for i in range(120)]
    lines.append(completion("killer", "Z", max_tokens=64))  # it begins first, and kills late
    poison = {"poison": f"Z{ANSWER[:20]}"}
    with FakeModel(poison, n_sequences=24) as model, new_store(tmp_path, lines) as store:
        assert run(store, model) == "finished"
        assert model.n_opened <= 4
        assert list(failures(store)) == ["killer"]
        assert len(answers(store)) == 120


class Choking(FakeModel):
    """A model whose worker dies of a text before it is a prompt."""

    def tokens_of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if "toxic" in texts:
            os.kill(self.opened.pid, signal.SIGKILL)
        return super().tokens_of(texts)


def test_an_item_whose_text_kills_two_workers_fails_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", "toxic" if i == 17 else f"prompt {i}") for i in range(60)]
    with Choking() as model, new_store(tmp_path, lines) as store:
        assert run(store, model) == "finished"
        assert len(answers(store)) == 59
        assert model.n_opened == 3
        error = failures(store)["c17"]["error"]
    assert error["code"] == "engine_crashed"
    assert error["message"].startswith("2 workers died over its prompt")


def test_the_deaths_of_an_item_are_remembered_across_runs(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", "poison" if i == 1 else f"p{i}") for i in range(3)]
    with new_store(tmp_path, lines) as store:
        store.add_deaths([2])
        with FakeModel({"poison": "poison"}) as model:
            assert run(store, model) == "finished"
            assert model.n_opened == 2
        assert list(failures(store)) == ["c1"]


def test_a_worker_that_cannot_live_ends_the_run_and_no_item_is_blamed(tmp_path: Path) -> None:
    lines = [completion(f"c{i}") for i in range(30)]
    fault = {"fault": {"kind": "kill", "at_step": 1}}
    with FakeModel(fault) as model, new_store(tmp_path, lines) as store:
        with pytest.raises(EngineError, match="in a row"):
            run(store, model)
        assert store.counts().left == 30


def test_a_model_that_does_not_open_at_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [completion(f"c{i}") for i in range(30)]
    pauses: list[float] = []
    openings: list[dict[str, object]] = [{"fault": {"kind": "kill", "at_step": 5}}, {}]
    with FakeModel(*openings) as model, new_store(tmp_path, lines) as store:
        reopen = model.reopen

        def refuse_once() -> None:
            if not pauses:
                raise EngineError("no memory yet")
            reopen()

        monkeypatch.setattr(model, "reopen", refuse_once)
        executor = Executor(store, model, Policy(), Seen(), clock=Clock(sleep=pauses.append))
        assert executor.run() == "finished"
        executor.close()
        assert store.counts().done == 30
    assert len(pauses) == 1


def test_a_stop_lets_what_is_in_flight_end(tmp_path: Path) -> None:
    lines = [completion(f"c{i}") for i in range(500)]
    with FakeModel({"tok_s": 400}) as model, new_store(tmp_path, lines) as store:
        seen = Seen(on_commit=lambda: executor.stop("interrupted"))
        executor = Executor(store, model, Policy(), seen)
        assert executor.run() == "interrupted"
        counts = store.counts()
        assert 0 < counts.done < 500
        assert counts.done == len(model.started)
        executor.close()
        assert run(store, model) == "finished"
        assert len(answers(store)) == 500


def test_a_second_stop_gives_up_what_is_in_flight(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", max_tokens=1000) for i in range(10)]
    with FakeModel({"tok_s": 20}) as model, new_store(tmp_path, lines) as store:

        def look(state: RunState) -> None:
            if state.in_flight:
                executor.stop(at_once=True)

        seen = Seen(on_state=look)
        executor = Executor(store, model, Policy(), seen)
        assert executor.run() == "interrupted"
        executor.close()
        assert store.counts().left == 10


def test_a_cancellation_from_elsewhere_ends_the_run(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", max_tokens=1000) for i in range(10)]
    with FakeModel({"tok_s": 20}) as model, new_store(tmp_path, lines) as store:

        def look(state: RunState) -> None:
            if state.in_flight:
                store.ask_to_cancel(os.getpid())

        assert run(store, model, Seen(on_state=look)) == "cancelled"


def test_limits_end_a_run(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", max_tokens=20) for i in range(200)]
    with FakeModel({"tok_s": 2000}) as model, new_store(tmp_path, lines) as store:
        assert run(store, model, policy=Policy(max_tokens=100)) == "token limit"
        assert store.counts().left > 0
        assert run(store, model, policy=Policy(max_time_s=0.01)) == "time limit"


def test_an_item_over_its_deadline_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    ahead_s = 0.0

    def look() -> None:
        nonlocal ahead_s
        if len(seen.acknowledged) == 4:
            ahead_s = 100.0

    seen = Seen(on_commit=look)
    clock = Clock(monotonic_s=lambda: time.monotonic() + ahead_s)
    lines = [completion("slow", max_tokens=2000), *(completion(f"c{i}") for i in range(4))]
    with FakeModel({"tok_s": 100}) as model, new_store(tmp_path, lines) as store:
        executor = Executor(store, model, Policy(deadline_s=60.0), seen, clock=clock)
        assert executor.run() == "finished"
        executor.close()
        assert len(answers(store)) == 4
        assert failures(store)["slow"]["error"]["code"] == "deadline_exceeded"


class Slow(FakeModel):
    """A model whose engine begins no request before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[GenerateRequest, Sink]] = []
        self.cancelled: list[str] = []

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        self.waiting.append((request, sink))

    def begin(self) -> None:
        while self.waiting:
            super().start(*self.waiting.pop())


def test_the_wait_for_its_turn_does_not_count_for_a_deadline(tmp_path: Path) -> None:
    now = 0.0

    def tell() -> float:
        nonlocal now
        now += 1.0 if model.waiting else 0.0
        return now

    def look(state: RunState) -> None:
        executor.wake()
        if now > 100.0:
            model.begin()

    with Slow() as model, new_store(tmp_path, [completion(f"c{i}") for i in range(3)]) as store:
        policy, clock = Policy(deadline_s=90.0), Clock(monotonic_s=tell)
        executor = Executor(store, model, policy, Seen(on_state=look), clock=clock)
        assert executor.run() == "finished"
        executor.close()
        assert not model.cancelled
        assert store.counts().failed == 0


def test_a_defect_while_embedding_fails_the_item_and_does_not_hang_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(prompts: Sequence[Sequence[int]]) -> Vectors:
        raise ValueError("a defect")

    with FakeModel() as model, new_store(tmp_path, [embedding("e", "abc")]) as store:
        monkeypatch.setattr(model, "embed", embed)
        assert run(store, model) == "finished"
        assert "a defect" in json.dumps(failures(store)["e"])


class Wall:
    """A clock on the wall that a test sets."""

    def __init__(self, text: str) -> None:
        self.now = datetime.fromisoformat(text)

    def __call__(self) -> float:
        return self.now.timestamp()


def test_a_closed_window_closes_the_model_until_it_opens(tmp_path: Path) -> None:
    wall = Wall("2026-01-01T21:00")
    closed: list[bool] = []

    def look(state: object) -> None:
        closed.append(model.n_opened == 1 and not model.started)
        if len(closed) == 2:
            wall.now = datetime.fromisoformat("2026-01-01T22:30")

    with FakeModel() as model, new_store(tmp_path, [completion("c")]) as store:
        policy = Policy(window=parse_window("22:00-07:00"))
        executor = Executor(store, model, policy, Seen(on_state=look), clock=Clock(wall_s=wall))
        assert executor.run() == "finished"
        assert executor.idle_s > 0
        executor.close()
        assert model.n_opened == 2
        assert len(answers(store)) == 1
    assert closed[:2] == [True, True]


def test_a_model_that_finds_no_memory_when_its_window_opens_is_tried_again(tmp_path: Path) -> None:
    now, wall = 0.0, Wall("2026-01-01T21:00")
    tries: list[float] = []

    class Crowded(FakeModel):
        def reopen(self) -> None:
            if wall.now.hour == 22:
                tries.append(now)
                if len(tries) < 5:
                    raise OverBudgetError("others have the card")
            super().reopen()

    def look(state: RunState) -> None:
        nonlocal now
        now += 100.0
        wall.now = datetime.fromisoformat("2026-01-01T22:30")
        executor.wake()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with Crowded() as model, new_store(tmp_path, [completion("c")]) as store:
        policy = Policy(window=parse_window("22:00-07:00"))
        clock = Clock(wall_s=wall, monotonic_s=lambda: now, sleep=sleep)
        executor = Executor(store, model, policy, Seen(on_state=look), clock=clock)
        assert executor.run() == "finished"
        executor.close()
        assert store.counts().done == 1
    assert len(tries) == 5
    assert tries[3] - tries[2] >= 300.0


def test_a_jump_of_the_wall_clock_changes_no_duration(tmp_path: Path) -> None:
    wall = Wall("2026-01-01T12:00")

    def jump(state: object) -> None:
        wall.now = datetime.fromisoformat("2031-01-01T12:00")

    lines = [completion(f"c{i}") for i in range(20)]
    with FakeModel() as model, new_store(tmp_path, lines) as store:
        policy = Policy(deadline_s=60, max_time_s=60)
        seen = Seen(on_state=jump)
        executor = Executor(store, model, policy, seen, clock=Clock(wall_s=wall))
        assert executor.run() == "finished"
        executor.close()
        assert store.counts().failed == 0
    assert seen.states[-1].run_s < 60


def test_only_some_items_and_then_the_rest(tmp_path: Path) -> None:
    lines = [completion(f"c{i}") for i in range(30)]
    with FakeModel() as model, new_store(tmp_path, lines) as store:
        executor = Executor(store, model, Policy(), Seen())
        chosen = store.spread(5)
        assert executor.run(only=chosen) == "finished"
        assert store.counts().done == 5
        assert executor.run() == "finished"
        executor.close()
        assert store.counts().done == 30


def embedding(custom_id: str, text: object) -> dict[str, object]:
    body = {"model": "m", "input": text}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


def test_embeddings_share_calls_and_keep_their_order(tmp_path: Path) -> None:
    lines = [embedding(f"e{i}", ["x" * (i + 1), "y"]) for i in range(40)]
    with FakeModel() as model, new_store(tmp_path, lines) as store:
        assert run(store, model) == "finished"
        found = answers(store)
    assert [d["embedding"][0] for d in found["e7"]["data"]] == [8.0, 1.0]
    assert found["e7"]["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert len(found) == 40


def test_an_input_that_cannot_be_embedded_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(prompts: Sequence[Sequence[int]]) -> Vectors:
        if any(len(prompt) > 3 for prompt in prompts):
            raise UsageError("too long")
        return [[1.0] for _ in prompts]

    lines = [embedding(f"e{i}", "x" * (9 if i == 2 else 1)) for i in range(6)]
    with FakeModel() as model, new_store(tmp_path, lines) as store:
        monkeypatch.setattr(model, "embed", embed)
        assert run(store, model) == "finished"
        assert len(answers(store)) == 5
        assert "too long" in json.dumps(failures(store)["e2"])
