"""What happened to a server's models, kept for those who ask and told to those who follow."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from loadmaster.errors import InterruptedRunError
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.types import ServerEvent
from loadmaster.units import format_size

KEPT = 1000


class EventLog:
    """The last events. Used from the event loop alone."""

    def __init__(self, say: Callable[[ServerEvent], None] = lambda event: None) -> None:
        """`say` hears of every event as well: a terminal, a log."""
        self._say = say
        self._ids = itertools.count(1)
        self._events: deque[ServerEvent] = deque(maxlen=KEPT)
        self._more = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Those who follow are told what there is, and that it was all."""
        self._closed = True
        self._more.set()

    def add(self, kind: str, model: str, text: str) -> None:
        """Something happened now."""
        event = ServerEvent(
            id=next(self._ids), time_s=time.time(), kind=kind, model=model, text=text
        )
        self._events.append(event)
        self._say(event)
        self._more.set()
        self._more = asyncio.Event()

    def since(self, last_id: int) -> list[ServerEvent]:
        """Events after `last_id` that are still kept."""
        return [event for event in self._events if event.id > last_id]

    async def follow(self, last_id: int = 0) -> AsyncGenerator[ServerEvent, None]:
        """Events after `last_id`, and then each as it happens, until the log is closed."""
        while True:
            more = self._more
            for event in self.since(last_id):
                last_id = event.id
                yield event
            if self._closed:
                return
            await more.wait()


class LoadProgress:
    """A watcher of a load that tells its decisions, and ends it once nobody wants it."""

    def __init__(self, *, say: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        """Both are called from the thread that loads."""
        self._say = say
        self._stopping = stopping

    def say(self, line: str) -> None:
        """Tell a decision."""
        self._say(line.strip())

    def loading(self, fraction: float) -> None:
        """Nobody draws a bar here.

        Raises:
            InterruptedRunError: the server is to end.
        """
        if self._stopping():
            raise InterruptedRunError("the server is shutting down")

    def prefill(self, n_done: int, n_prompt: int) -> None:
        """Nobody draws a bar here."""

    def finish(self) -> None:
        """Nothing was drawn."""


def ready_text(opened: Opened, seconds: float) -> str:
    """What is told of a model that was loaded."""
    plan = opened.session.plan
    sizes = ", ".join(f"{d.id} {format_size(d.planned_bytes)}" for d in plan.devices)
    n_seq_max = plan.engine.n_seq_max
    return (
        f"loaded in {seconds:.1f} s: n_ctx {plan.engine.n_ctx // n_seq_max} for each of "
        f"{n_seq_max} sequences; {sizes}{opened.label}"
    )
