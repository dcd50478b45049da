"""The executor on a real worker with the fake backend: order, deaths, limits, windows."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import UsageError
from loadmaster.tasks.batch.executor import Executor
from loadmaster.tasks.batch.model import Vectors
from loadmaster.tasks.batch.policy import Clock, Policy
from loadmaster.tasks.batch.progress import RunState
from tests.batch_parts import (
    FakeModel,
    Seen,
    answers,
    chat,
    completion,
    embedding,
    failures,
    new_store,
    run,
)


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
