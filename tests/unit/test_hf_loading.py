"""What a load holds for a while: one tensor on its way, and a part of it while it is quantized."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from loadmaster.model.checkpoint import CheckpointSpec, Stored
from loadmaster.plan.hf_loading import device_loading, host_loading
from loadmaster.plan.hf_weights import QUANTIZED_PART, loaded_tensors
from tests import checkpoint_parts as parts

GPU = (("", "gpu:0"),)
WIDEST = 14336 * 4096  # of the matrices of Llama 3 8B
EMBEDDING = 128256 * 4096


def on_host(model: CheckpointSpec, **changes: Any) -> int:
    settings = replace(parts.SETTINGS, **changes)
    return host_loading(model, settings, loaded_tensors(model, settings), 0)


def for_gpu(model: CheckpointSpec, **changes: Any) -> tuple[int, int]:
    """On the GPU, and in RAM."""
    settings = replace(parts.SETTINGS, device_map=GPU, **changes)
    tensors = loaded_tensors(model, settings)
    return device_loading(model, tensors), host_loading(model, settings, [], 1)


def test_what_stays_as_it_was_read_is_there_once() -> None:
    assert on_host(parts.shape()) == 0


def test_what_is_cast_is_there_twice() -> None:
    assert on_host(parts.shape(), compute_type="f32") == EMBEDDING * 2


def test_a_quantized_matrix_is_there_as_it_was_stored_and_a_part_of_it_made() -> None:
    for quantize in ("nf4", "int8"):
        assert on_host(parts.shape(), quantize=quantize) == WIDEST * 2 + QUANTIZED_PART * 24
    assert on_host(parts.shape(), quantize="fp8") == WIDEST * 2 + 14336 * 128 * 16


def test_a_matrix_is_cast_before_it_is_quantized() -> None:
    f16 = parts.shape()
    f16 = replace(f16, tensors=tuple(replace(t, dtype="F16") for t in f16.tensors), dtype="f16")
    assert on_host(f16, quantize="nf4") == max(WIDEST * 4, EMBEDDING * 2)


def test_what_comes_quantized_is_read_and_left(tmp_path: Path) -> None:
    model = parts.spec(tmp_path)
    weight = next(tensor for tensor in model.tensors if tensor.role == "linear")
    scales = replace(weight, name=weight.module + ".weight_scale", role="statistic", dtype="F32")
    codes = replace(weight, dtype="F8_E4M3")
    stored = replace(
        model, stored=Stored(method="fbgemm-fp8", label="FP8"), tensors=(codes, scales)
    )
    assert on_host(stored) == 0
    assert for_gpu(stored) == (0, scales.size_bytes)


def test_tensors_for_a_gpu_pass_through_ram() -> None:
    assert for_gpu(parts.shape()) == (0, EMBEDDING * 2)
    assert for_gpu(parts.shape(), quantize="nf4") == (3 * WIDEST, EMBEDDING * 2)
    # LLM.int8 is made of a copy in RAM, in F16 and as it came.
    assert for_gpu(parts.shape(), quantize="int8") == (5 * WIDEST, EMBEDDING * 2 + 4 * WIDEST)


def test_experts_are_stacked() -> None:
    model = parts.shape("mixtral-8x7b")
    one = 14336 * 4096 * 2
    assert on_host(model) == 2 * 8 * one
    assert on_host(model, quantize="fp8") >= 2 * 8 * one // 2
