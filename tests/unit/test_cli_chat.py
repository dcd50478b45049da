"""A conversation grows, fills n_ctx, is saved and taken up again; nothing is dropped unasked."""

import json
from pathlib import Path

import pytest

from loadmaster.errors import ContextLengthError, UsageError
from loadmaster.tasks.chat import ChatSettings, Conversation, Message
from tests import cli_parts as parts


def engine(*answers: str) -> parts.ScriptedEngine:
    return parts.ScriptedEngine(parts.report(parts.plan()), answers)


def test_question_and_answer_join_the_conversation() -> None:
    scripted = engine("Hello you", "Fine")
    chat = parts.chat(scripted)
    list(chat.ask("hi"))
    list(chat.ask("how?"))
    assert [(m.role, m.content) for m in chat.conversation.messages] == [
        ("user", "hi"), ("assistant", "Hello you"), ("user", "how?"), ("assistant", "Fine"),
    ]  # fmt: skip
    assert scripted.texts[-1].count("<|im_start|>") == 4


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    chat = parts.chat(engine("one two three"))
    events = chat.ask("count")
    next(events), next(events)
    events.close()
    assert chat.conversation.messages[-1] == Message(role="assistant", content="one two")


def test_a_message_that_does_not_fit_is_refused_whole() -> None:
    scripted = engine("never")
    chat = parts.chat(scripted)
    before = list(chat.conversation.messages)
    with pytest.raises(ContextLengthError, match="n_ctx is 512; nothing was sent or dropped") as e:
        chat.ask("word " * 600)
    assert chat.conversation.messages == before
    assert scripted.requests == []
    assert e.value.hint is not None
    assert "/set ctx 1024" in e.value.hint
    assert "/drop 1" in e.value.hint


def test_dropping_turns_keeps_the_newest() -> None:
    conversation = Conversation(ChatSettings(system="Be brief"))
    for number in range(3):
        conversation.messages += [
            Message(role="user", content=f"q{number}"),
            Message(role="assistant", content=f"a{number}"),
        ]
    assert conversation.drop(2) == 4
    assert [m.content for m in conversation.messages] == ["q2", "a2"]
    assert conversation.with_system()[0] == {"role": "system", "content": "Be brief"}
    with pytest.raises(UsageError, match="there are 1 turns, not 2"):
        conversation.drop(2)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    conversation = Conversation(ChatSettings(system="Sei kurz"))
    conversation.messages += [
        Message(role="user", content='é "x"\n'),
        Message(role="assistant", content="ok"),
    ]
    conversation.save(file)
    assert file.stat().st_mode & 0o077 == 0
    again = Conversation(ChatSettings())
    again.load(file)
    assert again.messages == conversation.messages
    assert again.settings.system == "Sei kurz"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 2, "messages": []}',
        '{"schema_version": 1, "messages": [{"role": "root", "content": "x"}]}',
        '{"schema_version": 1, "messages": [{"role": "user", "content": 1}]}',
        '{"schema_version": 1, "messages": [{"role": "user"}]}',
        '{"schema_version": 1, "messages": [], "extra": 1}',
        '{"schema_version": 1, "messages": [], "system": 4}',
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    conversation = Conversation(ChatSettings())
    conversation.messages.append(Message(role="user", content="kept"))
    with pytest.raises(UsageError, match=r"bad\.json"):
        conversation.load(file)
    assert conversation.messages == [Message(role="user", content="kept")]


def test_raw_joins_the_text_as_it_is() -> None:
    scripted = engine("there")
    chat = parts.chat(scripted)
    chat.conversation.settings = ChatSettings(raw=True)
    list(chat.ask("Once upon"))
    assert scripted.texts == ["Once upon"]


def test_a_saved_conversation_is_plain_json(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    Conversation(ChatSettings()).save(file)
    assert json.loads(file.read_text()) == {"schema_version": 1, "system": None, "messages": []}
