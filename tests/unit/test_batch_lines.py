"""The line of a job on a terminal: what it says in how many columns."""

from datetime import datetime

import pytest

from loadmaster.interfaces.cli.batch_render import state_line
from loadmaster.jobs.types import Counts
from loadmaster.tasks.batch.progress import RunState

NOW = datetime(2026, 3, 1, 22, 0)


def state(waiting: str | None = None) -> RunState:
    return RunState(
        counts=Counts(done=4500, failed=12, left=5488), in_flight=64, prompt_tokens=0,
        generated_tokens=0, tok_s=812.4, run_s=9000.0, left_s=11_100.0, waiting=waiting,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [None, 120, 100, 90, 80])
def test_the_rate_and_the_finish_time_are_there_in_80_columns(columns: int | None) -> None:
    line = state_line(state(), NOW, columns=columns)
    assert columns is None or len(line) < columns
    for words in ("45 %", "4500 done, 12 failed, 5488 left", "812 tok/s", "until 01:05"):
        assert words in line


def test_where_there_is_room_the_bar_is_long_and_the_time_left_is_said() -> None:
    wide = state_line(state(), NOW)
    assert wide.startswith(f"items {'━' * 14}{'─' * 16} ")
    assert wide.endswith("3 h 05 min left, until 01:05")
    assert state_line(state(), NOW, columns=200) == wide


def test_what_a_job_waits_for_is_there_in_80_columns() -> None:
    line = state_line(state("waiting for 22:00-07:00"), NOW, columns=80)
    assert len(line) < 80
    assert line.endswith("waiting for 22:00-07:00")
