"""What a model's text is made of: reasoning, what it says, and the tools it calls. Pure.

Text is read as it comes. What may be the beginning of a mark is held back until it is clear, and
what turns out to be no call is text: nothing that a model writes is an error.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loadmaster.tasks.api.call_reading import (
    MISTRAL,
    CallPiece,
    CallReader,
    is_object,
    partial_mark,
)
from loadmaster.tasks.api.call_reading import Arguments as Arguments
from loadmaster.tasks.api.call_reading import Called as Called
from loadmaster.tasks.api.call_reading import Calling as Calling

THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


Piece = Said | Thought | CallPiece
NO_TOOLS: Mapping[str, frozenset[str]] = {}


class NewReader(Protocol):
    """Makes the reader of an answer, once its prompt is made."""

    def __call__(self, *, in_pieces: bool = False) -> "AnswerReader":
        """`in_pieces`: calls are told as they come."""


class AnswerReader:
    """Reads one answer. `tools` are the names that may be called; none: every text is text.

    With `in_pieces` a call is told as it comes: `Calling`, `Arguments` …, and `Called` when it has
    ended. Without, it is told once it is whole, as `Called` alone; one that is cut is text.
    """

    def __init__(
        self,
        *,
        tools: Mapping[str, frozenset[str]] = NO_TOOLS,
        thinking: bool = False,
        in_pieces: bool = False,
    ) -> None:
        """`tools`: with the parameters of each that are texts. `thinking`: the prompt ends inside
        the model's reasoning."""
        self._tools = tools
        self._in_pieces = in_pieces
        self._held = ""
        self._inside: str | None = THINK[1] if thinking else None  # the mark that ends it
        self._trim = thinking  # white space is dropped until there is something else
        self._begun = False  # something was said
        self._bare = False  # the whole text is, or may be, calls without marks
        self._calls = CallReader(tools)  # of the region that is open
        self._kept: list[CallPiece] = []  # of that region, where calls are told whole
        self.n_calls = 0

    def feed(self, text: str) -> Iterator[Piece]:
        """Add text; what is clear by now."""
        self._held += text
        while self._held:
            before = (len(self._held), self._inside, self._bare)
            yield from self._step()
            if (len(self._held), self._inside, self._bare) == before:
                return

    def end(self) -> Iterator[Piece]:
        """There is no more text: what was held back is what it looks like."""
        held, self._held = self._held, ""
        if self._inside == THINK[1]:
            yield from _thoughts(held)
        elif self._inside == CALL[1]:
            yield from self._more(held)
            yield from self._end_calls(CALL[0], "")
        elif self._bare:
            yield from self._more(held)
            yield from self._end_calls("", "")
        elif held:
            yield Said(text=held)

    def _step(self) -> Iterator[Piece]:
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        if not self._held:
            return
        if self._inside == CALL[1]:
            yield from self._in_call()
        elif self._inside is not None:
            yield from self._in_thought()
        elif self._bare:
            held, self._held = self._held, ""
            yield from self._more(held)
        else:
            yield from self._outside()

    def _in_thought(self) -> Iterator[Piece]:
        head, mark, tail = self._held.partition(THINK[1])
        if mark:
            self._leave(tail)
            yield from _thoughts(head.rstrip("\n"))
            return
        kept = self._held[: len(self._held) - partial_mark(self._held, THINK[1])]
        cut = len(kept.rstrip("\n"))  # line breaks before the mark are not part of it
        head, self._held = self._held[:cut], self._held[cut:]
        yield from _thoughts(head)

    def _in_call(self) -> Iterator[Piece]:
        head, mark, tail = self._held.partition(CALL[1])
        if mark:
            self._leave(tail)
            yield from self._more(head)
            yield from self._end_calls(CALL[0], mark)
            return
        cut = len(head) - partial_mark(head, CALL[1])
        head, self._held = head[:cut], head[cut:]
        yield from self._more(head)

    def _leave(self, tail: str) -> None:
        """Behind a mark: the white space that follows it belongs to nothing."""
        self._inside, self._held, self._trim = None, tail, True

    def _outside(self) -> Iterator[Piece]:
        if not self._begun and (self._opens_thought() or (self._tools and self._may_be_bare())):
            return
        at = self._held.find(CALL[0]) if self._tools else -1
        if at >= 0:
            head, self._held = self._held[:at], self._held[at + len(CALL[0]) :]
            self._inside, self._calls = CALL[1], CallReader(self._tools)
            yield from self._say(head if head.strip() else "")
            return
        keep = partial_mark(self._held, CALL[0]) if self._tools else 0
        cut = len(self._held) - keep
        head, self._held = self._held[:cut], self._held[cut:]
        yield from self._say(head)

    def _opens_thought(self) -> bool:
        """Whether the text begins with reasoning, or may; then nothing is said yet."""
        text = self._held.lstrip()
        if text.startswith(THINK[0]):
            self._inside, self._held = THINK[1], text.removeprefix(THINK[0])
            self._trim = True
            return True
        return THINK[0].startswith(text)

    def _may_be_bare(self) -> bool:
        """Whether the text begins as a call without marks does: all of it is one region."""
        text = self._held.lstrip()
        self._bare = text.startswith(("{", "[{", MISTRAL)) or any(
            text.startswith((name + "{", name + "[ARGS]")) for name in self._tools
        )
        if self._bare:
            self._calls = CallReader(self._tools, named=True)
        return self._bare or any(
            begin.startswith(text)
            for begin in ("[", MISTRAL, *(f"{name}[ARGS]" for name in self._tools))
        )

    def _say(self, text: str) -> Iterator[Piece]:
        if text:
            self._begun = True
            yield Said(text=text)

    def _more(self, text: str) -> Iterator[Piece]:
        """More of a region of calls."""
        pieces = list(self._calls.feed(text))
        if self._in_pieces:
            yield from self._counted(pieces)
        else:
            self._kept += pieces

    def _end_calls(self, before: str, after: str) -> Iterator[Piece]:
        """A region has ended, between these marks: calls, or text as it stands."""
        pieces = [*self._kept, *self._calls.end()]
        self._kept = []
        if not self._in_pieces:
            pieces = _whole_calls(pieces)
        elif not self._calls.begun:
            pieces = []
        if self._calls.begun and (pieces or self._in_pieces):
            yield from self._counted(pieces)
            yield from self._say(self._calls.unread)
        else:
            yield from self._say(before + self._calls.text + after)

    def _counted(self, pieces: Iterable[CallPiece]) -> Iterator[Piece]:
        for piece in pieces:
            first = Calling if self._in_pieces else Called
            self.n_calls += isinstance(piece, first)
            yield piece


def _whole_calls(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    """The calls of a region, if all that began have ended as they should; else none."""
    calls = [piece for piece in pieces if isinstance(piece, Called)]
    n_begun = sum(isinstance(piece, Calling) for piece in pieces)
    sound = len(calls) == n_begun and all(is_object(call.arguments) for call in calls)
    return list(calls) if sound else []


def _thoughts(text: str) -> Iterator[Piece]:
    if text:
        yield Thought(text=text)
