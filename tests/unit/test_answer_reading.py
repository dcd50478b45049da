"""Reasoning, text and calls out of a model's text, however it is cut."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.tasks.api.answer_reading import (
    AnswerReader,
    Arguments,
    Called,
    Calling,
    Piece,
    Said,
    Thought,
)

TOOLS = {"weather": frozenset[str](), "time": frozenset[str](), "write": frozenset({"text"})}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nBonn\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


def read(
    text: str, *, size: int = 1 << 30, thinking: bool = False
) -> tuple[str, str, list[Called]]:
    """What was said, what was thought, what was called; the text comes in pieces of `size`."""
    reader = AnswerReader(tools=TOOLS, thinking=thinking)
    pieces: list[Piece] = []
    for at in range(0, len(text), size):
        pieces += reader.feed(text[at : at + size])
    pieces += reader.end()
    calls = [piece for piece in pieces if isinstance(piece, Called)]
    assert reader.n_calls == len(calls)
    return (
        "".join(p.text for p in pieces if isinstance(p, Said)),
        "".join(p.text for p in pieces if isinstance(p, Thought)),
        calls,
    )


@pytest.mark.parametrize(
    ("text", "said", "thought"),
    [
        ("plain text", "plain text", ""),
        ("<think>\nhm\n</think>\n\nyes", "yes", "hm"),
        ("<think></think>yes", "yes", ""),
        ("<think>cut off", "", "cut off"),
        ("a <think> in the middle", "a <think> in the middle", ""),
        ("<thin", "<thin", ""),
        ("1 < 2", "1 < 2", ""),
    ],
)
def test_reasoning_is_apart_from_what_is_said(text: str, said: str, thought: str) -> None:
    for size in (1, 2, 5, 100):
        assert read(text, size=size)[:2] == (said, thought)


def test_a_prompt_may_end_inside_the_reasoning() -> None:
    assert read("hm\n</think>\nyes", thinking=True) == ("yes", "hm", [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (CALL, {"city": "Bonn"}),
        (XML, {"city": "Bonn", "days": 3}),
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bonn"}}]', {"city": "Bonn"}),
        ('{"name": "weather", "parameters": {"city": "Bonn"}}', {"city": "Bonn"}),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_read_in_every_form(text: str, arguments: object, size: int) -> None:
    said, _, (call,) = read(text, size=size)
    assert said == ""
    assert call.name == "weather"
    assert json.loads(call.arguments) == arguments


def in_pieces(text: str, size: int) -> list[Piece]:
    reader = AnswerReader(tools=TOOLS, in_pieces=True)
    pieces: list[Piece] = []
    for at in range(0, len(text), size):
        pieces += reader.feed(text[at : at + size])
    return [*pieces, *reader.end()]


FORMS = {
    "hermes": CALL,
    "qwen": XML,
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bonn"}}]',
    "mistral, newer": '[TOOL_CALLS]weather[ARGS]{"city": "Bonn", "days": [1, {"a": "}"}]}',
    "mistral, its marks left out": 'weather{"city": "Bonn"}',
    "llama": '{"name": "weather", "parameters": {"city": "a \\" b } c"}}',
    "several": f"{CALL}\n{XML}",
    "a list": '[{"name": "weather", "arguments": {}}, {"name": "time", "arguments": {"a": 1}}]',
    "arguments first": '<tool_call>{"arguments": {"x": 1}, "name": "time"}</tool_call>',
    "a text that looks like a number": "<tool_call><function=write><parameter=text>\n12\n"
    "</parameter></function></tool_call>",
    "a long text": "<tool_call><function=write><parameter=text>\nimport os\n\nprint('\"')\n"
    "</parameter>\n<parameter=to>\nnowhere\n</parameter></function></tool_call>",
    "no parameters": "<tool_call><function=time></function></tool_call>",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_a_call_in_pieces_is_the_whole_call(form: str, size: int) -> None:
    """Name first, arguments after it, and together they are what is told of a whole one."""
    pieces = in_pieces(FORMS[form], size)
    told: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, Calling):
            told.append((piece.name, ""))
        elif isinstance(piece, Arguments):
            told[-1] = (told[-1][0], told[-1][1] + piece.text)
        else:
            assert isinstance(piece, Called)
            assert (piece.name, piece.arguments) == told[-1]
    said, _, calls = read(FORMS[form])
    assert (said, told) == ("", [(call.name, call.arguments) for call in calls])
    assert told


def test_arguments_come_while_they_are_written() -> None:
    def fragments(text: str) -> list[str]:
        return [p.text for p in in_pieces(text, 4) if isinstance(p, Arguments)]

    assert len(fragments(CALL)) >= 4
    assert len(fragments(FORMS["a long text"])) >= 8
    assert json.loads("".join(fragments(FORMS["a long text"]))) == {
        "text": "import os\n\nprint('\"')", "to": "nowhere"
    }  # fmt: skip
    assert json.loads("".join(fragments(FORMS["a text that looks like a number"]))) == {
        "text": "12"
    }


def test_a_call_in_pieces_that_is_cut_keeps_what_there_is() -> None:
    for text in (CALL[:-25], XML[:60]):
        first, *rest = in_pieces(text, 3)
        assert isinstance(first, Calling)
        assert rest
        assert {type(piece) for piece in rest} == {Arguments}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "arguments": {"city": Bonn}}',
        '<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>',
    ],
)
def test_arguments_that_are_no_json_make_no_whole_call(text: str) -> None:
    assert read(text) == (text, "", [])


def test_beginnings_without_an_end_cost_no_more_than_their_length() -> None:
    started = time.process_time()
    for one in ("<function=weather>", "<parameter=city>", '{"name": '):
        text = "</function></parameter>" + one * 20_000
        text = f"<tool_call>{text}</tool_call>"
        assert read(text)[0] == text
    assert time.process_time() - started < 2  # 0.01; minutes where each begins anew


def test_text_behind_a_call_without_marks_is_said() -> None:
    text = '{"name": "weather", "arguments": {}}\nThat is all.'
    for size in (1, 1000):
        said, _, (call,) = read(text, size=size)
        assert (said, call.name) == ("That is all.", "weather")


def test_text_and_several_calls_keep_their_order() -> None:
    said, _, calls = read(f"Let me look.\n{CALL}\n{CALL.replace('weather', 'time')}", size=3)
    assert said == "Let me look.\n"
    assert [call.name for call in calls] == ["weather", "time"]
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "<tool_call>no json</tool_call>",
        '<tool_call>{"name": "weather", "arguments": "text"}</tool_call>',
        '{"name": 1}',
        "{ braces",
        "[1, 2]",
        "[TOOL_CALLS",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    for size in (1, 4, 1000):
        assert read(text, size=size) == (text, "", [])


@given(cut=st.integers(0, len(CALL) - 1), size=st.integers(1, 20))
def test_a_call_that_is_cut_anywhere_is_text_and_never_half_a_call(cut: int, size: int) -> None:
    said, _, calls = read(CALL[:cut], size=size)
    if cut <= CALL.index("}"):
        assert calls == []
        assert said.strip() == CALL[:cut].strip()
    else:  # its arguments are whole
        assert [call.name for call in calls] == ["weather"]


@given(text=st.text(alphabet="<>/thinkol_ca{}[]\n x", max_size=60), size=st.integers(1, 9))
def test_how_the_text_is_cut_changes_nothing(text: str, size: int) -> None:
    whole, parts = read(text), read(text, size=size)
    assert whole[:2] == parts[:2]
    assert [c.name for c in whole[2]] == [c.name for c in parts[2]]


@given(text=st.text(alphabet='weather{}[]":, \n<=>/', max_size=60), size=st.integers(1, 9))
def test_no_text_is_lost_or_an_error_in_pieces(text: str, size: int) -> None:
    pieces = in_pieces(text, size)
    if not any(isinstance(piece, Calling) for piece in pieces):
        assert "".join(p.text for p in pieces if isinstance(p, Said)) == text


def test_without_tools_nothing_is_a_call() -> None:
    reader = AnswerReader()
    assert list(reader.feed(CALL)) + list(reader.end()) == [Said(text=CALL)]
