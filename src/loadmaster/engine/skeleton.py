"""A model's header as a file of its own, for dry runs: no weights, no vocabulary.

The engine reads nothing but the header to size a model, yet it parses 128,000 tokens and merges
each time. The skeleton says `no_vocab` and the number of tokens instead; it is sparse, of the full
size, and takes a few hundred kB of disk. The shards of a split model become one.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadmaster.errors import DamagedFileError
from loadmaster.model.types import ModelSpec
from loadmaster.units import align

_MAGIC = b"GGUF"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_DEFAULT_ALIGNMENT = 32
_DROPPED = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "split.no", "split.count",
            "split.tensors.count", "tokenizer.chat_template")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One metadata pair, raw: its key and the bytes of the whole pair."""

    key: str
    raw: bytes
    is_array: bool


class _Cursor:
    """A place in a header that lies in memory; `header` has passed the header reader's checks."""

    def __init__(self, header: mmap.mmap) -> None:
        self._header = header
        self.at = 0

    def u32(self) -> int:
        self.at += 4
        return int(_U32.unpack_from(self._header, self.at - 4)[0])

    def u64(self) -> int:
        self.at += 8
        return int(_U64.unpack_from(self._header, self.at - 8)[0])

    def skip_strings(self, n: int) -> None:
        """A vocabulary has hundreds of thousands: the loop is as short as Python allows."""
        header, at, unpack = self._header, self.at, _U64.unpack_from
        for _ in range(n):
            at += 8 + unpack(header, at)[0]
        self.at = at

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip_strings(1)
        elif kind == _ARRAY:
            self._skip_array(self.u32(), self.u64())
        else:
            self.at += _WIDTHS[kind]

    def _skip_array(self, kind: int, n: int) -> None:
        if kind in _WIDTHS:
            self.at += _WIDTHS[kind] * n
        elif kind == _STRING:
            self.skip_strings(n)
        else:
            for _ in range(n):
                self.skip_value(kind)

    def since(self, start: int) -> bytes:
        return self._header[start : self.at]


def write_skeleton(model: ModelSpec, path: Path, *, keep_tokenizer: bool = False) -> None:
    """Write the skeleton of a model that has been read and checked already.

    `keep_tokenizer` copies the vocabulary, for architectures that size something by it.
    """
    entries: list[_Entry] = []
    rows: list[bytes] = []
    for number, stamp in enumerate(model.files):
        shard_entries, shard_rows = _read(stamp.path)
        rows += shard_rows
        if number == 0:
            entries = shard_entries
    kept = list(_kept(entries, model, keep_tokenizer))
    header = struct.pack("<4sIQQ", _MAGIC, 3, len(rows), len(kept)) + b"".join(kept)
    _write(path, header, rows, model, _alignment(entries))


def _read(path: Path) -> tuple[list[_Entry], list[bytes]]:
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as header,
        ):
            cursor = _Cursor(header)
            cursor.at = 8  # magic and version
            n_tensors, n_entries = cursor.u64(), cursor.u64()
            entries = [_read_entry(cursor) for _ in range(n_entries)]
            return entries, [_read_row(cursor) for _ in range(n_tensors)]
    except (struct.error, ValueError, KeyError) as error:
        raise DamagedFileError(
            f"`{path.name}` has another header than when it was read: {error}", code="changed"
        ) from None


def _read_entry(cursor: _Cursor) -> _Entry:
    start = cursor.at
    cursor.skip_strings(1)
    key = cursor.since(start + 8).decode("utf-8", "replace")
    kind = cursor.u32()
    cursor.skip_value(kind)
    return _Entry(key=key, raw=cursor.since(start), is_array=kind == _ARRAY)


def _read_row(cursor: _Cursor) -> bytes:
    """A tensor's name, shape and type; its offset is written anew."""
    start = cursor.at
    cursor.skip_strings(1)
    n_dims = cursor.u32()
    cursor.at += 8 * n_dims + 4  # the shape, the type
    row = cursor.since(start)
    cursor.u64()
    return row


def _kept(entries: list[_Entry], model: ModelSpec, keep_tokenizer: bool) -> Iterator[bytes]:
    vocab_size = f"{model.architecture}.vocab_size"
    for entry in entries:
        if keep_tokenizer:
            if not entry.key.startswith("split."):
                yield entry.raw
        elif not _is_dropped(entry, vocab_size):
            yield entry.raw
    if not keep_tokenizer:
        yield _string("tokenizer.ggml.model") + struct.pack("<I", _STRING) + _string("no_vocab")
        yield _string(vocab_size) + struct.pack("<II", _UINT32, model.n_vocab)


def _is_dropped(entry: _Entry, vocab_size: str) -> bool:
    vocabulary = entry.is_array and entry.key.startswith("tokenizer.")
    return vocabulary or entry.key in _DROPPED or entry.key == vocab_size


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _alignment(entries: list[_Entry]) -> int:
    for entry in entries:
        if entry.key == "general.alignment":
            return int.from_bytes(entry.raw[-4:], "little")
    return _DEFAULT_ALIGNMENT


def _write(path: Path, header: bytes, rows: list[bytes], model: ModelSpec, alignment: int) -> None:
    """Tensors follow each other in the order of the table, as in the shards together."""
    table, offset = [], 0
    for row, tensor in zip(rows, model.tensors, strict=True):
        table.append(row + struct.pack("<Q", offset))
        offset += align(tensor.size_bytes, alignment)
    body = header + b"".join(table)
    with path.open("wb") as file:
        file.write(body)
        file.truncate(align(len(body), alignment) + offset)
