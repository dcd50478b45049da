"""Watching a run from its own terminal: one line that is drawn again, or a line a minute."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime

from loadmaster.interfaces.cli.batch_render import state_line
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.jobs.types import ItemResult
from loadmaster.tasks.batch.policy import Window
from loadmaster.tasks.batch.progress import RunState

_LINE_EVERY_S = 60.0  # where nothing can be drawn again: a log file


class RunProgress(TerminalProgress):
    """A `Watcher` of a run and a `Progress` of its loads, on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._said_s = time.monotonic()
        self.last: RunState | None = None
        self.window: Window | None = None  # in which the job may run
        self.asks = False  # someone at the terminal is to answer: nothing runs

    def state(self, state: RunState) -> None:
        """Show how far the run is."""
        self.last = state
        self.show(state_line(state, datetime.now(), self.window, self.columns))

    def show(self, line: str) -> None:
        """How far it is, drawn again; where nothing can be, a line a minute."""
        now = time.monotonic()
        if self.is_terminal:
            self.redraw(line)
        elif now - self._said_s >= _LINE_EVERY_S:
            self._said_s = now
            self.say(line)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A question is put; nothing runs until it is answered."""
        self.asks = True
        try:
            yield
        finally:
            self.asks = False

    def committed(self, results: Sequence[ItemResult]) -> None:
        """The state says it."""


@contextmanager
def heeding_signals(stop: Callable[[bool], bool]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop(at_once)`: the first time to drain, then to stop at once.

    Where `stop` says no, nothing runs that could be drained: KeyboardInterrupt is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def heed(_signal: int, _frame: object) -> None:
        nonlocal count
        count += 1
        if count > 2 or not stop(count > 1):
            raise KeyboardInterrupt
        words = "finishing what is in flight; once more: stop now" if count == 1 else "stopping"
        with suppress(OSError):  # not through sys.stderr: it may be amid a write
            os.write(2, f"\n{words}\n".encode())

    before = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
