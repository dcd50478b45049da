"""Lines of an OpenAI Batch input file: read one at a time, checked, never repaired."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.jobs.types import BadLine, BatchLine

LINE_LIMIT_BYTES = 8 << 20  # as a request's body over HTTP
_CUSTOM_ID_CHARS = 512
_KEYS = {"custom_id", "method", "url", "body"}
_BOM = b"\xef\xbb\xbf"

# Raises a UsageError if the endpoint would not take this body.
CheckBody = Callable[[str, dict[str, Any]], object]


def read_lines(path: Path, check: CheckBody) -> Iterator[BatchLine | BadLine]:
    """Every line that is not blank, in order; no more than one of them is in memory.

    Raises:
        NotFoundError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in _raw_lines(file.readline):
                if isinstance(raw, BadLine):
                    yield raw
                elif raw.strip():
                    yield parse_line(number, raw, check)
    except OSError as error:
        raise NotFoundError(f"cannot read `{path}`: {error.strerror}") from None


def _raw_lines(readline: Callable[[int], bytes]) -> Iterator[tuple[int, bytes | BadLine]]:
    number = 0
    while raw := readline(LINE_LIMIT_BYTES + 1):
        number += 1
        if len(raw) <= LINE_LIMIT_BYTES:
            yield number, raw.removeprefix(_BOM) if number == 1 else raw
            continue
        size = len(raw)
        while not raw.endswith(b"\n") and (raw := readline(LINE_LIMIT_BYTES)):
            size += len(raw)
        message = f"{size} bytes, the limit is {LINE_LIMIT_BYTES}"
        yield number, BadLine(number=number, message=message)


def parse_line(number: int, raw: bytes, check: CheckBody) -> BatchLine | BadLine:
    """One line as a request, or what is wrong with it."""
    try:
        value = _decode(raw)
        custom_id, url, body = _envelope(value)
        _check_text(custom_id)
        digest = _digest(url, body)
        check(url, body)
    except UsageError as error:
        return BadLine(number=number, message=error.message)
    return BatchLine(number=number, custom_id=custom_id, url=url, body=body, digest=digest)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _envelope(value: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise UsageError("`custom_id` is missing, or not a text")
    if len(custom_id) > _CUSTOM_ID_CHARS:
        raise UsageError(f"`custom_id` has {len(custom_id)} characters, {_CUSTOM_ID_CHARS} at most")
    if value.get("method", "POST") != "POST":
        raise UsageError("`method` is not POST")
    if not isinstance(url, str):
        raise UsageError("`url` is missing")
    if not isinstance(body, dict):
        raise UsageError("`body` is missing, or not an object")
    if unknown := sorted(value.keys() - _KEYS):
        raise UsageError(f"`{unknown[0]}` is not a field of a batch line")
    return custom_id, url, body


def _digest(url: str, body: dict[str, Any]) -> bytes:
    """The same for the same request, however its JSON was written."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    _check_text(text)
    return hashlib.sha256(text.encode()).digest()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("its text has half of a surrogate pair (`\\ud800`…)") from None
