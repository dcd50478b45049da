"""Matrices of GPTQ and AWQ in the words they are packed in: a part is written out at a time, and
multiplied.

What is multiplied are the numbers that a checkpoint stands for: scale times integer, rounded once
to the type that is computed in. Nothing is repacked, so a load is copying, on every device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loadmaster.engine.backends.transformers.scaled import (
    HALVES,
    ExpertsInParts,
    Sized,
    parameter,
    product,
    tiles,
)
from loadmaster.errors import EngineRefusedError
from loadmaster.model.checkpoint import CheckpointSpec, Stored
from loadmaster.model.hf_packed import WORD, n_groups, packed_shape

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A matrix that is packed; its parameters are the file's tensors."""

    def __init__(
        self,
        linear: nn.Linear,
        tensors: Mapping[str, Sized],
        stored: Stored,
        *,
        in_order: bool,
        has_bias: bool,
    ) -> None:
        """`in_order`: groups are of neighbouring columns. Some checkpoints have a bias where their
        model has none.

        Raises:
            EngineRefusedError: tensors of these shapes do not make the matrix.
        """
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        _check_shape(tensors, stored, (self.out_features, self.in_features))
        for name, (dtype, shape) in tensors.items():
            self.register_parameter(name, parameter(shape, dtype))
        bias = linear.bias
        if bias is None and has_bias:
            bias = parameter((self.out_features,), linear.weight.dtype)
        self.register_parameter("bias", bias)
        self._stored, self._in_order = stored, in_order

    def forward(self, x: Any) -> Any:
        """The product, row by row of the matrix, a part at a time."""
        tensors = {name: getattr(self, name, None) for name in PARTS}
        return _packed_product(x, tensors, self._stored, self.bias, in_order=self._in_order)


class PackedExperts(ExpertsInParts):
    """Experts whose matrices are packed: of each kind of tensor, those of all are stacked."""

    def __init__(
        self,
        experts: Any,
        tables: Mapping[str, Mapping[str, Sized]],
        stored: Stored,
        *,
        in_order: bool,
    ) -> None:
        """`tables` are those of one gate, as `gate_up_proj`, and of one down matrix.

        Raises:
            EngineRefusedError: tensors of these shapes do not make the matrices.
        """
        super().__init__(experts)
        self._stored, self._in_order = stored, in_order
        for name, table in tables.items():
            whole = getattr(experts, name).shape
            _check_shape(table, stored, (whole[1] // HALVES[name], whole[2]))
            for part, (dtype, one) in table.items():
                stacked = (whole[0], HALVES[name] * one[0], *one[1:])
                self.register_parameter(f"{name}_{part}", parameter(stacked, dtype))

    def _product(self, name: str, expert: int, half: int, x: Any) -> Any:
        """With one matrix of an expert; gate and up are halves of one."""
        tensors = {}
        for part in PARTS:
            stacked = getattr(self, f"{name}_{part}", None)
            if stacked is not None:
                tensors[part] = stacked[expert].chunk(HALVES[name])[half]
        return _packed_product(x, tensors, self._stored, None, in_order=self._in_order)


def _check_shape(tensors: Mapping[str, Sized], stored: Stored, expected: tuple[int, int]) -> None:
    found = packed_shape(tensors["qweight"][1], stored)
    if found != expected:
        raise EngineRefusedError(
            f"a matrix of the checkpoint is {found[0]}×{found[1]}, its config makes it "
            f"{expected[0]}×{expected[1]}",
            hint="download it again; config.json and the weights are of different models",
        )


def shuffled(model: CheckpointSpec, weights: Mapping[str, Any]) -> frozenset[str]:
    """The modules whose columns share scales in another order than they are in (`act_order`).

    Raises:
        EngineRefusedError: a column is of a group that is not there.
    """
    found, stored = set(), model.stored
    packed = {tensor.module for tensor in model.tensors if tensor.name.endswith(".qweight")}
    for tensor in model.tensors:
        if stored is None or not tensor.name.endswith(".g_idx") or tensor.module not in packed:
            continue
        name = tensor.name if tensor.name in weights else tensor.name.removeprefix("model.")
        group_of = weights[name][...]
        columns = len(group_of)
        most = n_groups(columns, stored) - 1
        if not 0 <= int(group_of.min()) <= int(group_of.max()) <= most:
            raise EngineRefusedError(
                f"`{tensor.name}` names groups {int(group_of.min())}–{int(group_of.max())}, and "
                f"there are 0–{most}",
                hint="the file is damaged: download it again",
            )
        size = stored.block[1] if stored.block else columns
        if not torch.equal(group_of, torch.arange(columns, dtype=group_of.dtype) // size):
            found.add(tensor.module)
    return frozenset(found)


# ---- one product


def _packed_product(
    x: Any, tensors: Mapping[str, Any], stored: Stored, bias: Any, *, in_order: bool
) -> Any:
    rows, columns = packed_shape(tensors["qweight"].shape, stored)
    group_of = None if in_order else tensors["g_idx"].long()

    def part(start: int, stop: int, dtype: torch.dtype) -> Any:
        return _write_out(tensors, stored, group_of, (start, stop)).to(dtype)

    return product(x, rows, columns, part, bias, each=WORD // stored.bits)


def _write_out(
    tensors: Mapping[str, Any], stored: Stored, group_of: Any, rows: tuple[int, int]
) -> Any:
    """Some rows of the matrix, from a word's first on, as numbers in F32: a view whose columns lie
    one after another, as in the file."""
    own, n = slice(*rows), rows[1] - rows[0]
    words = slice(rows[0] * stored.bits // WORD, -(-rows[1] * stored.bits // WORD))
    if stored.method == "gptq":
        values = _unpack(tensors["qweight"][:, None, own], stored, 1).flatten(0, 1)
    else:
        values = _unpack(tensors["qweight"][:, words, None], stored, 2).flatten(1)
    zeros = tensors["qzeros"][:, words, None]
    zeros = zeros + _ones(stored.bits) if stored.zeros_less_one else zeros
    zeros = _unpack(zeros, stored, 2).flatten(1)[:, :n]
    scales = tensors["scales"][:, own].float()
    if group_of is not None:
        values = values.sub_(zeros[group_of]).float()
        return values.mul_(scales[group_of]).T
    tile = (1, stored.block[1] if stored.block else values.shape[0])
    for part, zero in tiles(values.T, zeros.T, 0, tile):
        part.sub_(zero)
    values = values.float()
    for part, scale in tiles(values.T, scales.T, 0, tile):
        part.mul_(scale)
    return values.T


def _unpack(words: Any, stored: Stored, dim: int) -> Any:
    """The integers of words, along a dimension that has room for them: lowest bits first. AWQ has
    the even ones in the lower half of a word, the odd ones in the upper."""
    places = torch.arange(WORD // stored.bits, dtype=torch.int32, device=words.device)
    if stored.method == "awq":
        places = (places >> 1) + (places & 1) * (len(places) // 2)
    places = (places * stored.bits).view([-1 if axis == dim else 1 for axis in range(3)])
    return (words >> places).bitwise_and_((1 << stored.bits) - 1)


def _ones(bits: int) -> int:
    """A word of ones. Words are added whole, as they were taken off: what overflows wraps."""
    return sum(1 << place for place in range(0, WORD, bits))
