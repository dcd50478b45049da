"""When a job may run, and when it must stop: windows of the day, limits, deadlines, retries."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from datetime import time as DayTime
from typing import Literal

from loadmaster.errors import UsageError
from loadmaster.tasks.planning import PlanOptions

_WINDOW = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

# Why a run ended. All but `finished` and `cancelled` leave a job that `resume` goes on with.
StopReason = Literal[
    "finished", "cancelled", "expired", "interrupted", "token limit", "time limit", "rehearsed"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of every day, by the local clock; it may go over midnight."""

    opens: DayTime
    closes: DayTime

    def is_open(self, now: DayTime) -> bool:
        """Whether the window is open at this time of the day."""
        if self.opens < self.closes:
            return self.opens <= now < self.closes
        return now >= self.opens or now < self.closes

    def after(self, now: datetime, seconds: float) -> datetime:
        """When the window will have been open for so many seconds."""
        while True:
            if self.is_open(now.time()):
                closes = _next(now, self.closes)
                left = (closes - now).total_seconds()
                if seconds <= left:
                    return now + timedelta(seconds=seconds)
                seconds, now = seconds - left, closes
            now = _next(now, self.opens)

    def __str__(self) -> str:
        return f"{self.opens:%H:%M}-{self.closes:%H:%M}"


def _next(now: datetime, at: DayTime) -> datetime:
    """The next time that it is so late."""
    found = datetime.combine(now.date(), at, tzinfo=now.tzinfo)
    return found if found > now else found + timedelta(days=1)


def parse_window(text: str) -> Window:
    """`22:00-07:00` as a window.

    Raises:
        UsageError: it is none, or lasts no time.
    """
    match = _WINDOW.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError("no match")
        first, last = (DayTime(int(match[n]), int(match[n + 1])) for n in (1, 3))
        window = Window(opens=first, closes=last)
    except ValueError:
        raise UsageError(
            f"`{text}` is not a window of the day", hint="write `--window 22:00-07:00`"
        ) from None
    if window.opens == window.closes:
        raise UsageError(f"the window `{text}` is never open", hint="leave it out to run all day")
    return window


def parse_duration(text: str) -> float:
    """`90`, `90s`, `15m`, `8h`, `1.5d` in seconds.

    Raises:
        UsageError: it is none of these, or no time at all.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = float(match[1]) * _UNIT_S[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"`{text}` is not a duration", hint="write `90s`, `15m`, `8h` or `1.5d`")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rules of one run."""

    window: Window | None = None
    max_tokens: int | None = None  # generated in this run
    max_time_s: float | None = None  # of this run
    deadline_s: float | None = None  # for one item, from the moment the engine has it
    retries: int = 2  # of an item whose request failed while its worker went on
    drain_s: float = 30.0  # what is in flight may end in this time when the run stops


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """What a job's store keeps for whoever runs it: the model's plan options and the rules."""

    model: str
    fingerprint: str = ""  # of the model that the job was begun with; empty: not looked at
    served_names: tuple[str, ...] = ()  # what lines may call the model, beside its own names
    n_sequences: int | None = None  # None: the planner chooses
    n_cells: int | None = None  # likewise
    window: str | None = None
    max_tokens: int | None = None
    max_time_s: float | None = None
    deadline_s: float | None = None
    retries: int = 2
    plan: PlanOptions = field(default_factory=PlanOptions)

    def policy(self) -> Policy:
        """The rules as the executor takes them."""
        return Policy(
            window=None if self.window is None else parse_window(self.window),
            max_tokens=self.max_tokens,
            max_time_s=self.max_time_s,
            deadline_s=self.deadline_s,
            retries=self.retries,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Durations by a clock that never jumps; the time of day, and dates, by the one on the wall."""

    monotonic_s: Callable[[], float] = time.monotonic
    wall_s: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def time_of_day(self) -> DayTime:
        """The local time."""
        return datetime.fromtimestamp(self.wall_s()).time()
