"""Calls of tools out of a text, while it comes: a call's name first, then its arguments. Pure.

A region of text (what stands between marks, or a whole answer) is read by one `CallReader`. Once a
call has begun it stays one; a region in which none begins is kept, and judged when it has ended.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ToolTexts = Mapping[
    str, frozenset[str]
]  # names, and which parameters of each are texts by its schema

MISTRAL = "[TOOL_CALLS]"
_JSON_HEAD = re.compile(
    r'(?:\[TOOL_CALLS\]|[\s,\[])*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED_HEAD = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[ARGS\])?(?=\{)")
_XML_HEAD = re.compile(r"\s*<function=([^>\s]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(?=.)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*)</function>", re.DOTALL)
_PARAMETERS = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_VALUE_END = "</parameter>"
_CALL_END = "</function>"
_FUNCTION_END = re.compile(r"\s*</function>")
_BETWEEN = " \t\r\n,[]"  # what stands around the calls of a list
_JSON_BEGINS = frozenset('{["-0123456789')
_JSON_WORDS = ("true", "false", "null")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calling:
    """A call begins; its arguments follow."""

    id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """More of the arguments' JSON text, of the call that began last."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A tool the model wants called; `arguments` is a JSON object's text, all of it."""

    id: str
    name: str
    arguments: str


CallPiece = Calling | Arguments | Called


class CallReader:
    """Reads one region of text that may hold calls."""

    def __init__(self, tools: ToolTexts, *, named: bool = False) -> None:
        """`named`: a tool's name right before its arguments is a call, as with Mistral."""
        self._tools = tools
        self._named = named
        self._held = ""
        self._parts: list[str] = []
        self._next: Callable[[], Iterator[CallPiece]] = self._head
        self._call: Calling | None = None
        self._arguments: list[str] = []
        self._object = JsonObject()
        self._value: _Value | None = None
        self.begun = False  # a call was told: the region is no text any more
        self.unread = ""  # once it has ended: text behind the calls

    @property
    def text(self) -> str:
        """All of the region so far."""
        return "".join(self._parts)

    def feed(self, text: str) -> Iterator[CallPiece]:
        """Add text; what is clear by now."""
        self._parts.append(text)
        self._held += text
        while True:
            before = (len(self._held), self._next)
            yield from self._next()
            if (len(self._held), self._next) == before:
                return

    def end(self) -> Iterator[CallPiece]:
        """The region has ended. A call that has not is told as far as it goes."""
        if self._value is not None:
            yield from self._more(self._value.shown(self._held))
        if self._call is not None:
            return
        whole = self._held.strip(_BETWEEN) if self.begun else self.text
        calls = read_calls(whole, self._tools)
        self.unread = "" if calls or not self.begun else whole
        for name, arguments in calls:
            yield from self._begin(name)
            yield from self._more(json.dumps(arguments, ensure_ascii=False))
            yield self._done()

    # -- a call, piece by piece

    def _begin(self, name: str) -> Iterator[CallPiece]:
        self.begun = True
        self._call, self._arguments = Calling(id=new_call_id(), name=name), []
        yield self._call

    def _more(self, text: str) -> Iterator[CallPiece]:
        if text:
            self._arguments.append(text)
            yield Arguments(text=text)

    def _done(self) -> Called:
        assert self._call is not None
        call, self._call = self._call, None
        return Called(id=call.id, name=call.name, arguments="".join(self._arguments))

    def _head(self) -> Iterator[CallPiece]:
        """Before a call: its name has to be known before any of it is told."""
        forms = [(_JSON_HEAD, self._in_object), (_XML_HEAD, self._in_function)]
        if self._named:
            forms.append((_NAMED_HEAD, self._in_object))
        for form, following in forms:
            found = form.match(self._held)
            if found is not None and found[1] in self._tools:
                self._held = self._held[found.end() :]
                self._object, self._next = JsonObject(), following
                yield from self._begin(found[1])
                return

    def _in_object(self) -> Iterator[CallPiece]:
        """Arguments that are a JSON object: told as they come, as far as their last brace."""
        n = self._object.feed(self._held)
        head, self._held = self._held[:n], self._held[n:]
        yield from self._more(head)
        if self._object.ended:
            self._next = self._behind
            yield self._done()

    def _behind(self) -> Iterator[CallPiece]:
        """The brace that closes the object around arguments, where there is one."""
        rest = self._held.lstrip()
        if rest:
            self._held = rest.removeprefix("}")
            self._next = self._head
        yield from ()

    # -- parameters between marks

    def _in_function(self) -> Iterator[CallPiece]:
        end = _FUNCTION_END.match(self._held)
        if end is not None:
            self._held, self._next = self._held[end.end() :], self._head
            yield from self._more("}" if self._arguments else "{}")
            yield self._done()
            return
        found = _PARAMETER.match(self._held)
        if found is not None:
            self._held = self._held[found.end() :].removeprefix("\n")
            assert self._call is not None
            is_text = found[1] in self._tools[self._call.name]
            self._value, self._next = _Value(is_text=is_text), self._in_parameter
            key = json.dumps(found[1], ensure_ascii=False)
            yield from self._more(f"{', ' if self._arguments else '{'}{key}: ")

    def _in_parameter(self) -> Iterator[CallPiece]:
        assert self._value is not None
        head, mark, tail = self._held.partition(_VALUE_END)
        if mark:
            self._held, self._next = tail, self._in_function
            yield from self._more(self._value.last(head.removesuffix("\n")))
            self._value = None
            return
        keep = max(
            partial_mark(self._held, _VALUE_END), partial_mark(self._held, "\n" + _VALUE_END)
        )
        cut = len(self._held) - keep
        shown = self._value.shown(self._held[:cut])
        if shown:
            self._held = self._held[cut:]
            yield from self._more(shown)


class _Value:
    """One parameter's value: a JSON string as it comes, or anything else once it is whole."""

    def __init__(self, *, is_text: bool) -> None:
        self._is_text = is_text
        self._opened = False

    def shown(self, text: str) -> str:
        """JSON of what can be told before the value has ended; empty while it has to wait."""
        if not text or not (self._opened or self._is_text or _is_no_json(text)):
            return ""
        opened, self._opened = self._opened, True
        return ("" if opened else '"') + _escaped(text)

    def last(self, text: str) -> str:
        """JSON of the rest."""
        if self._opened:
            return _escaped(text) + '"'
        return json.dumps(read_value(text, is_text=self._is_text), ensure_ascii=False)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_no_json(text: str) -> bool:
    """Whether a value that begins so is a text whatever follows."""
    begin = text.lstrip()
    if not begin or begin[0] in _JSON_BEGINS:
        return False
    return not any(begin.startswith(word) or word.startswith(begin) for word in _JSON_WORDS)


class JsonObject:
    """Finds where an object ends, without judging what is in it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.ended = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for at, char in enumerate(text):
            if self._in_string:
                self._string(char)
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return at + 1
        return len(text)

    def _string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False


# -- a region as a whole


def read_calls(text: str, tools: ToolTexts) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls in a region; empty when it is none."""
    return [call for call in _calls_in(text.strip(), tools) if call[0] in tools]


def _calls_in(text: str, tools: ToolTexts) -> list[tuple[str, dict[str, Any]]]:
    function = _FUNCTION.search(_as_far_as(text, _CALL_END))
    if function is not None:
        texts = tools.get(function[1], frozenset())
        found = _PARAMETERS.findall(_as_far_as(function[2], _VALUE_END))
        return [(function[1], {n: read_value(v, is_text=n in texts) for n, v in found})]
    named = _NAMED_HEAD.match(text)
    if named is not None:
        text = json.dumps({"name": named[1]})[:-1] + ', "arguments": ' + text[named.end() :] + "}"
    try:
        value = _loads(text.removeprefix(MISTRAL))
    except (ValueError, RecursionError):
        return []
    calls = [_one_call(item) for item in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None] if None not in calls else []


def _as_far_as(text: str, mark: str) -> str:
    """Up to the last mark, so that no beginning without an end is looked for over and over."""
    return text[: text.rfind(mark) + len(mark)] if mark in text else ""


def _one_call(item: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    return (item["name"], arguments) if isinstance(arguments, dict) else None


def read_value(text: str, *, is_text: bool = False) -> Any:
    """A parameter between marks: JSON where it is some and no text is wanted, else the text."""
    if is_text:
        return text
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return text


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(_loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _loads(text: str) -> Any:
    """JSON alone: a NaN is none, and could not be sent on."""
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


def partial_mark(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0
