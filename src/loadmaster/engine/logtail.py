"""The last lines of the worker's log, without what could steer a terminal."""

import re
from collections import deque

KEPT_LINES = 200
_LINE_CHARS = 2000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Lines that llama.cpp or the C++ runtime print on their way out, without a level.
_LAST_WORDS = re.compile(
    r"GGML_ASSERT|GGML_ABORT|CUDA error|terminate called|what\(\)|Assertion|fatal error"
    r"|^\S+(\.c|\.cpp|\.cu|\.h):\d+:"
)


class LogTail:
    """A bounded ring of lines. The worker marks an error of the engine by a leading `E `."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._errors: deque[str] = deque(maxlen=8)
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """Add what was read from the pipe."""
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest[-_LINE_CHARS:]
        for line in lines:
            self._add(line)

    def finish(self) -> None:
        """The pipe is closed: what has no newline is a line, too."""
        if self._rest:
            self._add(self._rest)
            self._rest = b""

    def _add(self, raw: bytes) -> None:
        text = _CONTROL.sub(" ", raw[:_LINE_CHARS].decode("utf-8", "replace")).strip()
        if not text:
            return
        self._lines.append(text)
        if text.startswith("E "):
            self._errors.append(text[2:])
        elif _LAST_WORDS.search(text):
            self._errors.append(text)

    def lines(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def last_error(self) -> str | None:
        """The engine's last complaint, if it made one."""
        return self._errors[-1] if self._errors else None

    def mentions(self, *words: str) -> bool:
        """Whether one of the last lines has one of the words."""
        return any(word in line for line in self._lines for word in words)
