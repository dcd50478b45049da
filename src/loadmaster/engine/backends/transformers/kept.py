"""How a layer's keys or values are kept: plain, or in groups of 8 or 4 bits with a scale each.

Tensors of both have the shape (slot, head, cell, …). What is to be put is coded first: what a chunk
sees of itself is then what later tokens see of it, however a prompt was cut.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from loadmaster.errors import EngineRefusedError
from loadmaster.plan.hf_caches import CACHE_TYPES, GROUPED_BITS, group_of

TYPES: Mapping[str, Any] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Coded = tuple[Any, ...]  # one for each tensor that keeps a part
_LARGEST_SCALE = 65504.0  # of F16
_LEAST_SCALE = 1e-30  # what a scale that F16 makes 0 is divided by; its elements are read as 0


class Kept(Protocol):
    """Cells of keys, or of values."""

    tensors: tuple[Any, ...]

    def code(self, rows: Any) -> Coded:
        """Rows (…, width) as they are kept."""
        ...

    def decode(self, coded: Coded) -> Any:
        """Rows again."""
        ...


def put(kept: Kept, at: tuple[Any, ...], coded: Coded) -> None:
    """Write what is coded to the cells at an index."""
    for tensor, part in zip(kept.tensors, coded, strict=True):
        tensor[at] = part.to(tensor.dtype)


def take(kept: Kept, at: tuple[Any, ...]) -> Any:
    """The rows at an index."""
    return kept.decode(tuple(tensor[at] for tensor in kept.tensors))


def new_kept(kind: str, shape: tuple[int, int, int, int], like: Any) -> Kept:
    """Cells of a type; written at once: pages that nobody has touched would not count yet, and
    what attention masks out must be a number."""
    with torch.inference_mode():
        if kind in TYPES:
            return PlainCells(_zeros(shape, TYPES[kind], like))
        return GroupedCells(GROUPED_BITS[kind], shape, like)


def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    return torch.empty(shape, dtype=dtype, device=like.device).zero_()


def check_type(name: str) -> str:
    """Raises EngineRefusedError: these caches have no such type."""
    if name not in CACHE_TYPES:
        raise EngineRefusedError(
            f"the transformers engine has no KV cache of type {name}",
            hint=f"take one of {', '.join(CACHE_TYPES)}: `--kv q8_0`",
        )
    return name


class PlainCells:
    """Elements in a type of torch's; a step reads its own as they are."""

    def __init__(self, values: Any) -> None:
        self.tensors = (values,)

    def code(self, rows: Any) -> Coded:
        return (rows,)

    def decode(self, coded: Coded) -> Any:
        return coded[0]


class GroupedCells:
    """Whole numbers and an F16 scale for each group, by the rules of ggml's q8_0 and q4_0."""

    def __init__(self, n_bits: int, shape: tuple[int, int, int, int], like: Any) -> None:
        *cells, width = shape
        self._n_bits, self._group, self._dtype = n_bits, group_of(width), like.dtype
        self.tensors = (
            _zeros((*cells, width * n_bits // 8), torch.int8 if n_bits == 8 else torch.uint8, like),
            _zeros((*cells, width // self._group), torch.float16, like),
        )

    def code(self, rows: Any) -> Coded:
        groups = rows.float().unflatten(-1, (-1, self._group))
        if self._n_bits == 8:
            scales = groups.abs().amax(-1) / 127
        else:  # the largest becomes -8: there is one more number below zero than above
            largest = groups.abs().argmax(-1, keepdim=True)
            scales = groups.gather(-1, largest)[..., 0] / -8
        scales = scales.clamp_(-_LARGEST_SCALE, _LARGEST_SCALE).half()
        divisors = scales.float().masked_fill_(scales == 0, _LEAST_SCALE)
        numbers = (groups / divisors[..., None]).round_()
        if self._n_bits == 8:
            return numbers.clamp_(-127, 127).to(torch.int8).flatten(-2), scales
        numbers = numbers.add_(8).clamp_(0, 15).to(torch.uint8).flatten(-2)
        low, high = numbers.chunk(2, -1)  # in halves of a head: both are read in one piece
        return low | high << 4, scales

    def decode(self, coded: Coded) -> Any:
        numbers, scales = coded
        if self._n_bits == 8:
            rows = numbers.to(self._dtype)
        else:
            half = numbers.shape[-1]
            shape = (*numbers.shape[:-1], 2 * half)
            rows = torch.empty(shape, dtype=self._dtype, device=numbers.device)
            rows[..., :half] = numbers & 15
            rows[..., half:] = numbers >> 4
            rows -= 8
        rows = rows.contiguous()
        rows.unflatten(-1, (-1, self._group)).mul_(scales.to(self._dtype)[..., None])
        return rows
