"""How far a job is: committed counts, tokens and rates of this run, and when it may be done."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from loadmaster.jobs.types import Counts, ItemResult

_RATE_SPAN_S = 60.0  # tok/s are of the last minute


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How far a run is. Items and `counts` are as committed; tokens are of this run alone."""

    counts: Counts
    in_flight: int
    prompt_tokens: int
    generated_tokens: int
    tok_s: float  # generated, or of inputs embedded, in the last minute
    run_s: float  # without what was spent waiting for a window
    left_s: float | None  # to go, at the rate so far; None before there is one
    waiting: str | None  # why nothing runs now


class Watcher(Protocol):
    """Who is told of a run."""

    def say(self, line: str) -> None:
        """A line about something that happened."""

    def state(self, state: RunState) -> None:
        """How far it is; about twice a second."""

    def committed(self, results: Sequence[ItemResult]) -> None:
        """These are acknowledged."""


class Unwatched:
    """Nobody is told."""

    def say(self, line: str) -> None:
        """Drop it."""

    def state(self, state: RunState) -> None:
        """Drop it."""

    def committed(self, results: Sequence[ItemResult]) -> None:
        """Drop it."""


class Tally:
    """Sums of one run."""

    def __init__(self, counts: Counts, cost_left: int, now: float) -> None:
        self._counts = counts
        self._cost_left = cost_left
        self._cost_done = 0
        self._started_s = now
        self._idle_s = 0.0
        self._idle_since: float | None = None
        self.prompt_tokens = 0
        self.generated_tokens = 0  # of requests in flight too
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def commit(self, results: Sequence[ItemResult], costs: Mapping[int, int]) -> None:
        """Add committed results."""
        failed = sum(result.failed for result in results)
        done = len(results) - failed
        cost = sum(costs.get(result.number, 0) for result in results)
        refused = sum(costs.get(it.number, 0) for it in results if it.failed and not _ran(it))
        self._cost_done += cost - refused  # what took no time says nothing about the rest
        self._cost_left = max(0, self._cost_left - cost)
        self.prompt_tokens += sum(result.prompt_tokens for result in results)
        before = self._counts
        self._counts = replace(
            before,
            done=before.done + done,
            failed=before.failed + failed,
            left=before.left - len(results),
            prompt_tokens=before.prompt_tokens + sum(r.prompt_tokens for r in results),
            cached_tokens=before.cached_tokens + sum(r.cached_tokens for r in results),
            generated_tokens=before.generated_tokens + sum(r.generated_tokens for r in results),
        )

    def idle(self, is_idle: bool, now: float) -> None:
        """The run waits for its window, or it does not any more."""
        if is_idle and self._idle_since is None:
            self._idle_since = now
        elif not is_idle and self._idle_since is not None:
            self._idle_s += now - self._idle_since
            self._idle_since = None

    def idle_s(self, now: float) -> float:
        """Seconds of the run so far that it waited."""
        return self._idle_s + (0.0 if self._idle_since is None else now - self._idle_since)

    def run_s(self, now: float) -> float:
        """Seconds of the run so far, waiting left out."""
        return now - self._started_s - self.idle_s(now)

    def state(self, now: float, *, in_flight: int, waiting: str | None) -> RunState:
        """All of it, now."""
        run_s = self.run_s(now)
        left_s = None
        if self._cost_done > 0:
            left_s = self._cost_left * run_s / self._cost_done
        return RunState(
            counts=self._counts,
            in_flight=in_flight,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            tok_s=self._rate(now),
            run_s=run_s,
            left_s=left_s,
            waiting=waiting,
        )

    def _rate(self, now: float) -> float:
        tokens = self.generated_tokens or self.prompt_tokens  # embeddings generate none
        self._samples.append((now, tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_SPAN_S:
            self._samples.popleft()
        since, before = self._samples[0]
        return (tokens - before) / (now - since) if now > since else 0.0


def _ran(result: ItemResult) -> bool:
    """Whether the engine had anything to do for an item."""
    return result.prompt_tokens > 0 or result.generated_tokens > 0
