"""Matrices made into fewer bits while they load, a part at a time.

What a load holds beside its result is then one matrix as it was stored, not several in F32. The
bytes are those that bitsandbytes makes of the whole matrix: rows of LLM.int8 and blocks of NF4 know
nothing of one another.
"""

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit
from torch.nn import functional
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.quantizers.quantizers_utils import get_module_from_name

from loadmaster.engine.backends.transformers.scaled import spans
from loadmaster.plan.hf_weights import BLOCK, FP8_TILE, NESTED_BLOCK, QUANTIZED_PART

SUFFIX = "_scale"  # of what FP8 matrices that are made here call their scales
_FP8 = torch.float8_e4m3fn


class Fp8InParts(ConversionOps):  # type: ignore[misc]
    """Matrices, alone or stacked, in FP8 with a scale for each tile."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        made = {}
        for name, whole in _named(input_dict):
            halves = 2 if name.endswith("gate_up_proj") else 1
            codes = torch.empty(whole.shape, dtype=_FP8, device=whole.device)
            if whole.ndim == 2:
                scales = to_fp8(whole, codes)
            else:
                pairs = zip(whole, codes, strict=True)
                scales = torch.stack([_halves_to_fp8(*pair, halves) for pair in pairs])
            made[name], made[name + SUFFIX] = codes, scales
        return made


def _halves_to_fp8(matrix: Any, codes: Any, halves: int) -> Any:
    """Gate and up are one matrix, and have tiles of their own."""
    pairs = zip(matrix.chunk(halves), codes.chunk(halves), strict=True)
    return torch.cat([to_fp8(*pair) for pair in pairs])


def to_fp8(matrix: Any, codes: Any) -> Any:
    """Write a matrix in FP8, and give the scales of its tiles."""
    rows, columns = matrix.shape
    high, wide = FP8_TILE
    scales = torch.empty(n_tiles(rows, columns), dtype=torch.float32, device=matrix.device)
    for row, (start, stop) in enumerate(spans(rows, high)):
        part = matrix[start:stop].float()
        most = functional.pad(part, (0, -columns % wide)).abs_().unflatten(1, (-1, wide))
        most = most.amax(dim=(0, 2))
        scales[row] = torch.where(most > 0, most / torch.finfo(_FP8).max, 1.0)
        codes[start:stop] = part / scales[row].repeat_interleave(wide)[:columns]
    return scales


def n_tiles(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the table of scales."""
    return -(-rows // FP8_TILE[0]), -(-columns // FP8_TILE[1])


class Int8InParts(Bnb8bitQuantize):  # type: ignore[misc]
    """LLM.int8 on the CPU; for GPUs as bitsandbytes does it."""

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
        if not _all_on_cpu(input_dict):
            return dict(super().convert(input_dict, **given))
        return {name: _int8(value) for name, value in _named(input_dict)}


def _int8(matrix: Any) -> Any:
    rows, columns = matrix.shape
    codes = torch.empty(matrix.shape, dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)
    for start, stop in spans(rows, max(1, QUANTIZED_PART // columns)):
        part = matrix[start:stop].to(torch.float16)
        codes[start:stop], scales[start:stop], _ = int8_vectorwise_quant(part)
    return bnb.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )


class FourBitsInParts(Bnb4bitQuantize):  # type: ignore[misc]
    """NF4 and FP4 on the CPU; for GPUs as bitsandbytes does it."""

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
        if not _all_on_cpu(input_dict):
            return dict(super().convert(input_dict, **given))
        model = given["model"]
        made = {}
        for name, value in _named(input_dict):
            module, _ = get_module_from_name(model, name)
            made[name] = _four_bits(value, model.get_parameter_or_buffer(name), module)
        return made


def _four_bits(matrix: Any, like: Any, module: Any) -> Any:
    """`like` says which bits are wanted."""
    flat = matrix.reshape(-1)
    codes = torch.empty((-(-len(flat) // 2), 1), dtype=torch.uint8)
    scales = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32)
    for start, stop in spans(len(flat), QUANTIZED_PART):
        part, state = quantize_4bit(flat[start:stop], blocksize=BLOCK, quant_type=like.quant_type)
        codes[start // 2 : start // 2 + len(part)] = part
        scales[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax
    offset, nested = None, None
    if like.compress_statistics:
        offset = scales.mean()
        scales, nested = bnb.functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    module.quant_state = QuantState(
        absmax=scales,
        shape=matrix.shape,
        dtype=matrix.dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type=like.quant_type,
        offset=offset,
        state2=nested,
    )
    return bnb.nn.Params4bit(
        codes,
        quant_state=module.quant_state,
        blocksize=BLOCK,
        compress_statistics=like.compress_statistics,
        quant_type=like.quant_type,
        module=module,
        bnb_quantized=True,
    )


def _named(input_dict: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in input_dict.items():
        yield name, value[0] if isinstance(value, list) else value


def _all_on_cpu(input_dict: dict[str, Any]) -> bool:
    return all(value.device.type == "cpu" for _, value in _named(input_dict))
