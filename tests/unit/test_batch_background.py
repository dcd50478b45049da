"""The process of a job in the background: what it does not take from the one that starts it."""

import os
import sys
from pathlib import Path

import pytest

from loadmaster.interfaces.cli import batch_background
from loadmaster.jobs.lines import read_lines
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.types import NewJob
from loadmaster.tasks.batch.items import order_of
from tests.batch_parts import completion, new_check, write


def test_open_files_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `flock a-lock loadmaster batch submit …`: the lock is free when that has ended."""
    shelf = Shelf(tmp_path / "jobs")
    path = write(tmp_path / "in.jsonl", [completion("a")])
    shelf.create(
        NewJob(job_id="job", model="m", settings="{}"), read_lines(path, new_check()), order_of
    )
    lock = os.open(path, os.O_RDONLY)
    os.set_inheritable(lock, True)
    inherited: list[bool] = []
    spawn = os.posix_spawn

    def end_at_once(
        program: str, words: list[str], environment: os._Environ[str], **_: object
    ) -> int:
        inherited.append(os.get_inheritable(lock))
        return spawn(program, [sys.executable, "-c", ""], environment)

    monkeypatch.setattr(os, "posix_spawn", end_at_once)
    batch_background.start_in_background(shelf, "job")
    os.close(lock)
    assert inherited == [False]
