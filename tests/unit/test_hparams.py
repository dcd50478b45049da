"""Layer kinds and cache widths as llama.cpp derives them from a header."""

from typing import Any

import pytest

from benchmarks.shapes import ARCHITECTURES, TINY
from loadmaster.model.hparams import has_formula, layers_of, window_of
from loadmaster.model.types import LayerKind, LayerSpec

FULL, SWA, MLA, RECURRENT, NONE = (
    LayerKind.FULL, LayerKind.SWA, LayerKind.MLA, LayerKind.RECURRENT, LayerKind.NONE,
)  # fmt: skip


def _layers(architecture: str, **keys: Any) -> tuple[LayerSpec, ...]:
    metadata: dict[str, Any] = {
        "block_count": 4,
        "embedding_length": 512,
        "attention.head_count": 8,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    layers, known = layers_of(
        architecture, {f"{architecture}.{k}": v for k, v in metadata.items()}, ()
    )
    assert known is has_formula(architecture)
    return layers


def _kinds(layers: tuple[LayerSpec, ...]) -> list[LayerKind]:
    return [layer.kind for layer in layers]


def _real(name: str) -> tuple[LayerSpec, ...]:
    shape = ARCHITECTURES[name]("q4_K_M")
    metadata = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in shape.metadata.items()
    }
    return layers_of(str(metadata["general.architecture"]), metadata, ())[0]


def test_heads_and_widths_have_llama_cpps_defaults() -> None:
    layer = _layers("llama")[0]
    assert (layer.n_head, layer.n_head_kv) == (8, 8)
    assert (layer.k_width, layer.v_width) == (512, 512)


def test_key_and_value_lengths_replace_the_default_head() -> None:
    layer = _layers(
        "qwen3",
        attention__head_count_kv=2,
        attention__key_length=128,
        attention__value_length=96,
    )[3]
    assert (layer.k_width, layer.v_width) == (256, 192)


def test_heads_may_differ_between_layers() -> None:
    layers = _layers("deci", attention__head_count_kv=(8, 0, 2, 1))
    assert [layer.k_width for layer in layers] == [512, 0, 128, 64]
    assert _kinds(layers) == [FULL] * 4  # a layer of width 0 still pads V without flash attention


@pytest.mark.parametrize(
    ("architecture", "keys", "kinds"),
    [
        ("gemma2", {"attention__sliding_window": 4096}, [SWA, FULL, SWA, FULL]),
        ("gemma2", {}, [SWA, FULL, SWA, FULL]),  # its window has a default
        ("gpt-oss", {"attention__sliding_window": 128}, [SWA, FULL, SWA, FULL]),
        ("cohere2", {"attention__sliding_window": 4096}, [SWA, SWA, SWA, FULL]),
        ("smallthinker", {"attention__sliding_window": 4096}, [FULL, SWA, SWA, SWA]),
        ("gemma3", {}, [FULL] * 4),
        ("olmo2", {"attention__sliding_window": 0}, [FULL] * 4),
        ("phi3", {"attention__sliding_window": 2047}, [FULL] * 4),  # disabled in the engine
        ("qwen2", {"attention__sliding_window": 4096}, [FULL] * 4),
        ("llama4", {}, [SWA, SWA, SWA, FULL]),
        ("llama4", {"attention__sliding_window": 0}, [FULL] * 4),
        ("exaone4", {"attention__sliding_window": 4096}, [FULL] * 4),  # the 64-layer model alone
        (
            "gemma2",
            {"attention__sliding_window_pattern": (True, True, False, True)},
            [SWA, SWA, FULL, SWA],
        ),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 2},
         [SWA, FULL, SWA, FULL]),
    ],
)  # fmt: skip
def test_window_patterns(architecture: str, keys: dict[str, Any], kinds: list[LayerKind]) -> None:
    assert _kinds(_layers(architecture, **keys)) == kinds


def test_windows_that_the_engine_fixes_or_defaults() -> None:
    def window(architecture: str, **keys: int) -> int:
        metadata = {f"{architecture}.{k}": v for k, v in {"block_count": 4, **keys}.items()}
        return window_of(architecture, metadata)

    assert window("gemma2") == 4096
    assert window("llama4", **{"attention.sliding_window": 4096}) == 8192
    assert window("gpt-oss", **{"attention.sliding_window": 128}) == 128
    assert window("phi3", **{"attention.sliding_window": 2047}) == 0
    assert window("mistral", **{"attention.sliding_window": 4096}) == 0


def test_mla_keeps_one_compressed_row_and_no_v() -> None:
    layer = _real("deepseek2-lite")[0]
    assert (layer.kind, layer.k_width, layer.v_width) == (MLA, 576, 0)


def test_deepseek_files_without_mla_lengths_cache_whole_heads() -> None:
    assert _kinds(_layers("deepseek2", attention__kv_lora_rank=512)) == [FULL] * 4


def test_delta_nets_and_every_fourth_attention() -> None:
    layers = _real("qwen3next-80b-a3b")
    assert _kinds(layers[:4]) == [RECURRENT] * 3 + [FULL]
    assert (layers[0].recurrent_r_width, layers[0].recurrent_s_width) == (3 * 8192, 128 * 4096)
    assert (layers[0].k_width, layers[3].k_width) == (0, 512)


def test_layers_without_kv_heads_are_recurrent_in_hybrids() -> None:
    layers = _real("lfm2-1.2b")
    attention = [layer.index for layer in layers if layer.kind is FULL]
    assert attention == [2, 5, 8, 10, 12, 14]
    assert (layers[0].recurrent_r_width, layers[0].recurrent_s_width) == (2048 * 2, 0)


def test_mamba_has_states_alone() -> None:
    layer = _real("mamba-2.8b")[0]
    assert layer.kind is RECURRENT
    assert (layer.recurrent_r_width, layer.recurrent_s_width) == (3 * 5120, 16 * 5120)


def test_falcon_h1_has_attention_and_a_state_in_one_layer() -> None:
    keys = {"ssm__conv_kernel": 4, "ssm__inner_size": 1024, "ssm__state_size": 16}
    layer = _layers("falcon-h1", **keys)[0]
    assert (layer.kind, layer.k_width, layer.recurrent_s_width) == (RECURRENT, 512, 16384)


def test_nemotron_h_layers_are_attention_state_or_feed_forward() -> None:
    layers = _layers(
        "nemotron_h",
        attention__head_count_kv=(0, 8, 0, 0),
        feed_forward_length=(0, 0, 2048, 0),
    )
    assert _kinds(layers) == [RECURRENT, FULL, NONE, RECURRENT]


def test_mtp_layers_own_no_cache() -> None:
    assert _kinds(_layers("glm4moe", nextn_predict_layers=1)) == [FULL, FULL, FULL, NONE]


def test_gemma4_shares_the_caches_of_earlier_layers() -> None:
    layers = _layers(
        "gemma4",
        attention__sliding_window_pattern=(True, False, True, False),
        attention__shared_kv_layers=2,
        attention__key_length=512,
        attention__value_length=512,
        attention__key_length_swa=256,
        attention__value_length_swa=256,
    )
    assert _kinds(layers) == [SWA, FULL, NONE, NONE]
    assert [layer.k_width for layer in layers] == [2048, 4096, 2048, 4096]


def test_an_architecture_without_a_formula_says_so() -> None:
    metadata = {"deepseek4.block_count": 2, "deepseek4.attention.head_count": 4}
    layers, known = layers_of("deepseek4", metadata, ())
    assert not known
    assert len(layers) == 2


@pytest.mark.parametrize("name", list(TINY))
def test_every_shape_has_a_formula(name: str) -> None:
    assert has_formula(str(TINY[name]("q8_0").metadata["general.architecture"]))
