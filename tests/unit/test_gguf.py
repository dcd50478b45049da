"""The header reader: what it reads, how much of the file it touches, what it never keeps."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from gguf import constants
from gguf import quants as official

from benchmarks import gguf_writer as gw
from benchmarks.gguf_writer import Typed
from loadmaster.errors import DamagedFileError
from loadmaster.model import gguf, quants
from loadmaster.model.damage import quoted
from loadmaster.model.gguf import parse_header


def _reader(raw: bytes, reads: list[tuple[int, int]] | None = None) -> Callable[[int, int], bytes]:
    def read_at(offset: int, length: int) -> bytes:
        if reads is not None:
            reads.append((offset, length))
        return raw[offset : offset + length]

    return read_at


def _parse(raw: bytes) -> gguf.Header:
    return parse_header(_reader(raw), len(raw), "model.gguf")


def test_reads_back_every_type_of_value() -> None:
    metadata = {
        "general.architecture": "llama",
        "x.u8": Typed(gw.U8, 200),
        "x.i64": Typed(gw.I64, -(1 << 40)),
        "x.f64": Typed(gw.F64, 0.1),
        "x.flag": True,
        "x.per_layer": [1, 2, 3],
        "x.flags": [True, False],
        "x.empty": Typed(gw.U32, []),
    }
    header = _parse(gw.header(metadata, []))
    assert header.metadata == {
        "general.architecture": "llama",
        "x.u8": 200,
        "x.i64": -(1 << 40),
        "x.f64": 0.1,
        "x.flag": True,
        "x.per_layer": (1, 2, 3),
        "x.flags": (True, False),
        "x.empty": (),
    }
    assert header.entries["x.per_layer"].type_name == "array of u32"


def test_tensors_have_their_types_shapes_and_sizes() -> None:
    metadata, tensors = gw.tiny_llama(type_name="q4_0")
    raw = gw.header(metadata, tensors)
    header = _parse(raw + bytes(sum(-(-one.size_bytes // 32) * 32 for one in tensors)))
    assert [(one.name, one.type.name, one.shape) for one in header.tensors] == tensors
    assert [one.size_bytes for one in header.tensors] == [one.size_bytes for one in tensors]
    assert header.data_offset == len(raw)
    assert header.tensors[0].offset_bytes == 0


def test_a_long_vocabulary_is_judged_and_not_kept() -> None:
    metadata, _ = gw.tiny_llama("bpe", n_vocab=30_000)
    header = _parse(gw.header(metadata, []))
    assert header.tokens is not None
    assert header.tokens.count == 30_000
    assert header.n_bad_merges == 0
    assert not any(key.startswith("tokenizer.ggml.tokens") for key in header.metadata)


def test_a_small_header_is_one_small_read_and_tensor_data_is_never_read() -> None:
    metadata, tensors = gw.tiny_llama()
    raw = gw.header(metadata, tensors)
    size = len(raw) + (1 << 40)
    reads: list[tuple[int, int]] = []
    header = parse_header(_reader(raw.ljust(1 << 20, b"\0"), reads), size, "model.gguf")
    assert reads == [(4, 64 * 1024)]
    assert header.bytes_read == 64 * 1024


def test_long_arrays_that_nobody_needs_are_stepped_over() -> None:
    numbers = [7] * 2_000_000
    raw = gw.header({"x.table": Typed(gw.U32, numbers), "x.after": 5}, [])
    reads: list[tuple[int, int]] = []
    header = parse_header(_reader(raw, reads), len(raw), "model.gguf")
    assert header.metadata == {"x.after": 5}
    assert sum(length for _, length in reads) < 1 << 20


def test_strings_across_window_borders() -> None:
    words = [f"{i}-" + "w" * (i % 997) for i in range(4000)]
    metadata = {"tokenizer.ggml.tokens": words, "x.after": "still in step"}
    header = _parse(gw.header(metadata, []))
    assert header.metadata["x.after"] == "still in step"
    assert header.tokens is not None
    assert header.tokens.count == 4000


def test_version_2_reads_like_version_3() -> None:
    metadata, _ = gw.tiny_llama()
    assert (
        _parse(gw.header(metadata, [], version=2)).metadata
        == _parse(gw.header(metadata, [])).metadata
    )


def test_big_endian_is_named() -> None:
    with pytest.raises(DamagedFileError, match="big-endian") as caught:
        _parse(gw.header(*gw.tiny_llama(), order=">"))
    assert caught.value.code == "wrong_endian"


def test_a_refusal_says_field_found_allowed_and_where() -> None:
    raw = gw.header({"general.architecture": "llama", "general.alignment": 48}, [])
    with pytest.raises(DamagedFileError) as caught:
        _parse(raw)
    error = caught.value
    assert error.code == "gguf_field_out_of_range"
    assert error.numbers["field"] == "general.alignment"
    assert error.numbers["found"] == 48
    offset = error.numbers["offset"]
    assert isinstance(offset, int)
    assert raw[offset : offset + 4] == struct.pack("<I", 48)
    assert f"byte {offset:#06x} of model.gguf" in error.message
    assert error.hint is not None


def test_a_truncated_file_tells_both_numbers() -> None:
    metadata, tensors = gw.tiny_llama()
    raw = gw.header(metadata, tensors)
    need = len(raw) + sum(one.size_bytes for one in tensors)
    with pytest.raises(DamagedFileError) as caught:
        _parse(raw + bytes(need - 1 - len(raw)))
    assert caught.value.code == "truncated"
    assert caught.value.numbers["have"] == need - 1
    assert caught.value.numbers["need"] == need


def test_the_last_tensor_needs_no_padding() -> None:
    tensors = [("a.weight", "f32", (3,))]
    raw = gw.header({"x": 1}, tensors)
    assert len(_parse(raw + bytes(12)).tensors) == 1


def test_a_file_that_shrinks_while_read_is_truncated() -> None:
    metadata, _ = gw.tiny_llama("bpe", n_vocab=20_000)
    raw = gw.header(metadata, [])
    with pytest.raises(DamagedFileError) as caught:
        parse_header(_reader(raw[: len(raw) // 2]), len(raw), "model.gguf")
    assert caught.value.code == "truncated"


def test_quoting_is_short_and_harmless() -> None:
    assert quoted(b"\x1b[31mred\n") == "`\\x1b[31mred\\n`"
    assert len(quoted(b"x" * 1000).encode()) <= 64 + 5
    assert len(quoted(b"\x01" * 64).encode()) <= 64 + 2


def test_the_type_table_agrees_with_gguf_py() -> None:
    for kind, (block_size, block_bytes) in constants.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":  # gguf-py counts its two halves as floats; ggml-common.h has 36
            continue
        ours = quants.BY_ID[int(kind)]
        assert (ours.name.lower(), ours.block_size, ours.block_bytes) == (
            kind.name.lower(),
            block_size,
            block_bytes,
        )


def test_random_weights_are_finite_and_small(tmp_path: Path) -> None:
    """The official dequantizer reads what the writer makes of every type it knows."""
    rng = numpy.random.default_rng(0)
    for name in ("q4_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq2_xxs",
                 "iq3_s", "iq1_m", "iq4_xs", "tq1_0", "mxfp4", "f16", "bf16"):  # fmt: skip
        quant = quants.BY_NAME[name]
        raw = numpy.frombuffer(gw.random_blocks(name, 64, rng), numpy.uint8)
        kind = constants.GGMLQuantizationType(quant.ggml_id)
        values = official.dequantize(raw.reshape(1, -1), kind)
        assert numpy.isfinite(values).all(), name
        assert 1e-4 < values.std() < 1, name
