"""An upload as `multipart/form-data`: small fields into memory, the file's bytes to the disk."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loadmaster.errors import UsageError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILE_FIELD = "file"
_FIELD_BYTES = 4 << 10  # of all fields beside the file, their names included
_MOST_PARTS = 16
_PIECE_BYTES = 1 << 20  # of the file, for one write


class _BadFormError(UsageError):
    """A body that is no form as it was announced."""

    code = "bad_form"


@dataclass(slots=True, kw_only=True)
class Form:
    """The fields of a form, and what its file is called; its bytes are elsewhere."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None  # None: there was no file


def boundary_of(request: Request) -> bytes:
    """What stands between the parts.

    Raises:
        UsageError: the body is no form.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise _BadFormError(
            "the body is not multipart/form-data",
            hint="send the fields `purpose` and `file`, as `curl -F` does",
        )
    return boundary


async def read_form(request: Request, write: Callable[[bytes], None]) -> Form:
    """Read a form; `write` gets the file's bytes, in pieces, on another thread.

    Raises:
        UsageError: it is malformed, or its fields are too large.
    """
    parts = _Parts()
    parser = MultipartParser(boundary_of(request), parts.callbacks)
    try:
        async for chunk in request.stream():
            parser.write(chunk)
            if len(parts.pending) >= _PIECE_BYTES:
                await _hand_over(parts, write)
        parser.finalize()
    except MultipartParseError:
        raise _BadFormError("the form is malformed, or its end is missing") from None
    if not parts.complete:
        raise _BadFormError("the form's end is missing")
    await _hand_over(parts, write)
    return parts.form


async def _hand_over(parts: "_Parts", write: Callable[[bytes], None]) -> None:
    data = bytes(parts.pending)
    parts.pending.clear()
    if data:
        await asyncio.to_thread(write, data)


class _Parts:
    """What the parser tells, part by part."""

    def __init__(self) -> None:
        self.form = Form()
        self.pending = bytearray()  # of the file, not written yet
        self.complete = False
        self._n_parts = 0
        self._field_bytes = 0
        self._header = (bytearray(), bytearray())
        self._name: str | None = None  # of the part; None before its headers
        self._value: bytearray | None = None  # of a field; None in the file
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._n_parts += 1
        if self._n_parts > _MOST_PARTS:
            raise _BadFormError(f"the form has more than {_MOST_PARTS} parts")
        self._name, self._value, self._header = None, bytearray(), (bytearray(), bytearray())

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        name, value = map(bytes, self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._name = _text(options.get(b"name", b""))
        if self._name == FILE_FIELD:
            if self.form.filename is not None:
                raise _BadFormError("the form has more than one file")
            self.form.filename = _text(options.get(b"filename", b"")) or "upload.jsonl"
            self._value = None

    def _headers_finished(self) -> None:
        if not self._name:
            raise _BadFormError("a part of the form has no name")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self.pending.extend(memoryview(data)[start:end])
            return
        self._count(end - start)
        self._value.extend(data[start:end])

    def _end(self) -> None:
        if self._value is not None and self._name:
            self._count(len(self._name))
            self.form.fields[self._name] = _text(bytes(self._value))

    def _count(self, n_bytes: int) -> None:
        self._field_bytes += n_bytes
        if self._field_bytes > _FIELD_BYTES:
            raise _BadFormError(f"the form's fields have more than {_FIELD_BYTES} bytes")

    def _finish(self) -> None:
        self.complete = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _BadFormError("a name or a field of the form is not UTF-8") from None
