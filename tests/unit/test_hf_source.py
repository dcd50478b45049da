"""Checkpoints: folders that are read, and the ones that are refused with what to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import DamagedFileError, LoadmasterError
from loadmaster.model.checkpoint import Stored
from loadmaster.model.hf_config import parse_config
from loadmaster.model.hf_source import is_checkpoint, read_checkpoint
from loadmaster.model.types import LayerKind
from tests.checkpoint_parts import LOADED, write_checkpoint, write_shard


def refusal(folder: Path) -> LoadmasterError:
    with pytest.raises(LoadmasterError) as caught:
        read_checkpoint(folder)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("family", LOADED)
def test_every_family_is_read(tmp_path: Path, family: str) -> None:
    model = read_checkpoint(write_checkpoint(tmp_path / "m", family))
    config = LOADED[family]["config"]
    assert model.architecture == family
    assert (model.n_layer, model.n_embd) == (config["num_hidden_layers"], config["hidden_size"])
    assert len(model.layers) == model.n_layer
    assert model.tied_output == ("lm_head.weight" not in LOADED[family]["tensors"])
    assert len(model.tensors) == len(LOADED[family]["tensors"])
    assert (model.name, model.quantization, model.dtype) == ("m", "BF16", "bf16")


def test_shards_are_read_in_order_and_count_as_one(tmp_path: Path) -> None:
    whole = read_checkpoint(write_checkpoint(tmp_path / "one"))
    split = read_checkpoint(write_checkpoint(tmp_path / "three", shards=3))
    assert [file.path.name for file in split.files[1:]] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    assert split.weight_bytes == whole.weight_bytes
    assert {t.name: t.role for t in split.tensors} == {t.name: t.role for t in whole.tensors}
    assert split.header_bytes < split.file_bytes


def test_any_file_of_a_checkpoint_names_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    assert read_checkpoint(folder / "model.safetensors") == read_checkpoint(folder)
    assert is_checkpoint(folder / "config.json")
    assert not is_checkpoint(tmp_path)


def test_windows_by_family(tmp_path: Path) -> None:
    kinds = [layer.kind for layer in read_checkpoint(
        write_checkpoint(tmp_path / "g", "gemma3_text", layer_types=None)
    ).layers]  # fmt: skip
    assert kinds == [LayerKind.SWA] * 5 + [LayerKind.FULL, LayerKind.SWA]
    qwen = read_checkpoint(write_checkpoint(tmp_path / "q", "qwen2", sliding_window=64))
    assert qwen.n_swa == 0  # not in use unless the config says so


def test_roles_of_experts_and_routers(tmp_path: Path) -> None:
    model = read_checkpoint(write_checkpoint(tmp_path / "m", "mixtral"))
    roles = {tensor.name: tensor.role for tensor in model.tensors}
    experts = [name for name, role in roles.items() if role == "expert"]
    assert experts
    assert all(".experts." in name for name in experts)
    routers = [name for name in roles if name.endswith("gate.weight")]
    assert routers
    assert {roles[name] for name in routers} == {"other"}
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "linear"


# ---- refused


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    error = refusal(folder)
    assert error.exit_code == 4
    assert "1 of 3 shards" in error.message
    assert "model-00002-of-00003" in error.message


def test_a_shard_of_another_model_is_found_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    write_shard(folder / "model-00002-of-00002.safetensors", {"x": ("F32", (2,))})
    assert getattr(refusal(folder), "code", "") == "index_mismatch"


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert refusal(tmp_path).code == "pickled_weights"
    folder = write_checkpoint(tmp_path / "m", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "pytorch_model.bin"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder).code == "pickled_weights"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", 3])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert refusal(folder).code == "bad_index"


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    named = write_checkpoint(tmp_path / "a", auto_map={"AutoModel": "modeling_x.X"})
    assert refusal(named).code == "remote_code"
    brought = write_checkpoint(tmp_path / "b")
    (brought / "modeling_x.py").write_text("")
    assert refusal(brought).code == "remote_code"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_hidden_layers": 2}, "config_mismatch"),
        ({"num_hidden_layers": 4}, "missing_tensor"),
        ({"hidden_size": 64}, "config_mismatch"),
        ({"vocab_size": 511}, "config_mismatch"),
        ({"intermediate_size": 128}, "config_mismatch"),
        ({"num_key_value_heads": 4}, "config_mismatch"),
        ({"hidden_size": 0}, "bad_config"),
        ({"hidden_size": "128"}, "bad_config"),
        ({"num_hidden_layers": 10**9}, "bad_config"),
        ({"tie_word_embeddings": "yes"}, "bad_config"),
        ({"model_type": "surprise"}, "unknown_architecture"),
        ({"vision_config": {}}, "not_text"),
        ({"quantization": {"bits": 4}}, "mlx_checkpoint"),
        ({"block_configs": [1]}, "pruned"),
        ({"intermediate_size": [256, 128, 256]}, "pruned"),
        ({"quantization_config": {"quant_method": "surprise"}}, "unknown_quantization"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors",
                                     "sparsity_config": {"format": "sparse-24"}}},
            "pruned",
        ),
    ],
)  # fmt: skip
def test_a_config_that_does_not_do(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    assert refusal(write_checkpoint(tmp_path / "m", **change)).code == code


def test_quantized_checkpoints_are_known_by_their_config() -> None:
    def stored(**found: object) -> str:
        config = LOADED["llama"]["config"] | {"quantization_config": found}
        made = parse_config(json.dumps(config).encode(), "config.json").stored
        assert made is not None
        return f"{made.method} {made.label}"

    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert stored(**four, bnb_4bit_quant_type="nf4") == "bnb4 NF4"
    assert stored(**four) == "bnb4 FP4"
    assert stored(quant_method="bitsandbytes", load_in_8bit=True) == "bnb8 INT8"
    assert stored(quant_method="fp8", weight_block_size=[128, 128]) == "fp8 FP8"
    assert stored(quant_method="gptq", bits=4) == "gptq GPTQ 4-bit"
    assert stored(quant_method="fbgemm_fp8") == "fbgemm-fp8 FP8"


def packed(method: str, **found: object) -> Stored:
    config = LOADED["llama"]["config"] | {"quantization_config": {"quant_method": method, **found}}
    made = parse_config(json.dumps(config).encode(), "config.json").stored
    assert made is not None
    return made


def test_packed_checkpoints_are_known_by_their_version() -> None:
    gptq = packed("gptq", bits=4, group_size=128, desc_act=True, dynamic={"-:.*gate": {}})
    assert (gptq.label, gptq.block, gptq.runs) == ("GPTQ 4-bit", (1, 128), True)
    assert gptq.act_order
    assert gptq.zeros_less_one
    assert not packed("gptq", bits=4, checkpoint_format="gptq_v2", desc_act=False).zeros_less_one
    awq = packed("awq", w_bit=4, q_group_size=64, version="GEMM")
    assert (awq.label, awq.block, awq.runs) == ("AWQ 4-bit", (1, 64), True)
    assert not awq.zeros_less_one
    assert packed("awq", bits=4, group_size=-1).block is None


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("gptq", {"bits": 3}),
        ("gptq", {}),
        ("gptq", {"bits": 4, "format": "marlin"}),
        ("gptq", {"bits": 4, "is_marlin_format": True}),
        ("gptq", {"bits": 4, "pack_dtype": "int16"}),
        ("gptq", {"bits": 4, "rotation": "hadamard"}),
        ("gptq", {"bits": 4, "dynamic": {".*down_proj": {"bits": 8}}}),
        ("gptq", {"bits": 4, "dynamic": [1]}),
        ("awq", {"bits": 8}),
        ("awq", {"bits": 4, "version": "gemv"}),
        ("awq", {"bits": 4, "zero_point": False}),
    ],
)
def test_packings_without_products(method: str, found: dict[str, Any]) -> None:
    assert not packed(method, **found).runs


@pytest.mark.parametrize("size", [0, -2, 1 << 16, "128", True, None])
def test_group_sizes_that_are_none(size: object) -> None:
    with pytest.raises(DamagedFileError, match="group_size"):
        packed("gptq", bits=4, group_size=size)


def test_a_packed_output_is_refused() -> None:
    with pytest.raises(DamagedFileError, match="lm_head") as caught:
        packed("gptq", bits=4, lm_head=True)
    assert "--quantize nf4" in (caught.value.hint or "")


def compressed(name: str, *weights: object, **more: object) -> Stored:
    groups = {f"group_{index}": {"weights": one} for index, one in enumerate(weights)}
    found = {"quant_method": "compressed-tensors", "format": name, "config_groups": groups} | more
    config = LOADED["llama"]["config"] | {"quantization_config": found}
    made = parse_config(json.dumps(config).encode(), "config.json").stored
    assert made is not None
    return made


def test_compressed_tensors_are_known_by_their_groups() -> None:
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    found = compressed("pack-quantized", four)
    assert (found.label, found.bits, found.block) == ("compressed-tensors INT4", 4, (1, 128))
    assert found.runs
    tiles = compressed("float-quantized", {**eight, "block_structure": [128, 128]})
    assert (tiles.label, tiles.bits, tiles.block) == ("compressed-tensors FP8", 8, (128, 128))
    assert tiles.runs
    others: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("nvfp4-pack-quantized", [{"num_bits": 4, "type": "float"}], {}),
        ("pack-quantized", [{"num_bits": 3, "type": "int"}], {}),
        ("mixed-precision", [four, eight], {}),
        ("pack-quantized", [four], {"transform_config": {"config_groups": {"R1": {}}}}),
    ]
    for name, weights, more in others:
        assert not compressed(name, *weights, **more).runs


@pytest.mark.parametrize("groups", [None, {}, {"group_0": {}}, {"group_0": {"weights": {}}}])
def test_groups_without_weights_are_refused(groups: object) -> None:
    found = {"quant_method": "compressed-tensors", "config_groups": groups}
    config = LOADED["llama"]["config"] | {"quantization_config": found}
    with pytest.raises(DamagedFileError) as caught:
        parse_config(json.dumps(config).encode(), "config.json")
    assert caught.value.code == "bad_config"


def test_scales_and_a_config_that_knows_nothing_of_them(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    error = refusal(folder)
    assert error.code == "config_mismatch"
    assert "no scales" in error.message
    folder = write_checkpoint(tmp_path / "n")
    rows = {name: (dtype, shape) for name, (dtype, shape) in LOADED["llama"]["tensors"].items()}
    rows["model.layers.0.mlp.up_proj.weight_scale_inv"] = ("F32", (1, 1))
    write_shard(folder / "model.safetensors", rows)
    error = refusal(folder)
    assert error.code == "config_mismatch"
    assert "weight_scale_inv" in error.message


def test_a_matrix_that_one_layer_lacks_is_missing_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    lost = "model.layers.1.self_attn.k_proj.weight"
    rows = {name: row for name, row in LOADED["llama"]["tensors"].items() if name != lost}
    write_shard(folder / "model.safetensors", rows)
    error = refusal(folder)
    assert getattr(error, "code", "") == "missing_tensor"
    assert lost in error.message


def test_a_link_that_leads_nowhere_is_called_that(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "the link leads nowhere" in (refusal(folder).hint or "")


@pytest.mark.parametrize(
    ("found", "template"),
    [
        ("{{ x }}", "{{ x }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        ([{"name": "default", "template": 3}, "default"], None),
        (None, None),
    ],
)
def test_of_several_templates_the_default_is_taken(
    tmp_path: Path, found: object, template: str | None
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    assert read_checkpoint(folder).chat_template == template


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_shard(tmp_path / "adapter_model.safetensors", {"x": ("F32", (2,))})
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refusal(tmp_path)
    assert getattr(error, "code", "") == "adapter"
    assert "LoRA" in error.message
