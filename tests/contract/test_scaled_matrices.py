"""Matrices that keep their bits: what is written out is what was meant; parts are like wholes."""

from typing import Any

import pytest
import torch
from torch import nn

from loadmaster.engine.backends.transformers import making, scaled
from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.backends.transformers.filled import check_scales
from loadmaster.errors import EngineRefusedError

prepare()

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts in a small matrix."""
    for name in ("PART_ON_CPU", "PART_ON_GPU"):
        monkeypatch.setattr(scaled, name, 7 * 100)
    monkeypatch.setattr(making, "QUANTIZED_PART", 640)


def linear(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias).requires_grad_(False)


def filled(module: nn.Module, **tensors: Any) -> nn.Module:
    for name, value in tensors.items():
        getattr(module, name).data.copy_(value)
    return module


def spread(grid: torch.Tensor, rows: int, columns: int, tile: tuple[int, int]) -> torch.Tensor:
    """The factor of every weight, looked up one by one."""
    return torch.tensor(
        [[grid[r // tile[0], c // tile[1]] for c in range(columns)] for r in range(rows)]
    )


@pytest.mark.parametrize(
    ("shape", "grid", "block", "tile"),
    [
        ((50, 100), (1, 1), None, (50, 100)),
        ((50, 100), (50, 1), None, (1, 100)),
        ((50, 100), (4, 7), (16, 16), (16, 16)),  # tiles that are cut at both edges
        ((48, 96), (3, 6), None, (16, 16)),
        ((50, 96), (50, 3), (1, 32), (1, 32)),
    ],
)
@pytest.mark.usefixtures("small_parts")
def test_a_product_is_that_of_the_numbers(
    shape: tuple[int, int], grid: tuple[int, int], block: Any, tile: tuple[int, int]
) -> None:
    codes, scales = torch.randn(shape).to(FP8), torch.rand(grid) + 0.5
    plain = linear(*shape, bias=True)
    tensors = {"weight": (FP8, shape), "weight_scale": (torch.float32, grid)}
    module = scaled.ScaledLinear(plain, tensors, block)
    filled(module, weight=codes, weight_scale=scales)
    numbers = codes.float() * spread(scales, *shape, tile)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(module(x), x @ numbers.T + plain.bias)


@pytest.mark.usefixtures("small_parts")
def test_integers_with_zero_points() -> None:
    shape, groups = (40, 96), 3
    codes = torch.randint(-8, 8, shape)
    zeros = torch.randint(-8, 8, (shape[0], groups))
    scales = torch.rand(shape[0], groups).to(torch.bfloat16)
    numbers = (codes - spread(zeros, *shape, (1, 32))) * spread(scales.float(), *shape, (1, 32))
    x = torch.randn(2, shape[1])
    tensors: Any = {
        "weight_packed": (torch.int32, (40, 12)), "weight_scale": (torch.bfloat16, (40, 3)),
        "weight_zero_point": (torch.int32, (5, 3)),
    }  # fmt: skip
    packed = scaled.ScaledLinear(linear(*shape), tensors, (1, 32), bits=4)
    filled(
        packed, weight_packed=pack(codes), weight_scale=scales, weight_zero_point=pack(zeros.T).T
    )
    torch.testing.assert_close(packed(x), x @ numbers.T)
    tensors = {"weight": (torch.int8, shape), "weight_scale": (torch.bfloat16, (40, 3)),
               "weight_zero_point": (torch.int8, (40, 3))}  # fmt: skip
    plain = scaled.ScaledLinear(linear(*shape), tensors, (1, 32))
    filled(plain, weight=codes, weight_scale=scales, weight_zero_point=zeros)
    torch.testing.assert_close(plain(x), x @ numbers.T)


@pytest.mark.usefixtures("small_parts")
def test_columns_that_share_scales_in_another_order() -> None:
    codes, order = torch.randint(-8, 8, (40, 96)), torch.randint(0, 3, (96,))
    scales = torch.rand(40, 3)
    tensors: Any = {
        "weight_packed": (torch.int32, (40, 12)), "weight_scale": (torch.float32, (40, 3)),
        "weight_g_idx": (torch.int32, (96,)),
    }  # fmt: skip
    module = scaled.ScaledLinear(linear(40, 96), tensors, (1, 32), bits=4)
    filled(module, weight_packed=pack(codes), weight_scale=scales, weight_g_idx=order)
    x = torch.randn(2, 96)
    torch.testing.assert_close(module(x), x @ (codes * scales[:, order]).T)
    check_scales(module)
    filled(module, weight_g_idx=order + 1)
    with pytest.raises(EngineRefusedError, match="names a group that is not there: there are 3"):
        check_scales(module)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Eight to a word along the rows, the first in the lowest bits, one by one."""
    rows, columns = values.shape
    words = [
        [
            sum((int(values[r, c + k]) + 8) << (4 * k) for k in range(8))
            for c in range(0, columns, 8)
        ]
        for r in range(rows)
    ]
    signed = [[word - (1 << 32) if word >> 31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


def test_a_matrix_of_another_size_is_refused() -> None:
    tensors: Any = {"weight": (FP8, (8, 17)), "weight_scale": (torch.float32, (8, 1))}
    with pytest.raises(EngineRefusedError, match="8×17, its config makes it 8×16"):
        scaled.ScaledLinear(linear(8, 16), tensors, None)


# ---- made while loading


def test_fp8_is_as_near_as_it_can_be() -> None:
    matrix = torch.randn(200, 300)
    codes = torch.empty(matrix.shape, dtype=FP8)
    scales = making.to_fp8(matrix, codes)
    assert scales.shape == (2, 3)
    numbers = codes.float() * spread(scales, 200, 300, (128, 128))
    # Three bits behind the point, of the largest in a tile 448; below 2**-6 steps of 2**-9.
    step = torch.maximum(matrix.abs() / 16, spread(scales, 200, 300, (128, 128)) / 1024)
    assert ((numbers - matrix).abs() <= step * 1.001).all()
    assert (numbers.abs().amax() - matrix.abs().amax()).abs() < 1e-4


def test_zeros_stay_zeros_in_fp8() -> None:
    codes = torch.empty((4, 4), dtype=FP8)
    assert making.to_fp8(torch.zeros(4, 4), codes).tolist() == [[1.0]]
    assert not codes.float().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("small_parts")
def test_int8_in_parts_is_int8_of_the_whole(dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    matrix = torch.randn(37, 96).to(dtype)
    whole = bnb.nn.Int8Params(matrix.clone(), requires_grad=False).to("cpu")
    parts = making._int8(matrix)
    assert torch.equal(parts.CB, whole.CB)
    assert torch.equal(parts.SCB, whole.SCB)
    assert parts.data.data_ptr() == parts.CB.data_ptr()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(40, 96), (3, 7), (33, 65)])
@pytest.mark.usefixtures("small_parts")
def test_four_bits_in_parts_are_those_of_the_whole(
    kind: str, nested: bool, shape: tuple[int, int]
) -> None:
    import bitsandbytes as bnb

    matrix = torch.randn(shape).to(torch.bfloat16)
    like = bnb.nn.Params4bit(
        matrix.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    parts = making._four_bits(matrix, like, nn.Module())
    whole = like.to("cpu")
    assert torch.equal(parts.data, whole.data)
    assert parts.quant_state == whole.quant_state
    assert (parts.bnb_quantized, parts.quant_type, parts.compress_statistics) == (
        True,
        kind,
        nested,
    )
    assert torch.equal(
        bnb.functional.dequantize_4bit(parts.data, parts.quant_state),
        bnb.functional.dequantize_4bit(whole.data, whole.quant_state),
    )
