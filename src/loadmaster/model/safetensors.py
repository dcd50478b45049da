"""safetensors headers: bytes in, the tensors of one shard out. No weight is read here.

The format: a length of eight bytes, so many bytes of JSON, then the data. Names, lengths and
offsets are checked before anything is made of them: entries cover the data without a hole or an
overlap.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from loadmaster.errors import DamagedFileError
from loadmaster.model.damage import damaged, quoted, refused, truncated
from loadmaster.model.lookalikes import LOOK_BYTES
from loadmaster.units import MIB, Bytes

ReadAt = Callable[[int, int], bytes]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * MIB  # the format allows 100 MB; 405B parameters in BF16 need 0.2
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 512
_MAX_ELEMENTS = 1 << 48

# Bits of an element, by the format's own names.
BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_HINT = "get a checkpoint with `.safetensors` files: others can run code while they are read"
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One entry of a header; `shape` is in the format's order, rows first."""

    name: str
    dtype: str  # the format's spelling: `BF16`, `F8_E4M3`
    shape: tuple[int, ...]
    begin: int  # from the start of the data
    end: int

    @property
    def size_bytes(self) -> Bytes:
        return Bytes(self.end - self.begin)

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """The header of one file."""

    label: str
    tensors: tuple[StoredTensor, ...]  # in the order of their data
    header_bytes: int  # the length and the JSON
    metadata: Mapping[str, str] = field(default_factory=dict)


def parse_header(read_at: ReadAt, size_bytes: int, label: str) -> ShardHeader:
    """Read the header of a file of `size_bytes` through `read_at(offset, length)`.

    Raises:
        DamagedFileError: it is another format, cut short, or says what cannot be.
    """
    start = read_at(0, min(LOOK_BYTES, size_bytes))
    _check_format(start, size_bytes, label)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(
            "header_too_large", label, "the header's length", length, f"up to {MAX_HEADER_BYTES}"
        )
    if LENGTH_BYTES + length > size_bytes:
        raise truncated(label, size_bytes, LENGTH_BYTES + length, "the header")
    entries = _entries(read_at(LENGTH_BYTES, length), label)
    metadata = _metadata(entries.pop("__metadata__", {}), label)
    tensors = sorted(
        (_tensor(name, entry, label) for name, entry in entries.items()),
        key=lambda one: (one.begin, one.end),
    )
    _check_layout(tensors, size_bytes - LENGTH_BYTES - length, label)
    return ShardHeader(
        label=label,
        tensors=tuple(tensors),
        header_bytes=LENGTH_BYTES + length,
        metadata=metadata,
    )


def _check_format(start: bytes, size_bytes: int, label: str) -> None:
    """Say what it is where it is no safetensors file."""
    if start.startswith(_PICKLES):
        raise pickled(label)
    if start.startswith(b"GGUF"):
        raise refused(
            "not_safetensors",
            f"{label} is a GGUF file, not a safetensors file",
            hint="give the GGUF file itself as MODEL",
        )
    if start.startswith(b"version https://git-lfs"):
        raise refused(
            "not_safetensors",
            f"{label} is a git-lfs pointer, not the file itself",
            hint="run `git lfs pull`, or download the file",
        )
    if size_bytes < LENGTH_BYTES + 2:
        raise truncated(label, size_bytes, LENGTH_BYTES + 2, "the header")
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise refused(
            "not_safetensors",
            f"{label} is not a safetensors file: it begins with {quoted(start[:16])}",
            hint="download the file again",
        )


def pickled(label: str) -> DamagedFileError:
    """The refusal of weights that would run code while they are read."""
    return refused("pickled_weights", f"{label} holds pickled weights, not safetensors", hint=_HINT)


def _entries(raw: bytes, label: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(
            "bad_header", label, "the header", "no JSON", f"one object ({_short(error)})"
        ) from None
    if not isinstance(value, dict):
        raise damaged("bad_header", label, "the header", type(value).__name__, "an object")
    if len(value) > MAX_TENSORS:
        raise damaged("bad_header", label, "entries", len(value), f"up to {MAX_TENSORS}")
    return value


def _short(error: Exception) -> str:
    return quoted(str(error)).strip("`")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; two entries of one name hide one of them."""
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _metadata(value: object, label: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise damaged("bad_header", label, "__metadata__", type(value).__name__, "strings by name")
    return value


def _tensor(name: str, entry: object, label: str) -> StoredTensor:
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise damaged(
            "bad_header", label, "a tensor's name", quoted(name), "1–512 printable characters"
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _wrong(label, name, "entry", "not as expected", "dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _wrong(label, name, "dtype", quoted(str(dtype)), ", ".join(BITS))
    shape = _sizes(entry["shape"])
    if shape is None or len(shape) > MAX_DIMENSIONS or prod(shape) > _MAX_ELEMENTS:
        raise _wrong(label, name, "shape", quoted(str(entry["shape"])), "up to 8 whole numbers")
    offsets = _sizes(entry["data_offsets"])
    if offsets is None or len(offsets) != 2:
        raise _wrong(label, name, "data_offsets", quoted(str(entry["data_offsets"])), "two numbers")
    tensor = StoredTensor(name=name, dtype=dtype, shape=shape, begin=offsets[0], end=offsets[1])
    if tensor.size_bytes * 8 != prod(shape) * BITS[dtype]:
        raise _wrong(
            label, name, "data", f"{tensor.size_bytes} bytes",
            f"{prod(shape) * BITS[dtype] // 8} for {dtype} of its shape",
        )  # fmt: skip
    return tensor


def _sizes(value: object) -> tuple[int, ...] | None:
    """Whole numbers from 0 on; None for anything else, `true` and `1.0` included."""
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        return None
    return tuple(value)


def _wrong(label: str, name: str, field_name: str, found: object, allowed: str) -> DamagedFileError:
    return damaged("bad_header", label, f"{field_name} of {quoted(name)}", found, allowed)


def _check_layout(tensors: Iterable[StoredTensor], data_bytes: int, label: str) -> None:
    """Every byte of the data belongs to one tensor."""
    at = 0
    for tensor in tensors:
        if tensor.begin != at:
            raise _wrong(label, tensor.name, "start", tensor.begin, f"{at}: no hole, no overlap")
        at = tensor.end
    if at > data_bytes:
        raise truncated(label, data_bytes, at, "the tensors")
    if at < data_bytes:
        raise damaged("tensor_layout", label, "bytes of tensors", at, f"all {data_bytes} of data")
