"""A job whose model is taken for others now and then: given back at once, and no item lost."""

from pathlib import Path

from loadmaster.tasks.batch.executor import Executor
from loadmaster.tasks.batch.policy import Policy
from loadmaster.tasks.batch.progress import RunState
from tests.batch_parts import FakeModel, Seen, answers, chat, new_store

REASON = "people need it"


def test_a_model_that_is_withheld_is_closed_and_every_item_runs_after_all(tmp_path: Path) -> None:
    lines = [chat(f"c{n}", max_tokens=20) for n in range(40)]
    waits: list[RunState] = []

    def withhold() -> None:
        if not waits and len(seen.acknowledged) >= 4:
            model.withheld = REASON

    def look(state: RunState) -> None:
        if model.withheld is not None and state.waiting == REASON and state.in_flight == 0:
            waits.append(state)
            model.withheld = None

    seen = Seen(on_commit=withhold, on_state=look)
    with FakeModel({"tok_s": 400.0}) as model, new_store(tmp_path, lines) as store:
        executor = Executor(store, model, Policy(), seen)
        assert executor.run() == "finished"
        executor.close()
        assert len(waits) == 1
        assert waits[0].counts.left > 0
        assert model.n_opened == 2
        assert len(answers(store)) == 40
        assert sorted(seen.acknowledged) == sorted(set(seen.acknowledged))
        assert any(REASON in line for line in seen.lines)


def test_a_stop_ends_a_run_that_waits(tmp_path: Path) -> None:
    lines = [chat(f"c{n}", max_tokens=20) for n in range(8)]

    def look(state: RunState) -> None:
        if state.waiting == REASON:
            executor.stop("interrupted", at_once=True)

    with FakeModel() as model, new_store(tmp_path, lines) as store:
        model.withheld = REASON
        executor = Executor(store, model, Policy(), Seen(on_state=look))
        assert executor.run() == "interrupted"
        executor.close()
        assert store.counts().left == 8
