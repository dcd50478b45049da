"""The executor and the clock on the wall: windows, and jumps of it."""

from datetime import datetime
from pathlib import Path

from loadmaster.errors import OverBudgetError
from loadmaster.tasks.batch.executor import Executor
from loadmaster.tasks.batch.policy import Clock, Policy, parse_window
from loadmaster.tasks.batch.progress import RunState
from tests.batch_parts import (
    FakeModel,
    Seen,
    answers,
    completion,
    new_store,
)


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
