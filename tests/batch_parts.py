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
from loadmaster.tasks.batch.executor import Executor
from loadmaster.tasks.batch.items import order_of
from loadmaster.tasks.batch.policy import Policy, StopReason
from loadmaster.tasks.batch.progress import RunState

FAKE_MODEL = ("-m", "demo", "--backend", "fake")  # words of a command line
FAKE = (*FAKE_MODEL, "-np", "4")

__all__ = [
    "FAKE", "FAKE_MODEL", "SEQUENCES", "FakeModel", "Seen", "answers", "chat", "completion", "demo",
    "embedding", "failures", "new_check", "new_store", "output", "run", "write",
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


def demo(line: dict[str, object]) -> dict[str, object]:
    """A line for the demo model."""
    body = line["body"]
    assert isinstance(body, dict)
    return {**line, "body": {**body, "model": "demo"}}


def embedding(custom_id: str, text: object) -> dict[str, object]:
    """A line that asks for a vector."""
    body = {"model": "m", "input": text}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


def output(path: str = "out.jsonl") -> dict[str, object]:
    """The answers in an output file, by custom_id."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {line["custom_id"]: line["response"]["body"] for line in lines}


def run(
    store: JobStore, model: FakeModel, seen: Seen | None = None, policy: Policy | None = None
) -> StopReason:
    """Everything that is pending."""
    executor = Executor(store, model, policy or Policy(), seen or Seen())
    try:
        return executor.run()
    finally:
        executor.close()
