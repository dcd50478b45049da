"""safetensors headers: what is accepted, and how each kind of damage is named."""

import json
import struct
from typing import Any

import pytest

from loadmaster.errors import DamagedFileError
from loadmaster.model.safetensors import ShardHeader, parse_header
from tests.checkpoint_parts import header_bytes

ROW = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}


def parse(raw: bytes, size: int | None = None) -> ShardHeader:
    return parse_header(lambda at, n: raw[at : at + n], len(raw) if size is None else size, "m")


def shard(document: Any, data: int = 12) -> bytes:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def refusal(raw: bytes, size: int | None = None) -> DamagedFileError:
    with pytest.raises(DamagedFileError) as caught:
        parse(raw, size)
    assert caught.value.hint
    assert caught.value.message.isprintable()
    return caught.value


def test_tensors_in_the_order_of_their_data() -> None:
    raw, size = header_bytes({"b": ("F32", (2, 2)), "a": ("I8", (5,)), "c": ("F16", ())})
    header = parse(raw, len(raw) + size)
    assert [tensor.name for tensor in header.tensors] == ["b", "a", "c"]
    assert [tensor.size_bytes for tensor in header.tensors] == [16, 5, 2]
    assert header.tensors[2].n_elements == 1
    assert header.header_bytes == len(raw)


def test_metadata_are_strings() -> None:
    header = parse(shard({"__metadata__": {"format": "pt"}, "a": ROW}))
    assert header.metadata == {"format": "pt"}
    assert refusal(shard({"__metadata__": {"n": 1}, "a": ROW})).code == "bad_header"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F7"}, "dtype"),
        ({"dtype": 3}, "dtype"),
        ({"shape": [2, -3]}, "shape"),
        ({"shape": [2, 3.0]}, "shape"),
        ({"shape": [True, 6]}, "shape"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": [1 << 40, 1 << 40]}, "shape"),
        ({"shape": [2, 4]}, "data"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [0, 13]}, "data"),
        ({"data_offsets": [1, 13]}, "start"),
        ({"extra": 1}, "entry"),
    ],
)
def test_a_wrong_entry_is_named(change: dict[str, Any], said: str) -> None:
    error = refusal(shard({"a": ROW | change}))
    assert error.code == "bad_header"
    assert str(error.numbers["field"]).startswith(said)


def test_holes_and_overlaps_are_refused() -> None:
    second = {"dtype": "I8", "shape": [2], "data_offsets": [11, 13]}
    assert "overlap" in refusal(shard({"a": ROW, "b": second})).message
    hole = {"dtype": "I8", "shape": [2], "data_offsets": [14, 16]}
    assert refusal(shard({"a": ROW, "b": hole}, data=16)).code == "bad_header"
    assert refusal(shard({"a": ROW}, data=13)).code == "tensor_layout"
    assert refusal(shard({"a": ROW}, data=11)).code == "truncated"


def test_a_name_that_is_there_twice_hides_nothing() -> None:
    row = json.dumps(ROW)
    assert refusal(shard(f'{{"a":{row},"a":{row}}}'.encode())).code == "bad_header"


@pytest.mark.parametrize("name", ["", "x" * 513, "a\nb"])
def test_names_are_plain(name: str) -> None:
    assert refusal(shard({name: ROW})).code == "bad_header"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04" + bytes(20), "pickled_weights"),
        (b"\x80\x02" + bytes(20), "pickled_weights"),
        (b"GGUF" + bytes(20), "not_safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not_safetensors"),
        (struct.pack("<Q", 4) + b"[[[]", "not_safetensors"),
        (struct.pack("<Q", 40) + b'{"a":', "truncated"),
        (struct.pack("<Q", 1 << 60) + b"{" + bytes(20), "header_too_large"),
        (shard(b'{"a":' + b"[" * 100_000, 0), "bad_header"),
        (shard(b'{"a":\xff}', 0), "bad_header"),
    ],
)
def test_what_is_no_shard_is_named(raw: bytes, code: str) -> None:
    assert refusal(raw).code == code
