"""A GGUF header from metadata and tensors: what a shape's file consists of, beside a hole."""

import struct
from collections.abc import Mapping, Sequence
from math import prod

from loadmaster.model.cursor import F32, I32, STRING, U32, U64
from loadmaster.model.quants import BY_NAME
from loadmaster.model.types import MetadataValue
from loadmaster.units import align

ALIGNMENT = 32
_VERSION = 3
Row = tuple[str, str, tuple[int, ...]]  # name, type, shape


def encode(metadata: Mapping[str, MetadataValue], tensors: Sequence[Row]) -> tuple[bytes, int]:
    """The header, padded to the start of the data, and the size of the whole file."""
    parts = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, type_name, shape in tensors:
        quant = BY_NAME[type_name]
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        parts.append(_string(name) + dims + struct.pack("<iQ", quant.ggml_id, offset))
        offset += align(quant.row_bytes(shape[0]) * prod(shape[1:]), ALIGNMENT)
    raw = b"".join(parts)
    raw = raw.ljust(align(len(raw), ALIGNMENT), b"\0")
    return raw, len(raw) + offset


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: MetadataValue) -> bytes:
    """Plain values alone: shapes have no arrays."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    assert isinstance(value, int)
    assert not isinstance(value, bool)
    if value < 0:
        return struct.pack("<Ii", I32, value)
    return struct.pack("<II", U32, value) if value < 1 << 32 else struct.pack("<IQ", U64, value)
