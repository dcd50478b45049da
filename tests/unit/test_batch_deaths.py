"""The executor when workers die: nothing is lost, and the item that kills is found."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadmaster.engine.backends.fake_spec import ANSWER
from loadmaster.errors import EngineError
from loadmaster.tasks.batch.executor import Executor
from loadmaster.tasks.batch.policy import Clock, Policy
from tests.batch_parts import (
    FakeModel,
    Seen,
    answers,
    completion,
    failures,
    new_store,
    run,
)


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
