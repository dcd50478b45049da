"""From token bytes to text: characters are never split, stop strings never shown."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one request. After `stopped` nothing more comes out.

    A token may end inside a UTF-8 character: its bytes wait for the rest. Text that may be the
    beginning of a stop string waits until that is decided. Invalid bytes become U+FFFD.
    """

    __slots__ = ("_decoder", "_held", "_stop", "stopped")

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Take the bytes of a token; return the text that is certain now."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest at the end of the stream, what was held back included."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
