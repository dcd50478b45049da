"""Bytes after loading: the sums of the tensors that the libraries themselves held."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.model.checkpoint import Stored
from loadmaster.plan.hf_weights import (
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
    # What tiles do not divide is passed on in 16 bits; its scales are made all the same.
    assert fp8_allocations(100, 384) == (2 * 100 * 384, 1 * 3 * 4)


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


def test_a_quantized_checkpoint_is_as_it_is_stored(tmp_path: Path) -> None:
    model = spec(tmp_path)
    weight = next(tensor for tensor in model.tensors if tensor.role == "linear")
    stem = weight.name
    packed = replace(weight, dtype="U8", shape=(weight.n_elements // 2, 1))
    parts = [
        replace(packed, size_bytes=Bytes(weight.n_elements // 2)),
        replace(packed, name=f"{stem}.absmax", role="statistic", size_bytes=Bytes(128)),
        replace(packed, name=f"{stem}.nested_absmax", dtype="F32", role="statistic",
                size_bytes=Bytes(4)),
        replace(packed, name=f"{stem}.quant_state.bitsandbytes__nf4", role="statistic",
                size_bytes=Bytes(99)),
    ]  # fmt: skip
    stored = Stored(method="bnb4", label="NF4", double_quant=True)
    quantized = replace(model, stored=stored, tensors=tuple(parts))
    sizes = [t.size_bytes for t in loaded_tensors(quantized, SETTINGS) if t.role != "buffer"]
    assert sizes == [weight.n_elements // 2, 128, 4, 4]  # the description becomes the offset


def test_the_longest_name_wins() -> None:
    device_map = (("", "gpu:0"), ("model.layers.1", "gpu:1"), ("model.layers.1.mlp", "cpu"))
    assert device_of("model.layers.1.mlp.up_proj.weight", device_map) == "cpu"
    assert device_of("model.layers.1.self_attn", device_map) == "gpu:1"
    assert device_of("model.layers.10.mlp.up_proj", device_map) == "gpu:0"
