"""The vocabulary of jobs: a job, its items, and the one committed result of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

JobState = Literal["queued", "running", "stopped", "finished", "cancelled"]
# What a job is at:
#   queued     accepted, never run
#   running    a process works on it; one that died without a word leaves it so (`interrupted`)
#   stopped    ended before its last item, with a reason; `resume` goes on
#   finished   every item has its result
#   cancelled  given up by the user; what has no result has none; `resume` takes it up again
ItemState = Literal["pending", "done", "failed"]
STATE_CODES: dict[ItemState, int] = {"pending": 0, "done": 1, "failed": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One line of an input file: a request under a name."""

    number: int  # of the line in its file, from 1
    custom_id: str
    url: str
    body: Mapping[str, Any]
    digest: bytes  # of method, url and body: the same request gives the same digest


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that cannot be an item, and why."""

    number: int
    message: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What decides an item's turn: items that begin alike go together, long ones first."""

    group: bytes
    cost: int  # tokens it may take, roughly


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What a job is made from, beside its lines."""

    job_id: str
    model: str
    settings: str  # JSON of whoever runs the job
    input_path: Path | None = None
    output_path: Path | None = None  # where `results` go when the job ends
    error_path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as its store has it. Times are seconds since 1970."""

    job_id: str
    model: str
    settings: str
    input_path: Path | None
    output_path: Path | None
    error_path: Path | None
    state: JobState
    reason: str | None  # why it stopped
    created_s: float
    started_s: float | None  # of the last run
    ended_s: float | None
    run_s: float  # seconds of all its runs so far
    cancel_asked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A request that has no result yet."""

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]
    cost: int
    deaths: int  # workers that died with it in flight
    rank: int  # its turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemResult:
    """What came of an item: a line of the output file, or one of the error file."""

    number: int
    failed: bool
    line: Mapping[str, Any]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Committed results, and what is left."""

    done: int
    failed: int
    left: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    @property
    def total(self) -> int:
        return self.done + self.failed + self.left
