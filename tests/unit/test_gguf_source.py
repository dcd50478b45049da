"""From a path to a ModelSpec."""

import os
from pathlib import Path

import pytest

from benchmarks import gguf_writer as gw
from benchmarks.gguf_writer import Typed
from benchmarks.shapes import ARCHITECTURES
from loadmaster.errors import DamagedFileError, NotFoundError, UsageError
from loadmaster.model.source import read_model


def test_a_model_as_its_header_describes_it(tmp_path: Path) -> None:
    path = gw.write_random(tmp_path / "m.gguf", *gw.tiny_llama("bpe", type_name="q8_0"))
    spec = read_model(path)
    assert (spec.name, spec.architecture, spec.n_layer) == ("tiny", "llama", 1)
    assert (spec.n_ctx_train, spec.n_embd, spec.n_vocab, spec.n_ff) == (512, 64, 269, 128)
    assert spec.file_bytes == path.stat().st_size
    assert 0 < spec.header_bytes < spec.file_bytes
    assert spec.files[0].inode == path.stat().st_ino
    assert spec.tokenizer_model == "gpt2"
    assert spec.chat_template is not None
    assert spec.chat_template.startswith("{%")
    assert not spec.tied_output
    assert len(spec.layers) == 1


@pytest.mark.parametrize(
    ("file_type", "expected"), [(15, "Q4_K_M"), (7, "Q8_0"), (38, "MXFP4_MOE"), (900, "Q8_0")]
)
def test_quantization_is_the_label_else_the_type_of_most_bytes(
    tmp_path: Path, file_type: int, expected: str
) -> None:
    metadata, tensors = gw.tiny_llama(type_name="q8_0")
    metadata["general.file_type"] = file_type
    path = gw.write_sparse(tmp_path / "m.gguf", metadata, tensors)
    assert read_model(path).quantization == expected


def test_per_layer_numbers_reach_the_layers(tmp_path: Path) -> None:
    metadata, tensors = gw.tiny_llama(n_layer=2)
    metadata["llama.attention.head_count_kv"] = [2, 2]
    spec = read_model(gw.write_sparse(tmp_path / "m.gguf", metadata, tensors))
    assert spec.metadata["llama.attention.head_count_kv"] == (2, 2)
    assert [layer.n_head_kv for layer in spec.layers] == [2, 2]


def test_shards_are_one_model_whichever_is_named(tmp_path: Path) -> None:
    metadata, tensors = gw.tiny_llama()
    paths = gw.write_split(tmp_path, "m", metadata, tensors, 3)
    whole = read_model(gw.write_random(tmp_path / "whole.gguf", metadata, tensors))
    for path in paths:
        spec = read_model(path)
        assert spec.path == paths[0]
        assert [stamp.path for stamp in spec.files] == paths
        assert spec.weight_bytes == whole.weight_bytes
        assert {tensor.shard for tensor in spec.tensors} == {0, 1, 2}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = gw.write_split(tmp_path, "m", *gw.tiny_llama(), 3)
    paths[1].unlink()
    with pytest.raises(DamagedFileError, match="shard 2 of 3 is missing") as caught:
        read_model(paths[0])
    assert paths[1].name in caught.value.message


def test_a_path_that_is_not_there_lists_what_is(tmp_path: Path) -> None:
    gw.write_sparse(tmp_path / "near.gguf", *gw.tiny_llama())
    with pytest.raises(NotFoundError) as caught:
        read_model(tmp_path / "other.gguf")
    assert caught.value.exit_code == 4
    assert caught.value.hint is not None
    assert "near.gguf" in caught.value.hint


def test_a_path_with_a_nul_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        read_model("a\0b.gguf")


def test_an_unreadable_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DamagedFileError, match="Permission denied") as caught:
        read_model(tmp_path / "m.gguf")
    assert caught.value.code == "unreadable"


def test_a_git_lfs_pointer_tells_the_size_of_the_real_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4920739232\n")
    with pytest.raises(DamagedFileError, match=r"git-lfs pointer to a file of 4\.58 GiB"):
        read_model(path)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    metadata, tensors = gw.tiny_llama()
    metadata["general.architecture"] = "evil\x1b[2Jarch" * 20
    path = gw.write_sparse(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(DamagedFileError) as caught:
        read_model(path)
    assert caught.value.code == "unsupported_architecture"
    assert "qwen3moe" in caught.value.message
    assert "\x1b" not in caught.value.message


def test_names_of_files_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\n.gguf"
    path.write_bytes(b"junk")
    with pytest.raises(DamagedFileError) as caught:
        read_model(path)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_K_M", "mxfp4"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_no_valid_architecture_is_refused(tmp_path: Path, name: str, quant: str) -> None:
    metadata, tensors = ARCHITECTURES[name](quant)
    spec = read_model(gw.write_sparse(tmp_path / "m.gguf", metadata, tensors))
    assert spec.architecture == metadata["general.architecture"]
    assert len(spec.tensors) == len(tensors)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"llama.attention.value_length": 32}, "gguf_field_out_of_range"),
        ({"llama.attention.head_count": 2, "llama.rope.dimension_count": 32}, "shape_mismatch"),
        ({"llama.rope.dimension_count": 8}, "gguf_field_out_of_range"),
        ({"llama.attention.scale": float("nan")}, "gguf_field_out_of_range"),
        ({"llama.attention.sliding_window": 9,
          "llama.attention.sliding_window_pattern": [False]}, "gguf_field_out_of_range"),
        ({"split.count": Typed(gw.U32, 2)}, "bad_type"),
    ],
)  # fmt: skip
def test_what_aborts_the_engine_is_refused(
    tmp_path: Path, changes: dict[str, object], code: str
) -> None:
    metadata, tensors = gw.tiny_llama()
    path = gw.write_sparse(tmp_path / "m.gguf", {**metadata, **changes}, tensors)
    with pytest.raises(DamagedFileError) as caught:
        read_model(path)
    assert caught.value.code == code
