"""What the transformers engine holds beside the weights: caches, activations, loading, allocator.

Pure. Caches are exact: one tensor for K and one for V of each layer, made whole when the model is
opened. Activations are a bound: what the operators of the widest layer hold at once.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import LayerKind, LayerSpec
from loadmaster.plan.hf_weights import BLOCK, COMPUTE_BYTES, LoadedTensor
from loadmaster.plan.types import DRAFT_STEP_TOKENS, TransformersSettings
from loadmaster.units import MIB, Bytes, align

CACHE_TYPES = ("bf16", "f16", "f32")
_F32 = 4

# torch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.h): sizes are rounded to 512 bytes;
# up to 1 MiB they are cut from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, and above
# that they get a segment of their own, rounded to 2 MiB.
ROUNDING_BYTES = 512
SMALL_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB
MIDDLE_BYTES = 10 * MIB
MIDDLE_SEGMENT_BYTES = 20 * MIB
LARGE_STEP_BYTES = 2 * MIB


# ---- caches


def cells_of(layer: LayerSpec, window: int, settings: TransformersSettings) -> int:
    """Cells that one sequence has in a layer; one that slides keeps its window only."""
    n_ctx = settings.n_ctx // settings.n_seq_max
    slides = layer.kind is LayerKind.SWA and window
    return min(n_ctx, window) if slides else n_ctx


def layer_cache(layer: LayerSpec, window: int, settings: TransformersSettings) -> tuple[int, int]:
    """Bytes of one layer's K and of its V, for all sequences."""
    cells = settings.n_seq_max * cells_of(layer, window, settings)
    return (
        cells * layer.k_width * COMPUTE_BYTES[settings.type_k],
        cells * layer.v_width * COMPUTE_BYTES[settings.type_v],
    )


def cache_allocations(
    model: CheckpointSpec, layers: Iterable[int], settings: TransformersSettings
) -> list[int]:
    """The cache tensors of these layers."""
    return [
        size
        for index in layers
        for size in layer_cache(model.layers[index], model.n_swa, settings)
        if size
    ]


# ---- activations


def activation_bytes(
    model: CheckpointSpec, tensors: Sequence[LoadedTensor], settings: TransformersSettings
) -> Bytes:
    """A bound for one forward pass on a device that has these tensors.

    The residual stream and its norm in F32, then the larger of attention and feed-forward, the
    widest matrix while it is dequantized, and the logits of every sequence where the output is.
    """
    c = COMPUTE_BYTES[settings.compute_type]
    tokens = max(settings.n_seq_max, min(settings.n_ubatch, settings.n_ctx))
    stream = tokens * model.n_embd * (2 * c + 2 * _F32)
    inside = 0
    if any(tensor.layer is not None for tensor in tensors):
        inside = max(_attention(model, tokens, settings), _feed_forward(model, tokens, settings))
    logits = 0
    if any(tensor.role == "output" for tensor in tensors) or (
        model.tied_output and any(tensor.role == "embedding" for tensor in tensors)
    ):
        logits = _n_outputs(settings) * model.n_vocab * (c + 2 * _F32)
    return Bytes(stream + max(inside + _dequantized(tensors, c), logits))


def _n_outputs(settings: TransformersSettings) -> int:
    """Rows of logits of a step: one of every sequence, or with drafts one of every token."""
    drafts = min(DRAFT_STEP_TOKENS, settings.n_ubatch) if settings.n_draft else 0
    return max(settings.n_seq_max, drafts)


def _attention(model: CheckpointSpec, tokens: int, settings: TransformersSettings) -> int:
    """Q, K, V before and after positions; the mask; K and V in the type that is computed in, where
    the cache has another; scores, where products are spelled out."""
    c, n_ctx = COMPUTE_BYTES[settings.compute_type], settings.n_ctx // settings.n_seq_max
    layer = max(model.layers, key=lambda one: one.n_head * one.k_width)
    head_dim = layer.k_width // max(1, layer.n_head_kv)
    q_width = layer.n_head * head_dim
    rows = tokens * (4 * q_width + 3 * (layer.k_width + layer.v_width)) * c
    cast = 0
    if {settings.type_k, settings.type_v} != {settings.compute_type}:
        cast = settings.n_ctx * (layer.k_width + layer.v_width) * c
    if model.n_swa:  # the window before a chunk, and the chunk, in one piece
        cast += (min(n_ctx, model.n_swa) + tokens) * (layer.k_width + layer.v_width) * c
    mask = tokens * n_ctx * (1 + c)
    spelled = settings.attention == "eager" or model.softcap
    scores = layer.n_head * tokens * n_ctx * (2 * c + 2 * _F32) if spelled else 0
    return rows + cast + mask + scores


def _feed_forward(model: CheckpointSpec, tokens: int, settings: TransformersSettings) -> int:
    """Gate, up, the activation of one and the product of both; of experts also gathered rows."""
    c = COMPUTE_BYTES[settings.compute_type]
    dense = tokens * (4 * model.n_ff + model.n_embd) * c
    if not model.n_expert:
        return dense
    used = tokens * max(1, model.n_expert_used)
    routed = used * (4 * model.n_ff_expert + 3 * model.n_embd) * c
    return max(dense, routed + tokens * model.n_expert * (c + _F32))


def _dequantized(tensors: Iterable[LoadedTensor], c: int) -> int:
    """The widest quantized matrix, written out for many tokens, and its scales."""
    widest = max((t.n_elements for t in tensors if t.is_quantized), default=0)
    return widest * c + -(-widest // BLOCK) * _F32


# ---- loading

# Bytes for each element of the matrix that is being quantized, on its device: the matrix as it
# came, and what is made on the way (`quantize_4bit`, `Int8Params._quantize`, `Fp8Quantize`).
_TRANSIENT = {"nf4": 3, "fp4": 3, "int8": 5, "fp8": 15}
# The same on the CPU, where torch's own operations do it, in F32 (backends/default/ops.py). Of int8
# 13 are in use at once; the heap keeps more of what was freed (37 measured, a random Llama).
_TRANSIENT_ON_CPU = {"nf4": 16, "fp4": 24, "int8": 40, "fp8": 15}


def loading_bytes(
    model: CheckpointSpec, tensors: Sequence[LoadedTensor], *, on_cpu: bool = False
) -> Bytes:
    """What loading holds on a device beyond what it leaves there."""
    each = _TRANSIENT_ON_CPU if on_cpu else _TRANSIENT
    quantizing = max((t.n_elements * each.get(t.kind, 0) for t in tensors), default=0)
    return Bytes(max(quantizing, _stacking(model, tensors)))


def _stacking(model: CheckpointSpec, tensors: Sequence[LoadedTensor]) -> int:
    """Experts come one by one and are stacked: the largest stack is there twice."""
    sums: dict[tuple[int | None, str], int] = {}
    for tensor in tensors:
        if tensor.role == "expert":
            key = (tensor.layer, tensor.module.rpartition(".")[2])
            sums[key] = sums.get(key, 0) + tensor.size_bytes
    # Gate and up are one stack in the end.
    return 2 * 2 * max(sums.values(), default=0)


# ---- the allocator


def reserved_bytes(allocations: Iterable[int], warmed_bytes: int = 0) -> Bytes:
    """What torch's CUDA allocator takes from the driver for these tensors, made in this order.

    `warmed_bytes` were asked for in one piece and given back before: the engine does so with what
    it expects the weights to take, and cuts the weights from it.
    """
    small, large = _Pool(), _Pool()
    if warmed_bytes > MIDDLE_BYTES:
        large.add(align(warmed_bytes, LARGE_STEP_BYTES))
    for size in allocations:
        rounded = max(ROUNDING_BYTES, align(size, ROUNDING_BYTES))
        if rounded <= SMALL_BYTES:
            small.take(rounded, SMALL_SEGMENT_BYTES, least=ROUNDING_BYTES)
        elif rounded < MIDDLE_BYTES:
            large.take(rounded, MIDDLE_SEGMENT_BYTES, least=SMALL_BYTES + 1)
        else:
            large.take(rounded, align(rounded, LARGE_STEP_BYTES), least=SMALL_BYTES + 1)
    return Bytes(small.reserved + large.reserved)


class _Pool:
    """Free blocks by size; a block is cut where enough is left over for another tensor."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: list[int] = []

    def add(self, size: int) -> None:
        self.reserved += size
        insort(self._free, size)

    def take(self, size: int, segment: int, *, least: int) -> None:
        """The smallest free block that is large enough, or a new segment."""
        index = bisect_left(self._free, size)
        if index < len(self._free):
            block = self._free.pop(index)
        else:
            block = segment
            self.reserved += segment
        if block - size >= least:
            insort(self._free, block - size)
