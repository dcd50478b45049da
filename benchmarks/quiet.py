"""Whether other programs had the processors while something was timed (Linux)."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
# Of all processors together; a barrier waits for the thread that was put aside.
MOST_OTHERS = 0.08
# With so many of them steps can be alike because every one was held up.
MANY_OTHERS = 0.25
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True, kw_only=True)
class Quiet:
    """Repeats a timing until nothing else ran beside it, or patience ends."""

    patience_s: float
    disturbed: int = 0  # timings that were kept although something ran beside them
    alone: bool = True  # nothing ran beside the last one

    def timed(
        self,
        call: Callable[[], T],
        pid: Callable[[], int | None],
        steady: Callable[[T], bool] = lambda _: False,
    ) -> T:
        """The result of an undisturbed call; `pid` is the process that works for us. A result that
        is `steady` in itself needs no such proof."""
        while True:
            start, before = time.monotonic(), _others_s(pid())
            result = call()
            share = (_others_s(pid()) - before) / (time.monotonic() - start) / (os.cpu_count() or 1)
            self.alone = share <= MOST_OTHERS
            if self.alone or (share <= MANY_OTHERS and steady(result)):
                return result
            if self.patience_s <= 0:
                self.disturbed += 1
                return result
            self.wait(time.monotonic() - start)

    def wait(self, spent_s: float = 0.0) -> None:
        """Until a second passes in which nothing runs; `spent_s` more are gone already."""
        start = time.monotonic()
        while time.monotonic() - start + spent_s < self.patience_s:
            before = _others_s(None)
            time.sleep(1.0)
            if _others_s(None) - before <= MOST_OTHERS * (os.cpu_count() or 1):
                break
        self.patience_s -= spent_s + time.monotonic() - start


class Beside:
    """What others had of the processors since it was made; `pid` is the process that works."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._start, self._before = time.monotonic(), _others_s(pid)

    def share(self) -> float:
        """0 to 1, of all processors together."""
        seconds = time.monotonic() - self._start
        return max(0.0, _others_s(self._pid) - self._before) / seconds / (os.cpu_count() or 1)


def _others_s(pid: int | None) -> float:
    """Processor seconds used so far by everything but this process and `pid`."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    numbers = list(map(int, fields))
    busy = sum(numbers[:3]) + sum(numbers[5:8])  # without idle and iowait
    times = os.times()
    ours = times.user + times.system
    if pid is not None:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ours += (int(after_name[11]) + int(after_name[12])) * _TICK_S
    return busy * _TICK_S - ours
