"""Our bytes and our numbers against the tensors that bitsandbytes makes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.model.codes import (
    DYNAMIC,
    FP4,
    INT8,
    NF4,
    Code,
    nested_scales,
    quantize,
    restored,
    unpacked,
)
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.hf_weights import (
    BLOCK,
    NESTED_BLOCK,
    four_bit_allocations,
    int8_allocations,
    loaded_tensors,
)
from loadmaster.plan.rounding import relative_error
from loadmaster.plan.types import Quantize
from tests.hf_parts import SETTINGS, write_llama

prepare()

import bitsandbytes.functional as bnb  # noqa: E402

from loadmaster.engine.backends.transformers.weights import load_weights  # noqa: E402

CODES = {"nf4": NF4, "fp4": FP4}
# Whole blocks; rows that blocks do not divide; an odd row; less than one block; more scales than
# one nested block has, and a part of another. Widths like 80 are left out: the library's AVX-512
# kernel restores those with the scales of other blocks, and no plan takes them to a CPU.
SHAPES = [(64, 64), (5, 150), (3, 65), (1, 6), (130, 254)]
# Each type's distance between neighbours, relative.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """bitsandbytes compiles what it has no kernel for; the same numbers come without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def gaussian(shape: tuple[int, ...], dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def allocations(packed: Any, state: Any) -> tuple[int, ...]:
    """Bytes of everything that a 4-bit matrix keeps, in the order of the formula."""
    parts = [packed, state.absmax, state.code]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return tuple(part.nbytes for part in parts)


def ours(packed: Any, state: Any, code: Code) -> list[float]:
    """The weights of a library's tensors, by our codes."""
    scales = state.absmax.tolist()
    if state.nested:
        outer = state.state2.absmax.tolist()
        scales = nested_scales(scales, outer, float(state.offset), NESTED_BLOCK)
    n = state.shape.numel()
    return restored(unpacked(bytes(packed.flatten().tolist()), n), scales, code, BLOCK)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODES)
def test_four_bits(name: str, shape: tuple[int, int], double: bool) -> None:
    weights = gaussian(shape)
    packed, state = bnb.quantize_4bit(weights, compress_statistics=double, quant_type=name)
    assert allocations(packed, state) == four_bit_allocations(weights.numel(), double)
    theirs = bnb.dequantize_4bit(packed, state)
    assert theirs.shape == weights.shape
    back = torch.tensor(ours(packed, state, CODES[name])).view(shape)
    torch.testing.assert_close(theirs, back, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", CODES)
def test_the_types_that_products_are_made_in(name: str, dtype: Any) -> None:
    packed, state = bnb.quantize_4bit(
        gaussian((48, 128), dtype), compress_statistics=True, quant_type=name
    )
    theirs = bnb.dequantize_4bit(packed, state)
    assert theirs.dtype == dtype
    back = torch.tensor(ours(packed, state, CODES[name])).view(48, 128)
    torch.testing.assert_close(theirs.float(), back, rtol=EXACT[dtype], atol=1e-6)


@pytest.mark.parametrize("name", CODES)
def test_every_weight_goes_to_the_nearest_number(name: str) -> None:
    weights = gaussian((40, 130))
    packed, state = bnb.quantize_4bit(weights, quant_type=name)
    kept = quantize(weights.flatten().tolist(), CODES[name], BLOCK)
    assert kept.scales == pytest.approx(state.absmax.tolist())
    assert kept.weights == pytest.approx(ours(packed, state, CODES[name]), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits(shape: tuple[int, int]) -> None:
    weights = gaussian(shape, torch.float16)
    values, scales, _ = bnb.int8_vectorwise_quant(weights)
    assert (values.nbytes, scales.nbytes) == int8_allocations(*shape)
    indices = [value + INT8.origin for value in values.flatten().tolist()]
    back = restored(indices, scales.tolist(), INT8, shape[1])
    theirs = bnb.int8_vectorwise_dequant(values, scales)
    torch.testing.assert_close(theirs.flatten(), torch.tensor(back), rtol=1e-6, atol=1e-7)
    kept = quantize(weights.flatten().tolist(), INT8, shape[1])
    steps = [abs(a - b) for a, b in zip(kept.indices, indices, strict=True)]
    assert max(steps) <= 1  # in halves a weight between two numbers may go to either
    assert sum(steps) <= 0.01 * len(steps)


def test_the_numbers_are_the_library_s() -> None:
    for name, code in CODES.items():
        assert code.values == pytest.approx(bnb.get_4bit_type(name, device="cpu").tolist())
    assert DYNAMIC.values == pytest.approx(bnb.create_dynamic_map().tolist(), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
)
def test_the_error_of_gaussian_weights(name: str, double: bool) -> None:
    """Computed without a draw, against a million weights that the library takes there and back."""
    weights = gaussian((1024, 1024))
    packed, state = bnb.quantize_4bit(weights, compress_statistics=double, quant_type=name)
    lost = (weights - bnb.dequantize_4bit(packed, state)).square().mean()
    found = float((lost / weights.square().mean()).sqrt())
    nested = NESTED_BLOCK if double else None
    assert relative_error(CODES[name], BLOCK, nested) == pytest.approx(found, rel=0.005)


def test_the_error_of_gaussian_weights_in_eight_bits() -> None:
    weights = gaussian((256, 4096), torch.float16)
    values, scales, _ = bnb.int8_vectorwise_quant(weights)
    lost = (weights.float() - bnb.int8_vectorwise_dequant(values, scales)).square().mean()
    found = float((lost / weights.float().square().mean()).sqrt())
    assert relative_error(INT8, 4096) == pytest.approx(found, rel=0.005)


@pytest.mark.parametrize(
    ("quantize_to", "double"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)]
)
def test_a_loaded_model(tmp_path: Any, quantize_to: Quantize, double: bool) -> None:
    """What the engine holds of a matrix: the planned bytes, and weights as we round them."""
    spec = read_checkpoint(write_llama(tmp_path))
    settings = replace(SETTINGS, quantize=quantize_to, double_quant=double)
    plain = load_weights(spec, SETTINGS, lambda _: None)
    loaded = load_weights(spec, settings, lambda _: None)
    name = "model.layers.1.mlp.down_proj"
    stored = plain.get_submodule(name).weight
    planned = {one.name: one.allocations for one in loaded_tensors(spec, settings)}
    held = loaded.get_submodule(name).weight
    if quantize_to == "int8":
        scales = held.SCB
        assert (held.nbytes, scales.nbytes) == planned[f"{name}.weight"]
        back = bnb.int8_vectorwise_dequant(held.data, scales).flatten().tolist()
        kept = quantize(stored.flatten().tolist(), INT8, stored.shape[1])
        assert back == pytest.approx(kept.weights, abs=1.01 * max(kept.scales) / 127)
        return
    assert allocations(held, held.quant_state) == planned[f"{name}.weight"]
    back = bnb.dequantize_4bit(held.data, held.quant_state).flatten().tolist()
    kept = quantize(stored.flatten().tolist(), CODES[quantize_to], BLOCK)
    # A scale that is quantized once more is off by up to a part in 64 of what it is from the mean.
    apart = max(kept.scales) - min(kept.scales)
    assert back == pytest.approx(kept.weights, abs=apart / 64 if double else 1e-6)
