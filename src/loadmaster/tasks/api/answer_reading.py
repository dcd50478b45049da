"""What a model's text is made of: reasoning, what it says, and the tools it calls. Pure.

Text is read as it comes. What may be the beginning of a mark is held back until it is clear, and
what turns out to be no call is text: nothing that a model writes is an error.
"""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")
_MISTRAL = "[TOOL_CALLS]"
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MOST_CALL_CHARS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A tool the model wants called; `arguments` is a JSON object's text."""

    id: str
    name: str
    arguments: str


Piece = Said | Thought | Called


class AnswerReader:
    """Reads one answer. `tools` are the names that may be called; none: every text is text."""

    def __init__(self, *, tools: Sequence[str] = (), thinking: bool = False) -> None:
        """`thinking`: the prompt ends inside the model's reasoning."""
        self._tools = frozenset(tools)
        self._held = ""
        self._inside: str | None = THINK[1] if thinking else None  # the mark that ends it
        self._trim = thinking  # white space is dropped until there is something else
        self._begun = False  # something was said
        self._bare = False  # the whole text is, or may be, one call without marks
        self.n_calls = 0

    def feed(self, text: str) -> Iterator[Piece]:
        """Add text; what is clear by now."""
        self._held += text
        while self._held:
            before = (len(self._held), self._inside)
            yield from self._step()
            if (len(self._held), self._inside) == before:
                return

    def end(self) -> Iterator[Piece]:
        """There is no more text: what was held back is what it looks like."""
        held, self._held = self._held, ""
        if self._inside == THINK[1]:
            yield from _thoughts(held)
        elif self._inside == CALL[1]:
            yield from self._calls(held, otherwise=CALL[0] + held)
        elif self._bare:
            yield from self._calls(held, otherwise=held)
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
        elif not self._bare:
            yield from self._outside()

    def _in_thought(self) -> Iterator[Piece]:
        head, mark, tail = self._held.partition(THINK[1])
        if mark:
            self._leave(tail)
            yield from _thoughts(head.rstrip("\n"))
            return
        kept = self._held[: len(self._held) - _partial(self._held, THINK[1])]
        cut = len(kept.rstrip("\n"))  # line breaks before the mark are not part of it
        head, self._held = self._held[:cut], self._held[cut:]
        yield from _thoughts(head)

    def _in_call(self) -> Iterator[Piece]:
        head, mark, tail = self._held.partition(CALL[1])
        if mark or len(self._held) > _MOST_CALL_CHARS:
            self._leave(tail)
            yield from self._calls(head, otherwise=CALL[0] + head + mark)

    def _leave(self, tail: str) -> None:
        """Behind a mark: the white space that follows it belongs to nothing."""
        self._inside, self._held, self._trim = None, tail, True

    def _outside(self) -> Iterator[Piece]:
        if not self._begun and (self._opens_thought() or (self._tools and self._may_be_bare())):
            return
        at = self._held.find(CALL[0]) if self._tools else -1
        if at >= 0:
            head, self._held = self._held[:at], self._held[at + len(CALL[0]) :]
            self._inside = CALL[1]
            yield from self._say(head if head.strip() else "")
            return
        keep = _partial(self._held, CALL[0]) if self._tools else 0
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
        """Whether the text begins as a call without marks does: all of it is waited for."""
        text = self._held.lstrip()
        if text.startswith(_MISTRAL):
            self._held = text.removeprefix(_MISTRAL)
            self._bare = True
        elif text.startswith(("{", "[{")):
            self._bare = True
        return self._bare or text == "[" or _MISTRAL.startswith(text)

    def _say(self, text: str) -> Iterator[Piece]:
        if text:
            self._begun = True
            yield Said(text=text)

    def _calls(self, text: str, *, otherwise: str) -> Iterator[Piece]:
        calls = [call for call in _read_calls(text) if call[0] in self._tools]
        if not calls:
            yield from self._say(otherwise)
        for name, arguments in calls:
            self.n_calls += 1
            yield Called(
                id=f"call_{uuid.uuid4().hex[:24]}",
                name=name,
                arguments=json.dumps(arguments, ensure_ascii=False),
            )


def _thoughts(text: str) -> Iterator[Piece]:
    if text:
        yield Thought(text=text)


def _partial(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def _read_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments; empty when the text is no call."""
    function = _FUNCTION.search(text)
    if function is not None:
        return [(function[1], {n: _value(v) for n, v in _PARAMETER.findall(function[2])})]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = [_one_call(item) for item in (value if isinstance(value, list) else [value])]
    return [call for call in found if call is not None] if None not in found else []


def _one_call(item: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    return (item["name"], arguments) if isinstance(arguments, dict) else None


def _value(text: str) -> Any:
    """A parameter between marks: JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
