"""GGUF headers: bytes in, a `Header` out. No file is opened and nothing is mapped here.

The format is the one that ggml's gguf.cpp reads (versions 2 and 3, little endian); the limits are
narrower, so that a hostile header costs at most a second and some tens of MiB. What the values
mean is judged in `checks`.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from loadmaster.model.cursor import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    NUMBERS,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Cursor,
    ReadAt,
)  # fmt: skip
from loadmaster.model.damage import damaged, quoted, refused, truncated
from loadmaster.model.tensor_table import check_layout, read_tensors
from loadmaster.model.types import MetadataValue, TensorSpec
from loadmaster.model.vocabulary import Tokens, judge_tokens
from loadmaster.units import KIB, MIB, align

_LETTER = {kind: number.format[-1] for kind, number in NUMBERS.items()}
TYPE_NAMES = {
    U8: "u8", I8: "i8", U16: "u16", I16: "i16", U32: "u32", I32: "i32", F32: "f32",
    BOOL: "bool", STRING: "string", ARRAY: "array", U64: "u64", I64: "i64", F64: "f64",
}  # fmt: skip

# Limits. The largest headers in use have about 60 keys, 3,000 tensors, 262,144 tokens, 515,000
# merges and 25 MiB; these are a few times that.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 15
MAX_KEY_BYTES = 512
MAX_STRING_BYTES = 16 * MIB
MAX_ARRAY_ELEMENTS = 16 * MIB
MAX_TOKENS = 1 << 19  # as a set about 48 MiB
MAX_STRINGS = 1 << 20  # in all arrays of a file: reading them takes about half a second
MAX_ALIGNMENT = 1 << 16

KEPT_ARRAY_ELEMENTS = 4096  # longer arrays are tables of the tokenizer, judged and dropped
KEPT_STRING_BYTES = 64 * KIB
KEPT_BYTES = 12 * MIB  # of all keys and values that are kept, as Python objects
MAX_TEMPLATE_BYTES = 256 * KIB
TEMPLATE = "tokenizer.chat_template"
TOKENS = "tokenizer.ggml.tokens"
MERGES = "tokenizer.ggml.merges"
_SMALLEST_KEY_BYTES = 8 + 1 + 4 + 1  # a name of one byte, a u8
_SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # a name of one byte, no dimension
# Tables that are read as numbers although they are long.
_NUMBER_TABLES = frozenset({"tokenizer.ggml.scores", "tokenizer.ggml.token_type"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a key's value is and what it is made of; `count` is 1 for a scalar."""

    type: int  # of the elements, when `is_array`
    is_array: bool
    count: int
    offset: int

    @property
    def type_name(self) -> str:
        name = TYPE_NAMES[self.type]
        return f"array of {name}" if self.is_array else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One file's header. `metadata` has its scalars and its short arrays of numbers."""

    label: str  # the file's name, for messages
    version: int
    metadata: Mapping[str, MetadataValue]
    entries: Mapping[str, Entry]
    tables: Mapping[str, bytes]  # scores and token types, as little-endian bytes
    tokens: Tokens | None
    n_bad_merges: int  # merges that are not two words
    tensors: tuple[TensorSpec, ...]
    tensor_offsets: Mapping[str, int]  # where each tensor's entry begins in the header
    alignment: int
    data_offset: int
    bytes_read: int


def parse_header(read_at: ReadAt, size: int, label: str) -> Header:
    """Read one file's header. The magic is taken as checked (see `lookalikes`).

    Raises:
        DamagedFileError: a field is malformed, or the file ends before its tensors do.
    """
    cursor = Cursor(read_at, size, label)
    cursor.skip(4, "the magic")
    version = _version(cursor)
    n_tensors = _count(cursor, "tensor count", MAX_TENSORS, _SMALLEST_TENSOR_BYTES)
    n_keys = _count(cursor, "key count", MAX_KEYS, _SMALLEST_KEY_BYTES)
    values = _Values(cursor)
    for index in range(n_keys):
        values.read_one(index)
    alignment = _alignment(values, label)
    tensors, offsets = read_tensors(cursor, n_tensors)
    data_offset = align(cursor.offset, alignment)
    check_layout(tensors, offsets, alignment, data_offset, cursor)
    return Header(
        label=label,
        version=version,
        metadata=values.metadata,
        entries=values.entries,
        tables=values.tables,
        tokens=values.tokens,
        n_bad_merges=values.n_bad_merges,
        tensors=tensors,
        tensor_offsets=offsets,
        alignment=alignment,
        data_offset=data_offset,
        bytes_read=cursor.bytes_read,
    )


def _version(cursor: Cursor) -> int:
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        raise refused(
            "wrong_endian",
            f"{cursor.label} is a big-endian GGUF (version {swapped}); this engine reads "
            "little-endian files",
            hint="get the little-endian file, or convert it with gguf-py's `gguf-convert-endian`",
            version=swapped,
        )
    hint = (
        "version 1 was replaced in 2023: convert the model again"
        if version == 1
        else "a newer engine may read it; `loadmaster engine list` shows yours"
    )
    raise refused(
        "unsupported_version",
        f"{cursor.label} is GGUF version {version}, supported are 2 and 3",
        hint=hint,
        version=version,
    )


def _count(cursor: Cursor, what: str, limit: int, smallest: int) -> int:
    at = cursor.offset
    value = cursor.u64(f"the {what}")
    if value > limit:
        raise damaged("length_out_of_bounds", cursor.label, what, value, f"0–{limit}", offset=at)
    if value * smallest > cursor.left:
        raise truncated(cursor.label, cursor.size, cursor.offset + value * smallest, "the header")
    return value


class _Values:
    """The key-value section as it is read; what is kept is bounded by KEPT_BYTES."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._kept = 0
        self._n_strings = 0
        self.metadata: dict[str, MetadataValue] = {}
        self.entries: dict[str, Entry] = {}
        self.tables: dict[str, bytes] = {}
        self.tokens: Tokens | None = None
        self.n_bad_merges = 0

    def read_one(self, index: int) -> None:
        cursor = self._cursor
        key = self._key(index)
        at = cursor.offset
        kind = cursor.u32(f"the type of {key}")
        is_array = kind == ARRAY
        if is_array:
            kind = cursor.u32(f"the element type of {key}")
        if kind not in TYPE_NAMES or kind == ARRAY:
            raise damaged(
                "bad_type", cursor.label, f"the type of {key}",
                "array of arrays" if kind == ARRAY else kind, "0–12, no nested arrays", offset=at,
            )  # fmt: skip
        count = self._array_length(key, kind) if is_array else 1
        self.entries[key] = Entry(type=kind, is_array=is_array, count=count, offset=cursor.offset)
        if is_array:
            self._array(key, kind, count)
        else:
            self._scalar(key, kind)

    def _key(self, index: int) -> str:
        cursor = self._cursor
        at = cursor.offset
        raw = cursor.text(MAX_KEY_BYTES, f"key {index}")
        key = raw.decode("utf-8", "replace")
        if not raw or not key.isprintable() or "\ufffd" in key:
            raise damaged(
                "bad_key", cursor.label, f"key {index}", quoted(raw), "1–512 printable characters",
                offset=at,
            )  # fmt: skip
        if key in self.entries:
            raise damaged(
                "duplicate_key", cursor.label, f"key {index}", f"{quoted(raw)} again", "each once",
                offset=at,
            )  # fmt: skip
        self._keep(200 + len(raw), key)
        return key

    def _keep(self, n_bytes: int, key: str) -> None:
        self._kept += n_bytes
        if self._kept > KEPT_BYTES:
            raise damaged(
                "length_out_of_bounds", self._cursor.label, f"the metadata up to {quoted(key)}",
                f"over {self._kept} bytes", f"up to {KEPT_BYTES}", offset=self._cursor.offset,
            )  # fmt: skip

    def _array_length(self, key: str, kind: int) -> int:
        limit = MAX_TOKENS if key == TOKENS else MAX_ARRAY_ELEMENTS
        if kind == STRING:
            limit = min(limit, MAX_STRINGS - self._n_strings)
        return self._cursor.length(limit, key)

    def _scalar(self, key: str, kind: int) -> None:
        cursor = self._cursor
        if kind == STRING:
            self._string(key)
            return
        at = cursor.offset
        value = cursor.number(kind, key)
        if kind == BOOL and value not in (0, 1):
            raise damaged("bad_type", cursor.label, key, value, "0 or 1 for a bool", offset=at)
        self.metadata[key] = bool(value) if kind == BOOL else value

    def _string(self, key: str) -> None:
        cursor = self._cursor
        at = cursor.offset
        length = cursor.length(MAX_STRING_BYTES, key)
        is_template = key.startswith(TEMPLATE)
        if is_template and length > MAX_TEMPLATE_BYTES:
            raise damaged(
                "bad_template", cursor.label, key, f"{length} bytes",
                f"up to {MAX_TEMPLATE_BYTES}", offset=at,
            )  # fmt: skip
        if length > KEPT_STRING_BYTES and not is_template:
            cursor.skip(length, key)  # a licence's text, an imatrix's file list: not needed
            return
        self._keep(length, key)
        raw = cursor.take(length, key)
        try:
            self.metadata[key] = raw.decode("utf-8", "strict" if is_template else "replace")
        except UnicodeDecodeError as error:
            raise damaged(
                "bad_template", cursor.label, key, f"not UTF-8 at its byte {error.start}",
                "UTF-8 text", offset=at,
            ) from None  # fmt: skip

    def _array(self, key: str, kind: int, count: int) -> None:
        cursor = self._cursor
        if kind == STRING:
            self._n_strings += count
            self._strings(key, count)
            return
        n_bytes = count * NUMBERS[kind].size
        if key in _NUMBER_TABLES and count <= MAX_TOKENS:
            self.tables[key] = cursor.take(n_bytes, key)
        elif count > KEPT_ARRAY_ELEMENTS:
            cursor.skip(n_bytes, key)
        else:
            self._keep(40 * count, key)
            raw = cursor.take(n_bytes, key)
            numbers = struct.unpack(f"<{count}{_LETTER[kind]}", raw)
            self.metadata[key] = tuple(map(bool, numbers)) if kind == BOOL else numbers

    def _strings(self, key: str, count: int) -> None:
        cursor = self._cursor
        offset = cursor.offset
        batches = cursor.strings(count, key)
        if key == TOKENS:
            self.tokens = judge_tokens(batches, label=cursor.label, offset=offset)
        elif key == MERGES:
            # llama.cpp splits at the first space that is not the first character.
            self.n_bad_merges = sum(
                sum(merge.find(b" ", 1) < 0 for merge in batch) for batch in batches
            )
        else:
            for _ in batches:
                pass


def _alignment(values: _Values, label: str) -> int:
    key = "general.alignment"
    entry = values.entries.get(key)
    if entry is None:
        return 32  # GGUF_DEFAULT_ALIGNMENT
    value = values.metadata.get(key)
    if (
        entry.type != U32
        or not isinstance(value, int)
        or not 8 <= value <= MAX_ALIGNMENT
        or value & (value - 1)
    ):
        found = value if entry.type == U32 and not entry.is_array else entry.type_name
        raise damaged(
            "gguf_field_out_of_range", label, key, found, "a u32, power of two, 8–65536",
            offset=entry.offset,
        )  # fmt: skip
    return value
