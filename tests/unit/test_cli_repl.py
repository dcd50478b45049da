"""The chat loop: messages, commands, several lines, and errors that do not end it."""

import io
import json
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from loadmaster.engine.types import (
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    SamplingParams,
    TextEvent,
)
from loadmaster.errors import EngineCrashedError, UsageError
from loadmaster.interfaces.cli import settings
from loadmaster.interfaces.cli.answer import stream
from loadmaster.interfaces.cli.lines import line_reader, read_message
from loadmaster.interfaces.cli.repl import HELP, Repl
from loadmaster.interfaces.cli.text import visible, write_answer
from loadmaster.tasks.chat import Chat, ChatSettings
from tests import cli_parts as parts


class Lines:
    """A keyboard: the lines that will be typed, then the end."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def talk(
    *lines: str | type[BaseException],
    answers: tuple[str, ...] = ("Hello you",) * 9,
    as_json: bool = False,
    chat: Chat | None = None,
) -> Chat:
    """Type the lines into a chat; the chat afterwards."""
    chat = chat or parts.chat(parts.ScriptedEngine(parts.report(parts.plan()), answers))

    def reopen(chat: Chat, n_ctx: int) -> None:
        chat.session.loaded = type(chat.session.loaded)(
            n_ctx=n_ctx, n_ctx_seq=n_ctx, n_vocab=1, load_s=0, eog_tokens=(), bos_token=None,
            add_bos=False,
        )  # fmt: skip

    Repl(
        chat, read_line=Lines(*lines), reopen=reopen, progress=parts.Heard(), as_json=as_json
    ).run()
    return chat


def test_messages_are_answered_until_the_input_ends(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk("hi", "", "   ", "again", answers=("One", "Two"))
    assert capsys.readouterr().out == "One\nTwo\n"
    assert len(chat.conversation.messages) == 4


@pytest.mark.parametrize("leave", ["/bye", "/exit", "/quit", " /bye "])
def test_bye_leaves(leave: str) -> None:
    assert talk(leave, "not sent").conversation.messages == []


def test_ctrl_c_at_the_prompt_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    talk(KeyboardInterrupt, "hi")
    captured = capsys.readouterr()
    assert "Ctrl-D or /bye" in captured.err
    assert captured.out == "Hello you\n"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["plain"], "plain"),
        (["one \\", "two"], "one \ntwo"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", "/not a command", '"""'], "one\n/not a command"),
        (['"""all"""'], "all"),
        (['"""never closed', "end"], "never closed\nend"),
        (["last \\"], "last \n"),
    ],
)
def test_several_lines_make_one_message(typed: list[str], message: str) -> None:
    assert read_message(Lines(*typed)) == message


def test_continued_lines_have_a_prompt_of_their_own() -> None:
    lines = Lines("a\\", "b")
    read_message(lines)
    assert lines.prompts == [">>> ", "... "]


def test_unknown_commands_are_not_sent_to_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("/shwo", "/xyzzy").conversation.messages == []
    error = capsys.readouterr().err
    assert "error: `/shwo` is not a command\n\nhint: did you mean `/show`?" in error
    assert "hint: `/help` lists the commands" in error


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    talk("/help", "/?")
    out = capsys.readouterr().out
    assert all(out.count(command) >= 2 for command in HELP)


def test_settings_reach_the_engine() -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()))
    talk(
        "/set temp 0", "/set top_k 7", "/set top-p 0.5", "/set min_p 0", "/set seed 3",
        "/set max_tokens 9", "/set system Be brief", "hi", chat=parts.chat(engine),
    )  # fmt: skip
    [request] = engine.requests
    assert request.sampling == SamplingParams(temperature=0, top_k=7, top_p=0.5, min_p=0, seed=3)
    assert request.max_tokens == 9
    assert "<|im_start|>system\nBe brief" in engine.texts[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", "-1"), ("temp", "hot"), ("top_p", "2"), ("top_k", "1.5"), ("max_tokens", "0"),
     ("seed", "-1"), ("temp", "nan"), ("sytem", "x"), ("", "")],
)  # fmt: skip
def test_bad_settings_change_nothing(key: str, value: str) -> None:
    with pytest.raises(UsageError):
        settings.changed(ChatSettings(), key, value)


def test_an_empty_value_resets_a_setting() -> None:
    current = settings.changed(ChatSettings(), "temp", "0.1")
    assert settings.changed(current, "temp", "") == ChatSettings()
    assert settings.changed(settings.changed(current, "system", "x"), "system", "").system is None


def test_the_ledger_the_memory_and_the_figures_can_be_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk("hi", "/plan", "/mem", "/stats", "/show")
    out = capsys.readouterr().out
    assert "fits on test machine" in out
    assert "measured" in out
    assert "decode 8.0 tok/s" in out
    assert "of 512 tokens" in out
    assert "temp 0.8" in out
    assert "user: hi" in out


def test_a_full_n_ctx_is_told_and_mended(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk("word " * 600, "/set ctx 2048", "word " * 600)
    assert len(chat.conversation.messages) == 2
    error = capsys.readouterr().err
    assert "tokens, n_ctx is 512; nothing was sent or dropped" in error
    assert "n_ctx is 2048; the conversation goes on" in error


def test_an_answer_cut_by_n_ctx_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class Cut(parts.ScriptedEngine):
        def done(self, request: GenerateRequest, n_generated: int) -> DoneEvent:
            return DoneEvent(
                request_id=request.request_id, finish_reason="length", n_prompt=500, n_cached=0,
                n_generated=12, prefill_s=1, decode_s=1,
            )  # fmt: skip

    talk("hi", chat=parts.chat(Cut(parts.report(parts.plan()))))
    assert "n_ctx 512 is full: 500 tokens of prompt and 12 of answer" in capsys.readouterr().err


def test_conversations_are_kept_dropped_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a b.json"
    chat = talk("hi", "again", f"/save {file}", "/drop 1", "/clear", f"/load {file}", "/drop 1")
    assert [m.content for m in chat.conversation.messages] == ["again", "Hello you"]
    assert "forgot 2 messages" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["/save", "/load", "/load /no/such", "/drop", "/drop x"])
def test_a_failing_command_does_not_end_the_chat(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = talk(command, "hi")
    assert len(chat.conversation.messages) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.out == "Hello you\n"


def test_a_dead_engine_ends_the_chat() -> None:
    class Dying(parts.ScriptedEngine):
        def generate(self, request: GenerateRequest) -> Generator[GenerateEvent, None, None]:
            raise EngineCrashedError("the worker died of signal 9")

    with pytest.raises(EngineCrashedError):
        talk("hi", "not reached", chat=parts.chat(Dying(parts.report(parts.plan()))))


def test_json_is_one_object_for_each_message(capsys: pytest.CaptureFixture[str]) -> None:
    talk("hi", "/nonsense", as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "Hello you"
    assert first["finish_reason"] == "stop"
    assert first["usage"]["completion_tokens"] == 2
    assert second["error"]["code"] == "invalid_request"


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    import signal

    class Slow(parts.ScriptedEngine):
        def generate(self, request: GenerateRequest) -> Generator[GenerateEvent, None, None]:
            yield TextEvent(request_id=request.request_id, text="Well", n_tokens=1)
            signal.raise_signal(signal.SIGINT)
            while not self.cancelled:
                signal.pthread_sigmask(signal.SIG_BLOCK, [])  # the cancelling thread runs
            yield DoneEvent(
                request_id=request.request_id, finish_reason="cancelled", n_prompt=1, n_cached=0,
                n_generated=1, prefill_s=0, decode_s=0,
            )  # fmt: skip

    before = signal.getsignal(signal.SIGINT)
    chat = talk("hi", "/stats", chat=parts.chat(Slow(parts.report(parts.plan()))))
    captured = capsys.readouterr()
    assert captured.out.startswith("Well\n")
    assert "(stopped)" in captured.err
    assert chat.conversation.messages[-1].content == "Well"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2Jtext\r\n\ttab\x9b31m\x7f"
    assert visible(hostile) == "]0;owned[2Jtext\n\ttab31m"
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    write_answer(hostile)
    assert pipe.getvalue() == hostile


def test_piped_lines_are_read_without_a_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))
    read_line = line_reader(tmp_path / "history")
    assert [read_line(">"), read_line(">"), read_line(">")] == ["one", "", "two"]
    with pytest.raises(EOFError):
        read_line(">")
    assert not (tmp_path / "history").exists()


def test_an_answer_without_a_newline_gets_one(capsys: pytest.CaptureFixture[str]) -> None:
    events = [TextEvent(request_id="r", text="ends here", n_tokens=1)]
    answer = stream(events, on_interrupt=lambda: None)
    assert answer.finish_reason == "cancelled"
    assert capsys.readouterr().out == "ends here\n"
