"""What a load of the transformers engine holds for a while, beyond what it leaves. Pure.

Tensors come one after another. Each is read into RAM, whatever device it is for; cast, where the
file has another type; and quantized, on the CPU a part at a time (`making`).
"""

from collections.abc import Sequence

from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_weights import (
    COMPUTE_BYTES,
    FP8_TILE,
    QUANTIZED_PART,
    LoadedTensor,
)
from loadmaster.plan.types import TransformersSettings
from loadmaster.units import Bytes

# Bytes for each weight of a matrix that a GPU quantizes: the matrix as it came, and what is made on
# the way (`quantize_4bit`, `Int8Params._quantize`).
_ON_GPU = {"nf4": 3, "fp4": 3, "int8": 5, "fp8": 2}
# Bytes for each weight of a part, which torch's operations quantize in F32 (backends/default/ops.py
# of bitsandbytes); measured with what the heap keeps of them.
_PART_ON_CPU = {"nf4": 24, "fp4": 24, "int8": 24, "fp8": 0}
# Of FP8 a part is a row of tiles: as F32, its absolutes, their scales spread, and the quotients.
_FP8_PART = 4 * 4 * FP8_TILE[0]


def device_loading(model: CheckpointSpec, tensors: Sequence[LoadedTensor]) -> Bytes:
    """On a GPU: the largest matrix while it is quantized, or stacks of experts."""
    stacking = 2 * _stacking(tensors)  # as they came, and each kind stacked
    if model.stored is not None:
        return Bytes(stacking)
    quantizing = (
        t.n_elements * _ON_GPU.get(t.kind, 0) + _columns(t) * (t.kind == "fp8") * _FP8_PART
        for t in tensors
    )
    return Bytes(max(max(quantizing, default=0), stacking))


def host_loading(
    model: CheckpointSpec,
    settings: TransformersSettings,
    tensors: Sequence[LoadedTensor],
    n_gpus: int,
) -> Bytes:
    """In RAM: the largest of all tensors on its way there or to a GPU. `tensors` are those that
    stay."""
    own = {tensor.name for tensor in tensors}
    stays = max((_on_its_way(model, settings, tensor) for tensor in tensors), default=0)
    passes = 0
    if n_gpus:
        sent = [tensor for tensor in model.tensors if tensor.name not in own]
        largest = max((tensor.size_bytes for tensor in sent), default=0)
        cast = largest if model.dtype != settings.compute_type else 0
        # LLM.int8 is made on a GPU of a copy in RAM (`Bnb8bitQuantize`).
        widest = max((t.n_elements for t in sent if t.role == "linear"), default=0)
        passes = largest + max(cast, 4 * widest if settings.quantize == "int8" else 0)
    return Bytes(max(passes, stays, _stacking(tensors)))


def _on_its_way(model: CheckpointSpec, settings: TransformersSettings, tensor: LoadedTensor) -> int:
    """What is there of a tensor beside what stays of it. What stays as it was read is not there
    twice."""
    source = tensor.source
    if source is None or (model.stored is not None and tensor.is_quantized):
        return 0
    computed = tensor.n_elements * COMPUTE_BYTES[settings.compute_type]
    cast = source.dtype.lower() != settings.compute_type and source.is_float
    if not tensor.is_quantized:
        return source.size_bytes if cast else 0
    part = min(tensor.n_elements, QUANTIZED_PART) * _PART_ON_CPU.get(tensor.kind, 0)
    if tensor.kind == "fp8":
        part = _columns(tensor) * _FP8_PART
    return max(computed + part, computed + source.size_bytes if cast else 0)


def _columns(tensor: LoadedTensor) -> int:
    return tensor.source.shape[-1] if tensor.source else 0


def _stacking(tensors: Sequence[LoadedTensor]) -> int:
    """Experts come one by one and are stacked, then gate and up in one: the two of the largest, on
    the CPU once beside the one that stays (89 % of that at the most: docs/log.md)."""
    sums: dict[tuple[int | None, str], int] = {}
    for tensor in tensors:
        if tensor.role == "expert":
            key = (tensor.layer, tensor.module.rpartition(".")[2])
            sums[key] = sums.get(key, 0) + tensor.size_bytes
    return 2 * max(sums.values(), default=0)
