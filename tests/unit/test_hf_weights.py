"""Bytes after loading: the sums of the tensors that the libraries themselves held."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadmaster.model.checkpoint import CheckpointSpec, Stored
from loadmaster.plan.hf_weights import (
    LoadedTensor,
    device_of,
    four_bit_allocations,
    fp8_allocations,
    int8_allocations,
    loaded_tensors,
)
from loadmaster.plan.types import Quantize
from loadmaster.units import Bytes
from tests.checkpoint_parts import LOADED, SETTINGS, spec

MODES: dict[str, tuple[Quantize, bool]] = {
    "none": ("none", False), "nf4": ("nf4", False), "nf4d": ("nf4", True), "int8": ("int8", False),
}  # fmt: skip


@pytest.mark.parametrize("family", LOADED)
def test_sums_are_those_of_the_loaded_tensors(tmp_path: Path, family: str) -> None:
    model = spec(tmp_path, family)
    for mode, (quantize, double) in MODES.items():
        settings = replace(SETTINGS, quantize=quantize, double_quant=double)
        planned = sum(tensor.size_bytes for tensor in loaded_tensors(model, settings))
        assert planned == LOADED[family]["bytes"][mode], mode


def test_bits_per_weight_of_the_4_bit_types() -> None:
    n = 4096 * 14336
    plain, double = four_bit_allocations(n, False), four_bit_allocations(n, True)
    assert 8 * sum(plain) / n == pytest.approx(4.5, abs=1e-4)
    assert 8 * sum(double) / n == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert four_bit_allocations(65, False) == (33, 8, 64)


def test_int8_and_fp8() -> None:
    assert int8_allocations(10, 64) == (640, 40)
    assert fp8_allocations(256, 384) == (256 * 384, 2 * 3 * 4)
    assert fp8_allocations(100, 385) == (100 * 385, 1 * 4 * 4)  # tiles at the edges count too


def test_experts_are_quantized_by_fp8_alone(tmp_path: Path) -> None:
    model = spec(tmp_path, "mixtral")

    def kinds(quantize: Quantize) -> set[str]:
        loaded = loaded_tensors(model, replace(SETTINGS, quantize=quantize))
        return {tensor.kind for tensor in loaded if tensor.role == "expert"}

    assert kinds("nf4") == kinds("int8") == {"bf16"}
    assert kinds("fp8") == {"fp8"}


def test_what_is_on_the_cpu_beside_a_gpu_is_not_quantized(tmp_path: Path) -> None:
    model = spec(tmp_path)
    split = tuple((f"model.layers.{index}", "cpu" if index == 0 else "gpu:0") for index in range(3))
    settings = replace(SETTINGS, quantize="nf4", device_map=(("", "gpu:0"), *split))
    kinds = {t.layer: t.kind for t in loaded_tensors(model, settings) if t.role == "linear"}
    assert kinds == {0: "bf16", 1: "nf4", 2: "nf4"}


def stored_as(model: CheckpointSpec, stored: Stored, **stored_tensors: Any) -> list[LoadedTensor]:
    """The first matrix of a model as a quantized checkpoint has it, alone; by suffix: type, bytes
    and shape of its tensors."""
    weight = next(tensor for tensor in model.tensors if tensor.role == "linear")
    parts = [
        replace(
            weight, name=f"{weight.module}.{suffix}", dtype=dtype, size_bytes=Bytes(size),
            shape=shape, role="linear" if index == 0 else "statistic",
        )
        for index, (suffix, (dtype, size, shape)) in enumerate(stored_tensors.items())
    ]  # fmt: skip
    loaded = loaded_tensors(replace(model, stored=stored, tensors=tuple(parts)), SETTINGS)
    return [tensor for tensor in loaded if tensor.role != "buffer"]


def test_four_bits_are_as_they_are_stored(tmp_path: Path) -> None:
    stored = Stored(method="bnb4", label="NF4", bits=4, double_quant=True)
    parts: dict[str, Any] = {
        "weight": ("U8", 2048, (2048, 1)), "weight.absmax": ("U8", 64, (64,)),
        "weight.nested_absmax": ("F32", 4, (1,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", 99, (99,)),
    }  # fmt: skip
    (loaded,) = stored_as(spec(tmp_path), stored, **parts)
    assert loaded.allocations == (2048, 64, 4, 4)  # the description becomes the offset
    assert (loaded.kind, loaded.n_elements) == ("nf4", 4096)


@pytest.mark.parametrize(
    ("stored", "parts", "kind", "n_elements"),
    [
        (Stored(method="fp8", label="FP8", block=(128, 128)),
         {"weight": ("F8_E4M3", 4096, (64, 64)), "weight_scale_inv": ("F32", 4, (1, 1))},
         "fp8", 4096),
        (Stored(method="compressed-tensors", label="compressed-tensors INT4", bits=4),
         {"weight_packed": ("I32", 2048, (64, 8)), "weight_scale": ("BF16", 256, (64, 2))},
         "int4", 4096),
        (Stored(method="bnb8", label="INT8"),
         {"weight": ("I8", 4096, (64, 64)), "SCB": ("F32", 256, (64,))}, "int8", 4096),
    ],
)  # fmt: skip
def test_matrices_are_counted_with_their_scales(
    tmp_path: Path, stored: Stored, parts: dict[str, Any], kind: str, n_elements: int
) -> None:
    (loaded,) = stored_as(spec(tmp_path), stored, **parts)
    assert loaded.size_bytes == sum(size for _, size, _ in parts.values())
    assert (loaded.kind, loaded.n_elements, loaded.is_quantized) == (kind, n_elements, True)


def test_the_longest_name_wins() -> None:
    device_map = (("", "gpu:0"), ("model.layers.1", "gpu:1"), ("model.layers.1.mlp", "cpu"))
    assert device_of("model.layers.1.mlp.up_proj.weight", device_map) == "cpu"
    assert device_of("model.layers.1.self_attn", device_map) == "gpu:1"
    assert device_of("model.layers.10.mlp.up_proj", device_map) == "gpu:0"
