"""Whether a load has filled the model: every tensor in its shape, every scale that is read."""

import math
from typing import Any

import torch

from loadmaster.engine.backends.transformers.kept import TYPES
from loadmaster.errors import EngineRefusedError
from loadmaster.plan.hf_weights import NESTED_BLOCK

_BLOCKS = range(32, 4097)  # of bitsandbytes' kernels


def check_found(found: Any) -> None:
    """transformers fills what is missing with random numbers and goes on; this does not.

    Raises:
        EngineRefusedError: something is missing, or has another shape.
    """
    for words, names in (
        ("misses", sorted(found["missing_keys"])),
        ("has another shape of", sorted(str(row[0]) for row in found["mismatched_keys"])),
    ):
        if names:
            raise EngineRefusedError(
                f"the checkpoint {words} {len(names)} of the tensors that its config asks for: "
                f"`{names[0]}`",
                hint="download it again; config.json and the weights are of different models",
            )


def check_scales(model: Any) -> None:
    """bitsandbytes reads as many scales as a matrix needs, and looks at none of their sizes.
    Columns of others may name the groups that they share scales with.

    Raises:
        EngineRefusedError: there are fewer, or others.
    """
    for name, module in model.named_modules():
        _check_groups(name, module)
        weight = getattr(module, "weight", None)
        state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
        if state is not None:
            fit = _fits(weight, state, (module.out_features, module.in_features))
        else:
            fit = scales is None or tuple(scales.shape) == (module.out_features,)
        if not fit:
            raise EngineRefusedError(
                f"the scales of `{name}` are not those of a matrix of its size",
                hint="a file is damaged or of another model: download the checkpoint again",
            )


def _check_groups(name: str, module: Any) -> None:
    group_of = getattr(module, "weight_g_idx", None)
    if group_of is None:
        return
    n_groups = module.weight_scale.shape[-1]
    if not 0 <= int(group_of.min()) <= int(group_of.max()) < n_groups:
        raise EngineRefusedError(
            f"`{name}.weight_g_idx` names a group that is not there: there are {n_groups}",
            hint="the file is damaged: download it again",
        )


def _fits(weight: Any, state: Any, shape: tuple[int, int]) -> bool:
    """Whether a matrix in four bits has what is read of it, by its own description."""
    n, nested = math.prod(shape), state.state2
    if state.shape is None or tuple(state.shape) != shape or state.dtype not in TYPES.values():
        return False
    if state.blocksize not in _BLOCKS or 2 * weight.nbytes < n:
        return False
    n_scales = -(-n // state.blocksize)
    found = [(state.code, 16, torch.float32)]
    if nested is None:
        found += [(state.absmax, n_scales, torch.float32)]
    else:
        if nested.blocksize != NESTED_BLOCK:
            return False
        found += [(state.absmax, n_scales, torch.uint8), (nested.code, 256, torch.float32),
                  (nested.absmax, -(-n_scales // NESTED_BLOCK), torch.float32)]  # fmt: skip
    return all(one.numel() == count and one.dtype is dtype for one, count, dtype in found)
