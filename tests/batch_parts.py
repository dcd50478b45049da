"""Jobs for tests: their stores, what came of them, and a watcher."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.job_parts import SEQUENCES, FakeModel, chat, completion, new_check, write
from loadmaster.jobs.intake import create_job
from loadmaster.jobs.lines import read_lines
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import ItemResult, NewJob
from loadmaster.tasks.batch.items import order_of
from loadmaster.tasks.batch.progress import RunState

__all__ = [
    "SEQUENCES", "FakeModel", "Seen", "answers", "chat", "completion", "failures", "new_check",
    "new_store", "write",
]  # fmt: skip


def new_store(folder: Path, lines: Iterable[Mapping[str, Any] | str]) -> JobStore:
    """A job of these lines, open."""
    path = write(folder / "in.jsonl", lines)
    job = NewJob(job_id="job", model="m", settings="{}")
    return JobStore(create_job(folder, job, read_lines(path, new_check()), order_of))


def answers(store: JobStore) -> dict[str, Any]:
    """The committed output lines by custom_id."""
    lines = [json.loads(line) for line in store.lines(failed=False)]
    found = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert len(found) == len(lines)
    return found


def failures(store: JobStore) -> dict[str, Any]:
    """The committed error lines by custom_id."""
    lines = [json.loads(line) for line in store.lines(failed=True)]
    return {line["custom_id"]: line for line in lines}


class Seen:
    """A watcher that remembers, and may do something at a commit or at a look."""

    def __init__(
        self,
        *,
        on_commit: Callable[[], object] = lambda: None,
        on_state: Callable[[RunState], object] = lambda _: None,
    ) -> None:
        self.lines: list[str] = []
        self.acknowledged: list[int] = []
        self.states: list[RunState] = []
        self._on_commit = on_commit
        self._on_state = on_state

    def say(self, line: str) -> None:
        self.lines.append(line)

    def state(self, state: RunState) -> None:
        self.states.append(state)
        self._on_state(state)

    def committed(self, results: Sequence[ItemResult]) -> None:
        self.acknowledged += [result.number for result in results]
        self._on_commit()
