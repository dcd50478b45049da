"""Tiny checkpoints that come quantized, as the libraries themselves save them: see `KINDS`."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hf_parts import write_model

FP8 = torch.float8_e4m3fn
TILE = (32, 32)  # several of them in matrices of 64 × 128
_BESIDE = ("tokenizer.json", "tokenizer_config.json")


def quantized(folder: Path, kind: str, family: str = "llama") -> Path:
    """A checkpoint of a kind, made of a random BF16 model."""
    plain = plain_model(folder / "plain", family)
    made = folder / kind
    made.mkdir()
    KINDS[kind](plain, made)
    for name in _BESIDE:
        shutil.copy(plain / name, made / name)
    return made


def plain_model(folder: Path, family: str = "llama") -> Path:
    """A random model in BF16, as what is quantized usually is."""
    write_model(folder, family)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _change_config(folder, folder, dtype="bfloat16")
    return folder


def _change_config(source: Path, target: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))


def add_to_config(folder: Path, found: Mapping[str, Any]) -> None:
    """Have a checkpoint say that it is quantized so."""
    _change_config(folder, folder, quantization_config=dict(found))


def packed(folder: Path) -> None:
    """Give one matrix the tensors that GPTQ and AWQ have in its place; they mean nothing."""
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    weight = tensors.pop(stem + ".weight", None)
    if weight is not None:
        rows, columns = weight.shape
        tensors[stem + ".qweight"] = torch.zeros((columns // 8, rows), dtype=torch.int32)
        tensors[stem + ".scales"] = torch.zeros((1, rows), dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- bitsandbytes


def _bitsandbytes(**config: Any) -> Callable[[Path, Path], None]:
    def make(plain: Path, made: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        model = AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**config),
        )
        model.save_pretrained(made)

    return make


# ---- FP8


def _matrices(tensors: Mapping[str, Any], ending: str = "proj.weight") -> list[str]:
    return [
        name
        for name in tensors
        if name.endswith((ending, ".w1.weight", ".w2.weight", ".w3.weight"))
    ]


def _fine_grained(plain: Path, made: Path) -> None:
    """As DeepSeek and Qwen ship theirs: by the operation of transformers."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    config = FineGrainedFP8Config(weight_block_size=TILE)
    operation = Fp8Quantize(FineGrainedFP8HfQuantizer(config))
    tensors = load_file(plain / "model.safetensors")
    for name in _matrices(tensors):
        tensors |= operation.convert({name: tensors[name]})
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    found = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": list(TILE),
    }  # fmt: skip
    _change_config(plain, made, quantization_config=found)


def _rows_of_mlp(plain: Path, made: Path) -> None:
    """As Meta ships the 405B: the feed-forward alone, a scale for each row."""
    from transformers.integrations.compressed_tensors import quantize_fp8_per_row

    tensors = load_file(plain / "model.safetensors")
    for name in [one for one in _matrices(tensors) if ".mlp." in one]:
        tensors[name], scales = quantize_fp8_per_row(tensors[name])
        tensors[name + "_scale"] = scales[:, None].contiguous()
        tensors[name.replace(".weight", ".input_scale_ub")] = torch.tensor([1200.0])
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    found = {
        "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head", "self_attn"],
    }  # fmt: skip
    _change_config(plain, made, quantization_config=found)


# ---- compressed-tensors


def _compressed(
    inputs: Mapping[str, Any] | None = None, **weights: Any
) -> Callable[[Path, Path], None]:
    """Quantized by a scheme of compressed-tensors, and saved by it."""

    def make(plain: Path, made: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from transformers import AutoModelForCausalLM

        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
        apply_quantization_config(model, config)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                _calibrate(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(made)
        compressor.update_config(str(made))

    return make


def _calibrate(module: Any) -> None:
    """Scales from the least and the largest weight that share one."""
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = module.quantization_scheme.weights
    rows, columns = module.weight.shape
    size = {"group": scheme.group_size, "channel": columns}.get(scheme.strategy)
    parts = module.weight.view(rows, -1, size) if size else module.weight.view(1, 1, -1)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme)
    module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))


def numbers(folder: Path, target: Path) -> Path:
    """The unquantized checkpoint that FP8 matrices with a scale for each row stand for."""
    tensors = load_file(folder / "model.safetensors")
    for name in [one for one in tensors if tensors[one].dtype is FP8]:
        scales = tensors.pop(name + "_scale")
        tensors[name] = (tensors[name].float() * scales).to(torch.bfloat16)
    target.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("scale_ub")}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


_TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
KINDS: Mapping[str, Callable[[Path, Path], None]] = {
    "nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-nested": _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": _bitsandbytes(load_in_8bit=True),
    "fp8-tiles": _fine_grained,
    "fp8-rows": _rows_of_mlp,
    "ct-fp8": _compressed(
        {**_TOKENS, "type": "float"}, num_bits=8, type="float", strategy="channel"
    ),
    "ct-fp8-tensor": _compressed(
        {**_TOKENS, "type": "float"}, num_bits=8, type="float", strategy="tensor"
    ),
    "ct-int8": _compressed({**_TOKENS, "type": "int"}, num_bits=8, strategy="channel"),
    "ct-int4": _compressed(num_bits=4, strategy="group", group_size=32),
    "ct-int4-asym": _compressed(num_bits=4, strategy="group", group_size=32, symmetric=False),
}
