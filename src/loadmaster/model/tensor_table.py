"""The tensor table of a GGUF header: names, shapes, types, and where the bytes are."""

import struct
from collections.abc import Mapping
from math import prod

from loadmaster.model import quants
from loadmaster.model.cursor import I32, Cursor
from loadmaster.model.damage import damaged, quoted, truncated
from loadmaster.model.types import QuantType, TensorSpec
from loadmaster.units import align

MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_DIMENSION = 1 << 40


def read_tensors(cursor: Cursor, count: int) -> tuple[tuple[TensorSpec, ...], dict[str, int]]:
    tensors: list[TensorSpec] = []
    offsets: dict[str, int] = {}
    for index in range(count):
        at = cursor.offset
        tensor = _tensor(cursor, index)
        if tensor.name in offsets:
            raise damaged(
                "duplicate_tensor", cursor.label, f"tensor {index}", f"{quoted(tensor.name)} again",
                "each name once", offset=at,
            )  # fmt: skip
        offsets[tensor.name] = at
        tensors.append(tensor)
    return tuple(tensors), offsets


def _tensor(cursor: Cursor, index: int) -> TensorSpec:
    at = cursor.offset
    raw = cursor.text(MAX_NAME_BYTES, f"the name of tensor {index}")
    name = raw.decode("utf-8", "replace")
    if not raw or not name.isprintable() or "\ufffd" in name:
        raise damaged(
            "bad_tensor", cursor.label, f"the name of tensor {index}", quoted(raw),
            "1–63 printable characters", offset=at,
        )  # fmt: skip
    shape = _shape(cursor, name)
    quant = _quant(cursor, name)
    if shape[0] % quant.block_size:
        raise damaged(
            "shape_mismatch", cursor.label, f"the row of {quoted(name)}", shape[0],
            f"multiples of {quant.block_size} for {quant.name}", offset=at,
        )  # fmt: skip
    offset = cursor.u64(f"the offset of {name}")
    return TensorSpec(name=name, type=quant, shape=shape, offset_bytes=offset, shard=0)


def _shape(cursor: Cursor, name: str) -> tuple[int, ...]:
    at = cursor.offset
    n_dims = cursor.u32(f"the dimension count of {name}")
    if n_dims > 4:
        raise damaged(
            "bad_tensor", cursor.label, f"the dimension count of {quoted(name)}", n_dims, "0–4",
            offset=at,
        )  # fmt: skip
    shape = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, f"the shape of {name}"))
    if not all(1 <= dim <= MAX_DIMENSION for dim in shape):
        raise damaged(
            "bad_tensor", cursor.label, f"the shape of {quoted(name)}", str(list(shape)),
            "dimensions of 1–2^40", offset=at + 4,
        )  # fmt: skip
    return shape or (1,)


def _quant(cursor: Cursor, name: str) -> QuantType:
    at = cursor.offset
    number = int(cursor.number(I32, f"the type of {name}"))
    quant = quants.BY_ID.get(number)
    if quant is None:
        removed = quants.REMOVED.get(number)
        raise damaged(
            "unsupported_quant", cursor.label, f"the type of {quoted(name)}",
            f"{number} ({removed})" if removed else number,
            f"those of the engine: {', '.join(quants.BY_NAME)}", offset=at,
            hint="get the file in a type of the list, or convert the model again",
        )  # fmt: skip
    return quant


def check_layout(
    tensors: tuple[TensorSpec, ...],
    offsets: Mapping[str, int],
    alignment: int,
    data_offset: int,
    cursor: Cursor,
) -> None:
    """Tensors follow each other, padded, and end inside the file (gguf.cpp, llama_file)."""
    expected = end = 0
    for tensor in tensors:
        if tensor.offset_bytes != expected:
            raise damaged(
                "tensor_layout", cursor.label, f"the offset of {quoted(tensor.name)}",
                tensor.offset_bytes, f"{expected}, where the tensor before it ends",
                offset=offsets[tensor.name],
            )  # fmt: skip
        end = expected + prod(tensor.shape) // tensor.type.block_size * tensor.type.block_bytes
        expected = align(end, alignment)
    if tensors and data_offset + end > cursor.size:
        raise truncated(cursor.label, cursor.size, data_offset + end, "the tensors")
