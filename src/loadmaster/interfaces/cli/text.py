"""Text that comes from outside: prompts from files and pipes, answers from models."""

import re
import sys
from pathlib import Path

from loadmaster.engine.request_checks import check_schema_text
from loadmaster.errors import NotFoundError, UsageError

PROMPT_LIMIT_BYTES = 64 << 20
# C0 but newline and tab, DEL, and C1: an answer must not move the cursor or set a window title.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Model text without control characters, for a terminal."""
    return _CONTROLS.sub("", text)


def write_answer(text: str) -> None:
    """Stream model text to stdout: filtered on a terminal, untouched in a file or pipe."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The argument, the file and piped stdin, in this order, each on lines of its own.

    Raises:
        UsageError: there is nothing in any of them, or it is no text.
    """
    parts = [prompt] if prompt else []
    if file is not None:
        parts.append(_read_file(file))
    if not sys.stdin.isatty():
        parts.append(_read_stdin())
    text = "\n\n".join(part for part in (p.rstrip("\n") for p in parts) if part)
    if not text:
        raise UsageError(
            "there is no prompt",
            hint='give one: `loadmaster run MODEL "…"`, `-f FILE`, or a pipe; '
            "`loadmaster chat MODEL` asks for it",
        )
    return text


def read_json_schema(given: str) -> str:
    """The schema itself, or what is in the file of this name; checked as far as that is quick.

    Raises:
        UsageError: it is no JSON object, or too large.
        NotFoundError: there is no such file.
    """
    text = given if given.lstrip().startswith(("{", "[")) else _read_file(Path(given))
    check_schema_text(text)
    return text


def _read_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return _decode(stream.read(PROMPT_LIMIT_BYTES + 1), str(file))
    except FileNotFoundError:
        raise NotFoundError(f"`{file}` is not there") from None


def _read_stdin() -> str:
    if sys.stdin.closed:
        return ""
    return _decode(sys.stdin.buffer.read(PROMPT_LIMIT_BYTES + 1), "stdin")


def _decode(content: bytes, place: str) -> str:
    if len(content) > PROMPT_LIMIT_BYTES:
        raise UsageError(f"{place} is longer than {PROMPT_LIMIT_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
        ) from None
