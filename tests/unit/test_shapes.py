"""Shapes: sizes as published, what the engine's rules give, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model.quants import BY_NAME
from loadmaster.model.remote import is_skeleton
from loadmaster.model.shapes.families import outline_of
from loadmaster.model.shapes.library import (
    ShapeReference,
    compared_quantizations,
    decode_shape,
    load_shape,
    parse_shape,
    quantizations_of,
    shape_header,
    shape_model,
    shape_names,
)
from loadmaster.model.shapes.mixes import typed
from loadmaster.tasks.locating import locate, locate_header
from loadmaster.units import GIB

# GiB. Llama 3: llama.cpp tools/perplexity/README.md (8B) and dranger003 in llama.cpp#6745 (70B);
# the rest as llama-bench prints them in llama.cpp's issues and pull requests.
PUBLISHED: dict[str, dict[str, float]] = {
    "llama-3-8b": {
        "F16": 14.97, "Q8_0": 7.96, "Q6_K": 6.14, "Q5_K_M": 5.33, "Q5_K_S": 5.21, "Q4_K_M": 4.58,
        "Q4_K_S": 4.37, "IQ4_NL": 4.35, "IQ4_XS": 4.14, "Q4_0": 4.34, "Q3_K_L": 4.03,
        "Q3_K_M": 3.74, "IQ3_M": 3.53, "IQ3_S": 3.42, "IQ3_XS": 3.28, "IQ3_XXS": 3.05,
        "Q3_K_S": 3.41, "IQ2_M": 2.74, "Q2_K": 2.96, "IQ2_S": 2.56, "IQ2_XS": 2.43,
        "IQ2_XXS": 2.24, "IQ1_M": 2.01, "IQ1_S": 1.88,
    },
    "llama-3-70b": {
        "F16": 131.43, "Q8_0": 69.83, "Q6_K": 53.91, "Q5_K_M": 46.52, "Q5_K_S": 45.32,
        "Q4_K_M": 39.60, "Q4_K_S": 37.58, "IQ4_NL": 37.30, "IQ4_XS": 35.30, "Q3_K_L": 34.59,
        "Q3_K_M": 31.91, "IQ3_M": 29.74, "IQ3_S": 28.79, "Q3_K_S": 28.79, "IQ3_XS": 27.29,
        "IQ3_XXS": 25.58, "Q2_K": 24.56, "IQ2_M": 22.46, "IQ2_S": 20.71, "IQ2_XS": 19.69,
        "IQ2_XXS": 17.79, "IQ1_M": 15.60, "IQ1_S": 14.29,
    },
    "llama-2-70b": {"Q4_K_M": 38.54, "Q5_K_M": 45.41, "Q6_K": 52.70},
    "llama-3.1-405b": {"Q4_K_M": 226.37},
    "llama-3.2-3b": {"Q4_K_M": 1.87},
    "qwen2.5-14b": {"Q4_K_M": 8.37},
    "qwen2.5-32b": {"Q4_K_M": 18.48},
    "qwen3-8b": {"Q4_K_M": 4.68},
    "qwen3-32b": {"Q4_K_M": 18.40},
    "qwen3-30b-a3b": {"Q4_K_M": 17.28, "Q8_0": 30.25},
    "qwen3-235b-a22b": {"Q4_K_M": 132.39},
    "gemma-3-12b": {"Q4_K_M": 6.79},
    "gemma-3-27b": {"Q4_K_M": 15.40},
    "gpt-oss-20b": {"MXFP4": 11.27},
    "gpt-oss-120b": {"MXFP4": 59.02},
    "deepseek-v2-lite": {"Q4_K_M": 9.65},
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones_within_one_percent(name: str) -> None:
    shape = load_shape(name)
    for label, gib in PUBLISHED[name].items():
        size = shape_header(shape, label)[1] / GIB
        assert size == pytest.approx(gib, rel=0.01), label


@pytest.mark.parametrize("name", shape_names())
def test_every_shape_is_a_model_the_reader_accepts(name: str) -> None:
    shape = load_shape(name)
    spec = shape_model(ShapeReference(name=name))
    assert (spec.name, spec.architecture) == (name, shape.architecture)
    assert spec.n_layer == shape.dims.n_layer
    assert spec.n_vocab == shape.dims.n_vocab
    assert spec.quantization.removesuffix("_MOE") in quantizations_of(shape)
    assert spec.kv_formula
    assert spec.file_bytes == spec.path.stat().st_size


def types_of(name: str, mix: str) -> dict[str, str]:
    shape = load_shape(name)
    pairs = typed(outline_of(shape).tensors, shape.dims, shape.architecture, mix)
    return {tensor.name: type_name for tensor, type_name in pairs}


def test_q4_k_m_of_the_70b_is_mixed_as_the_engine_mixes_it() -> None:
    types = types_of("llama-3-70b", "Q4_K_M")
    assert types["output.weight"] == "q6_K"
    assert types["token_embd.weight"] == "q4_K"
    assert types["blk.0.attn_norm.weight"] == "f32"
    # 70B: attn_v is small, so what would be q4_K is q5_K.
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(80)} == {"q5_K", "q6_K"}
    more = [i for i in range(80) if types[f"blk.{i}.ffn_down.weight"] == "q6_K"]
    assert len(more) == 40
    assert more[:10] == list(range(10))
    assert more[10:13] == [12, 15, 18]
    assert more[-10:] == list(range(70, 80))


def test_rows_that_do_not_divide_fall_back() -> None:
    types = types_of("qwen2.5-72b", "Q4_K_M")  # n_ff 29568 is no multiple of 256
    assert types["blk.40.ffn_down.weight"] in ("q5_0", "q8_0")
    assert types["blk.40.ffn_up.weight"] == "q4_K"


def test_experts_of_gpt_oss_keep_their_published_type() -> None:
    types = types_of("gpt-oss-20b", "MXFP4")
    assert types["blk.3.ffn_up_exps.weight"] == "mxfp4"
    assert types["blk.3.attn_q.weight"] == "q8_0"


def test_fewer_bits_are_a_smaller_file() -> None:
    order = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS", "IQ1_S")
    sizes = [shape_header(load_shape("qwen3-8b"), mix)[1] for mix in order]
    assert sizes == sorted(sizes, reverse=True)


def test_every_mix_types_every_shape_in_blocks_that_divide() -> None:
    for name in ("mixtral-8x7b", "qwen2.5-72b", "deepseek-v2-lite"):
        shape = load_shape(name)
        for mix in quantizations_of(shape):
            for tensor, type_name in typed(
                outline_of(shape).tensors, shape.dims, shape.architecture, mix
            ):
                assert tensor.shape[0] % BY_NAME[type_name].block_size == 0


def test_the_same_shape_is_written_once(tmp_path: Path) -> None:
    first = shape_model(ShapeReference(name="qwen3-0.6b"))
    again = shape_model(ShapeReference(name="qwen3-0.6b"))
    assert first.files == again.files  # inode and time too
    first.path.write_bytes(b"something else")
    assert shape_model(ShapeReference(name="qwen3-0.6b")).tensors == again.tensors


def test_it_takes_no_room_on_the_disk() -> None:
    path = shape_model(ShapeReference(name="llama-3.1-405b", quantization="F16")).path
    assert path.stat().st_size > 700 * GIB
    assert path.stat().st_blocks * 512 < 1 << 20


def test_a_shape_has_no_weights_to_run() -> None:
    with pytest.raises(UsageError) as refusal:
        locate("shape:llama-3-8b@Q8_0")
    assert "without weights" in refusal.value.message
    assert "loadmaster plan shape:llama-3-8b@Q8_0" in (refusal.value.hint or "")
    assert is_skeleton(locate_header("shape:llama-3-8b").model.path)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("shape:llama-3-7b", "no shape `llama-3-7b`", "llama-3-70b"),
        ("shape:llama-3-70b@Q4KM", "has no Q4KM", "Q4_K_M"),
        ("shape:gpt-oss-20b@Q4_K_M", "has no Q4_K_M", "it has MXFP4"),
        ("shape:", "no shape ``", "shape:"),
        ("shape:../x", "no shape `../x`", "shape:"),
        ("shape:llama-3-8b@", "has no ", "it has F16"),
        ("shape:llama-3-8b@nf5", "has no nf5", "nearest: NF4"),
        ("shape:llama-3-8b@", "has no ", "of safetensors NONE, INT8, FP8, NF4, FP4"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(NotFoundError) as refusal:
        parse_shape(text)
    assert message in refusal.value.message
    assert hint in (refusal.value.hint or "")


def test_a_quantization_is_read_in_any_case() -> None:
    assert parse_shape("shape:llama-3-8b@iq2_xs").quantization == "IQ2_XS"


def test_a_comparison_shows_what_a_shape_can_be() -> None:
    assert compared_quantizations(load_shape("gpt-oss-120b")) == ("MXFP4",)
    assert "Q4_K_M" in compared_quantizations(load_shape("qwen3-8b"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["dims"].update(n_heads=1), "Shape.dims.n_heads: unknown key"),
        (lambda c: c["dims"].pop("n_embd"), "Shape.dims.n_embd: missing"),
        (lambda c: c["dims"].update(n_layer="80"), "Shape.dims.n_layer: str"),
        (lambda c: c.update(schema_version=2), "schema_version is 2"),
        (lambda c: c.update(name="other"), "name is 'other'"),
        (lambda c: c.update(family="rwkv"), "family 'rwkv'"),
        (lambda c: c.update(only=["Q9"]), "no quantization 'Q9'"),
    ],
)
def test_a_wrong_shape_file_is_refused_with_its_place(change: Any, words: str) -> None:
    folder = Path(__file__).parents[2] / "src/loadmaster/model/shapes"
    content = json.loads((folder / "llama-3-70b.json").read_text())
    change(content)
    with pytest.raises(UsageError) as refusal:
        decode_shape(json.dumps(content), "llama-3-70b")
    assert words in refusal.value.message


def test_not_json() -> None:
    with pytest.raises(UsageError, match="not readable"):
        decode_shape("{", "x")
