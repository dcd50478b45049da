"""Progress on stderr: a bar on a terminal, single lines elsewhere, nothing when quiet."""

import shutil
import sys
import time
from typing import TextIO

_WIDTH = 30
_REDRAW_S = 0.1
_PREFILL_WORTH_SHOWING = 2048  # tokens; a shorter prompt is read before a bar could help


class LiveLine:
    """A line on stderr that is drawn again in place, and lines of their own above it.

    Hand-drawn: importing a library for it costs 50 ms and 8 MiB.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._tty = self._stream.isatty()
        self._drawn = ""
        self._drawn_at = 0.0

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be drawn again."""
        return self._tty

    @property
    def columns(self) -> int | None:
        """A line that is drawn again must be shorter; None where lines are printed."""
        return shutil.get_terminal_size().columns if self._tty else None

    def say(self, line: str) -> None:
        """Print a line of its own, above any bar."""
        self.finish()
        if not self._quiet:
            self._write(f"{line}\n")

    def finish(self) -> None:
        """Wipe the line."""
        if self._drawn:
            self._write("\r" + " " * len(self._drawn) + "\r")
        self._drawn = ""

    def redraw(self, line: str) -> None:
        """Draw a line in place of the last one; nothing when quiet or not on a terminal."""
        if self._quiet or not self._tty:
            return
        line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps cannot be wiped
        padding = " " * max(0, len(self._drawn) - len(line))
        self._drawn, self._drawn_at = line, time.monotonic()
        self._write("\r" + line + padding)

    def _write(self, text: str) -> None:
        """Nobody to tell, for the terminal or the pipe is gone, is no reason to end the work."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._quiet, self._tty, self._drawn = True, False, ""

    def is_due(self) -> bool:
        """Whether the last line has stood long enough to be drawn again."""
        return time.monotonic() - self._drawn_at >= _REDRAW_S


class TerminalProgress(LiveLine):
    """A `Progress` for people."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        super().__init__(quiet=quiet, stream=stream)
        self._started: dict[str, float] = {}

    def loading(self, fraction: float) -> None:
        """Draw the bar of the load."""
        self._draw("loading", fraction, "")

    def prefill(self, n_done: int, n_prompt: int) -> None:
        """Draw the bar of a long prompt."""
        if n_prompt >= _PREFILL_WORTH_SHOWING:
            self._draw("reading", n_done / n_prompt, f"{n_done} of {n_prompt} tokens")
        if n_done >= n_prompt:
            self.finish()

    def finish(self) -> None:
        """Wipe the bar."""
        super().finish()
        self._started.clear()

    def _draw(self, verb: str, fraction: float, amount: str) -> None:
        now = time.monotonic()
        started = self._started.setdefault(verb, now)
        if self.is_due() or fraction >= 1:
            self.redraw(bar_line(verb, fraction, amount, now - started))


def bar_line(verb: str, fraction: float, amount: str, elapsed_s: float, width: int = _WIDTH) -> str:
    """`loading ━━━━━━──── 60 %  3 s left`."""
    fraction = min(1.0, max(0.0, fraction))
    full = round(fraction * width)
    parts = [f"{verb} {'━' * full}{'─' * (width - full)} {fraction * 100:3.0f} %"]
    if amount:
        parts.append(amount)
    if 0.05 < fraction < 1 and elapsed_s > 1:
        parts.append(f"{elapsed_s / fraction - elapsed_s:.0f} s left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
