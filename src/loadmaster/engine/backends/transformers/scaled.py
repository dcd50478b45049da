"""Matrices that keep the bits they are stored in: a part is written out at a time, and multiplied.

Nothing grows: FP8 weights take a byte each on every device, whether or not its kernels know FP8.
What is multiplied are the numbers that a checkpoint stands for, in the type that is computed in;
activations are not quantized.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loadmaster.errors import EngineRefusedError
from loadmaster.plan.hf_weights import PART_ON_CPU, PART_ON_GPU

# Types of the format, as torch has them.
DTYPES: Mapping[str, Any] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Tile = tuple[int, int]  # rows and columns that share a scale
SCALES = ("weight_scale_inv", "weight_scale")
Sized = tuple[torch.dtype, tuple[int, ...]]
HALVES = {"gate_up_proj": 2, "down_proj": 1}  # matrices of an expert that are one parameter
_PER_WORD = 32  # bits of what small integers are packed into


class ScaledLinear(nn.Module):  # type: ignore[misc]
    """A matrix of bytes (FP8 or INT8), or of small integers packed along its rows, and its scales.

    Its parameters have the names, types and shapes of the file's tensors, so that loading is
    copying. `bits` is 8 for bytes.
    """

    def __init__(
        self,
        linear: nn.Linear,
        tensors: Mapping[str, Sized],
        block: Tile | None,
        bits: int = 8,
    ) -> None:
        """Raises EngineRefusedError: tensors of these shapes do not make the matrix."""
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        for name, (dtype, shape) in tensors.items():
            self.register_parameter(name, parameter(shape, dtype))
        self.register_parameter("bias", linear.bias)
        self._scale = next(name for name in SCALES if name in tensors)
        self._packed = bits if "weight_packed" in tensors else 0
        self._tile = _tile(
            (self.out_features, self.in_features), _grid(tensors[self._scale][1]), block
        )
        self._check(tensors)

    def _check(self, tensors: Mapping[str, Sized]) -> None:
        rows, columns = self.out_features, self.in_features
        if self._packed:
            columns = -(-columns * self._packed // _PER_WORD)
        shape = tensors["weight_packed" if self._packed else "weight"][1]
        if shape != (rows, columns):
            raise EngineRefusedError(
                f"a matrix of the checkpoint is {'×'.join(map(str, shape)) or 'a scalar'}, its "
                f"config makes it {rows}×{columns}",
                hint="download it again; config.json and the weights are of different models",
            )

    def forward(self, x: Any) -> Any:
        """The product, row by row of the matrix, a part at a time."""
        return product(x, self.out_features, self.in_features, self._part, self.bias)

    def _part(self, start: int, stop: int, dtype: torch.dtype) -> Any:
        """Some rows of the matrix as numbers."""
        values = self._values(start, stop).float()
        scales = _as_grid(getattr(self, self._scale))
        column_of = getattr(self, "weight_g_idx", None)
        if column_of is not None:  # columns share scales in another order than they are in
            return values.mul_(scales[start:stop, column_of.long()]).to(dtype)
        return _scale_rows(values, scales, start, self._tile).to(dtype)

    def _values(self, start: int, stop: int) -> Any:
        """Some rows as they are stored, zero points taken off."""
        zeros = getattr(self, "weight_zero_point", None)
        if not self._packed:
            values = self.weight[start:stop]
            return values if zeros is None else _off(values, zeros, start, self._tile)
        values = unpack(self.weight_packed[start:stop], self._packed)[:, : self.in_features]
        if zeros is None:
            return values
        words = _PER_WORD // self._packed  # packed along the columns: whole words of rows
        first = start // words
        grid = unpack(zeros[first : -(-stop // words)].T.contiguous(), self._packed).T
        return _off(values, grid[start - first * words :], 0, (1, self._tile[1]))


class ExpertsInParts(nn.Module):  # type: ignore[misc]
    """The experts of a layer, stacked as transformers stacks them."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts.down_proj.shape[0], experts.act_fn

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        """Each expert that was chosen, with the rows that chose it."""
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            rows, place = torch.where(top_k_index == expert)
            x = hidden_states[rows]
            gate, up = (self._product("gate_up_proj", expert, half, x) for half in (0, 1))
            made = self._product("down_proj", expert, 0, self.act_fn(gate) * up)
            made = made * top_k_weights[rows, place, None]
            out.index_add_(0, rows, made.to(out.dtype))
        return out

    @abstractmethod
    def _product(self, name: str, expert: int, half: int, x: Any) -> Any:
        """With one matrix of an expert; gate and up are halves of one."""


class ScaledExperts(ExpertsInParts):
    """Experts whose matrices are in FP8."""

    def __init__(self, experts: Any, suffix: str, scales: Mapping[str, Sized], block: Tile) -> None:
        """`scales` are those of one gate and of one down matrix, called so with the suffix."""
        super().__init__(experts)
        self._suffix, self._block = suffix, block
        for name, (dtype, one) in scales.items():
            shape = tuple(getattr(experts, name).shape)
            self.register_parameter(name, parameter(shape, torch.float8_e4m3fn))
            stacked = (shape[0], HALVES[name] * one[0], *one[1:])
            self.register_parameter(name + suffix, parameter(stacked, dtype))

    def _product(self, name: str, expert: int, half: int, x: Any) -> Any:
        """With one matrix of an expert; gate and up are halves of one."""
        matrix = getattr(self, name)[expert].chunk(HALVES[name])[half]
        scales = _as_grid(getattr(self, name + self._suffix)[expert].chunk(HALVES[name])[half])
        tile = _tile(tuple(matrix.shape), tuple(scales.shape), self._block)

        def part(start: int, stop: int, dtype: torch.dtype) -> Any:
            return _scale_rows(matrix[start:stop].float(), scales, start, tile).to(dtype)

        return product(x, matrix.shape[0], matrix.shape[1], part, None)


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def product(
    x: Any,
    rows: int,
    columns: int,
    part: Callable[[int, int, torch.dtype], Any],
    bias: Any,
    *,
    each: int = 1,
) -> Any:
    """With a matrix of which so many rows are written out at a time, a multiple of `each`."""
    step = max(1, (PART_ON_CPU if x.device.type == "cpu" else PART_ON_GPU) // columns)
    step = max(each, step - step % each)
    if step >= rows:
        return functional.linear(x, part(0, rows, x.dtype), bias)
    out = x.new_empty((*x.shape[:-1], rows))
    for start, stop in spans(rows, step):
        out[..., start:stop] = functional.linear(x, part(start, stop, x.dtype))
    return out if bias is None else out.add_(bias)


def spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    """`n` things, `step` at a time."""
    for start in range(0, n, step):
        yield start, min(n, start + step)


# ---- scales


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """One scale, one for each row, or a table of them."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return (shape[0] if shape else 1), 1


def _as_grid(scales: Any) -> Any:
    return scales.view(_grid(tuple(scales.shape)))


def _tile(shape: tuple[int, int], grid: tuple[int, int], block: Tile | None) -> Tile:
    """How many rows and columns share a scale: the shapes tell, but for tiles cut at an edge.

    Raises:
        EngineRefusedError: that many scales are not for this matrix.
    """
    sizes = []
    for axis in (0, 1):
        n, scales = shape[axis], grid[axis]
        known = block[axis] if block is not None and scales > 1 else -(-n // max(1, scales))
        size = 1 if scales == n else known
        if -(-n // size) != scales:
            raise EngineRefusedError(
                f"a matrix of {shape[0]}×{shape[1]} has {grid[0]}×{grid[1]} scales",
                hint="the checkpoint is damaged or its config is of another: download it again",
            )
        sizes.append(size)
    return sizes[0], sizes[1]


def _scale_rows(values: Any, scales: Any, start: int, tile: Tile) -> Any:
    """Multiply rows in F32, of which `start` is the first, by their scales, in place: the product
    is rounded once, when it is cast."""
    for part, factor in tiles(values, scales, start, tile):
        part.mul_(factor)
    return values


def _off(values: Any, zeros: Any, start: int, tile: Tile) -> Any:
    """Rows of small integers, less what stands for zero."""
    values = values.to(torch.int16)  # the difference of two bytes
    for part, zero in tiles(values, zeros.to(torch.int16), start, tile):
        part.sub_(zero)
    return values


def tiles(values: Any, grid: Any, start: int, tile: Tile) -> Iterator[tuple[Any, Any]]:
    """Views of rows, and what the grid has for them: whole tiles, then what is left of one."""
    rows = torch.arange(start, start + values.shape[0], device=values.device) // tile[0]
    own = grid[rows]
    columns = values.shape[1]
    if own.shape[1] == 1:
        yield values, own
        return
    whole = columns // tile[1]
    yield values[:, : whole * tile[1]].unflatten(1, (whole, tile[1])), own[:, :whole, None]
    if columns % tile[1]:
        yield values[:, whole * tile[1] :], own[:, whole:]


def unpack(words: Any, bits: int) -> Any:
    """Small integers of 32-bit words, the first in the lowest bits; each was stored plus half."""
    places = torch.arange(0, _PER_WORD, bits, dtype=torch.int32, device=words.device)
    values = (words[..., None] >> places).bitwise_and_((1 << bits) - 1)
    return values.flatten(-2).sub_(1 << (bits - 1))
