"""Questions to an engine's timers: until the time is up, and again where the answers scatter."""

import statistics
import time
from collections.abc import Callable, Sequence

from loadmaster.engine.timing import Question
from loadmaster.machine.measurements import DISTURBED_SPREAD

Ask = Callable[[Question], tuple[float, ...] | None]
Clock = Callable[[], float]
RUNS = 3


class Asker:
    """Asks until the time is up, and watches how much the runs of one timing differ."""

    def __init__(self, ask: Ask, *, deadline: float, clock: Clock = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._end = self._until = deadline
        self._spreads: list[float] = []

    def share(self, n_left: int) -> None:
        """Give the next device its part of what is left of the time."""
        now = self._clock()
        self._until = now + max(0.0, self._end - now) / n_left

    @property
    def late(self) -> bool:
        return self._clock() >= self._until

    def __call__(self, question: Question) -> tuple[float, ...] | None:
        """Seconds of every run; None when the device cannot, or the time is up."""
        if self.late:
            return None
        seconds = self._ask(question)
        if seconds is None:
            return None
        spread = _spread(seconds)
        if spread > DISTURBED_SPREAD and not self.late:
            again = self._ask(question) or seconds
            seconds = tuple(map(min, seconds, again))
            spread = min(spread, _spread(again))
        self._spreads.append(spread)
        return seconds

    @property
    def spread(self) -> float:
        return round(statistics.fmean(self._spreads), 3) if self._spreads else 1.0


def _spread(seconds: Sequence[float]) -> float:
    """The median of a question's first timing over its least."""
    first = seconds[:RUNS]
    return statistics.median(first) / min(first) if min(first) > 0 else 1.0


def best(seconds: tuple[float, ...] | None) -> float | None:
    return undisturbed(seconds) if seconds else None


def undisturbed(seconds: Sequence[float]) -> float:
    return sorted(seconds)[min(1, len(seconds) - 1)]
