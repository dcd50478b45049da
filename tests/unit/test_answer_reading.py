"""Reasoning, text and calls out of a model's text, however it is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.tasks.api.answer_reading import AnswerReader, Called, Piece, Said, Thought

TOOLS = ("weather", "time")
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
    closed = CALL.rindex("}") + 1
    if cut < closed:
        assert calls == []
        assert said.strip() == CALL[:cut].strip()
    else:  # only the mark at the end is missing
        assert [call.name for call in calls] == ["weather"] or said


@given(text=st.text(alphabet="<>/thinkol_ca{}[]\n x", max_size=60), size=st.integers(1, 9))
def test_how_the_text_is_cut_changes_nothing(text: str, size: int) -> None:
    whole, parts = read(text), read(text, size=size)
    assert whole[:2] == parts[:2]
    assert [c.name for c in whole[2]] == [c.name for c in parts[2]]


def test_without_tools_nothing_is_a_call() -> None:
    reader = AnswerReader()
    assert list(reader.feed(CALL)) + list(reader.end()) == [Said(text=CALL)]
