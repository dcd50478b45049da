"""User messages out of input lines: a trailing backslash or three quotes make one of several."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

ReadLine = Callable[[str], str]  # prompt → line without its newline; EOFError at the end

PROMPT = ">>> "
MORE = "... "
_QUOTES = '"""'


def read_message(read_line: ReadLine) -> str:
    r"""The next message, perhaps of several lines: in three quotes, or with `\` at their ends.

    Raises:
        EOFError: the input has ended before a message began.
    """
    line = read_line(PROMPT)
    if line.lstrip().startswith(_QUOTES):
        return _quoted(line.lstrip()[len(_QUOTES) :], read_line)
    parts = []
    while line.endswith("\\"):
        parts.append(line[:-1])
        try:
            line = read_line(MORE)
        except EOFError:
            line = ""
    return "\n".join([*parts, line])


def _quoted(first: str, read_line: ReadLine) -> str:
    parts, line = [], first
    while _QUOTES not in line:
        parts.append(line)
        try:
            line = read_line(MORE)
        except EOFError:
            return "\n".join(parts).strip("\n")
    parts.append(line.split(_QUOTES, 1)[0])
    return "\n".join(parts).strip("\n")


def line_reader(history: Path) -> ReadLine:
    """Lines from the terminal with editing and history, or plain lines from a pipe."""
    return _terminal(history) if sys.stdin.isatty() and sys.stdout.isatty() else _piped


def _piped(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _terminal(history: Path) -> ReadLine:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(_private(history))), key_bindings=keys
    )
    return session.prompt


def _private(file: Path) -> Path:
    """The file, made readable by its owner alone: it holds what the user said."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(file, os.O_CREAT | os.O_APPEND, 0o600))
    file.chmod(0o600)
    return file
