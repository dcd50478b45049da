"""What the transformers engine holds beside weights and caches: activations, and the allocator.

Pure. Activations are a bound: what the operators of the widest layer hold at once.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from loadmaster.model.checkpoint import CheckpointSpec, Stored
from loadmaster.model.hf_packed import packed_shape
from loadmaster.plan.hf_caches import writing_bytes
from loadmaster.plan.hf_weights import (
    BLOCK,
    COMPUTE_BYTES,
    LoadedTensor,
    part_elements,
    written_out_in_parts,
)
from loadmaster.plan.types import CPU, DRAFT_STEP_TOKENS, TransformersSettings
from loadmaster.units import MIB, Bytes, align

_F32 = 4
# Of LLM.int8, for each number that goes into a product or comes out of it, whichever are more: 12
# bytes as a sum of 32 bits and twice in F32 while both scales are put to it (`int8_mm_dequant` of
# bitsandbytes); torch's product of whole numbers takes the rest (17.6 to 18.1 measured, 512 tokens,
# 1,024 to 5,632 numbers, beside one byte for each that goes in).
INT8_BYTES = 18

# Of one row of logits while a token is drawn from it, for each entry of the vocabulary: sorted
# values, their tokens, and what `typical_p` makes of them (46.6 measured, 33 without it).
DRAWING_BYTES = 48

# torch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.h): sizes are rounded to 512 bytes;
# up to 1 MiB they are cut from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, and above
# that they get a segment of their own, rounded to 2 MiB.
ROUNDING_BYTES = 512
SMALL_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB
MIDDLE_BYTES = 10 * MIB
MIDDLE_SEGMENT_BYTES = 20 * MIB
LARGE_STEP_BYTES = 2 * MIB


# ---- activations


def activation_bytes(
    model: CheckpointSpec,
    tensors: Sequence[LoadedTensor],
    settings: TransformersSettings,
    sent_bytes: int = 0,
) -> Bytes:
    """A bound for one forward pass on a device that has these tensors, and is sent so many bytes of
    others at a time.

    The residual stream and its norm in F32, then the larger of attention and feed-forward, the
    widest matrix while it is dequantized, and the logits of every sequence where the output is, or
    what is pooled.
    """
    c = COMPUTE_BYTES[settings.compute_type]
    tokens = max(settings.n_seq_max, min(settings.n_ubatch, settings.n_ctx))
    stream = tokens * model.n_embd * (2 * c + 2 * _F32)
    beside = max(sent_bytes, _beside_a_matrix(model, tensors, settings, tokens))
    inside = beside
    if any(tensor.layer is not None for tensor in tensors):
        inside = _in_a_layer(model, tensors, settings, tokens, beside)
    outputs = 0
    if settings.pooling is not None:
        outputs = tokens * model.n_embd * (c + _F32)
    elif any(tensor.role == "output" for tensor in tensors) or (
        model.tied_output and any(tensor.role == "embedding" for tensor in tensors)
    ):
        outputs = n_outputs(settings) * model.n_vocab * (c + 2 * _F32)
    return Bytes(stream + max(inside, outputs))


def sampling_bytes(model: CheckpointSpec, settings: TransformersSettings) -> Bytes:
    """In RAM, where logits are made on a GPU: a copy of every row in F32, and what drawing from one
    of them holds. Greedy answers without a schema take none of it."""
    if settings.pooling is not None:
        return Bytes(0)
    return Bytes(model.n_vocab * (n_outputs(settings) * _F32 + DRAWING_BYTES))


def n_outputs(settings: TransformersSettings) -> int:
    """Rows of logits of a step: one of every sequence, or with drafts one of every token."""
    drafts = min(DRAFT_STEP_TOKENS, settings.n_ubatch) if settings.n_draft else 0
    return max(settings.n_seq_max, drafts)


def _in_a_layer(
    model: CheckpointSpec,
    tensors: Iterable[LoadedTensor],
    settings: TransformersSettings,
    tokens: int,
    beside: int,
) -> int:
    """The larger of attention and feed-forward, with what a product makes beside its result. Where
    that is as large as activations are, it matters that half of them are there by then."""
    attention = _attention(model, tokens, settings)
    whole = _feed_forward(model, tokens, settings)
    if not any(tensor.kind == "int8" for tensor in tensors):
        return max(attention, whole) + beside
    return max(whole, max(attention, _feed_forward(model, tokens, settings, n_held=2)) + beside)


def _attention(model: CheckpointSpec, tokens: int, settings: TransformersSettings) -> int:
    """Q, K, V before and after positions; the mask; K and V in the type that is computed in, where
    the cache has another; scores, where products are spelled out."""
    c, pools = COMPUTE_BYTES[settings.compute_type], settings.pooling is not None
    n_ctx = settings.n_ubatch if pools else settings.n_ctx // settings.n_seq_max
    layer = max(model.layers, key=lambda one: one.n_head * one.k_width)
    head_dim = layer.k_width // max(1, layer.n_head_kv)
    q_width = layer.n_head * head_dim
    rows = tokens * (4 * q_width + 3 * (layer.k_width + layer.v_width)) * c
    cast = 0
    if {settings.type_k, settings.type_v} != {settings.compute_type} and not pools:
        cast = settings.n_ctx * (layer.k_width + layer.v_width) * c
    if model.n_swa:  # the window before a chunk, and the chunk, in one piece
        cast += (min(n_ctx, model.n_swa) + tokens) * (layer.k_width + layer.v_width) * c
    cast += writing_bytes(layer, tokens, settings)
    # On a GPU it is written out in numbers, and once more in rows that its kernels can read
    # (`pad_bias` of aten/src/ATen/native/transformers/attention.cpp).
    on_gpu = any(device != CPU for _, device in settings.device_map)
    mask = tokens * n_ctx * (1 + (2 * c if on_gpu else c))
    spelled = settings.attention == "eager" or model.softcap
    scores = layer.n_head * tokens * n_ctx * (2 * c + 2 * _F32) if spelled else 0
    return rows + cast + mask + scores


def _feed_forward(
    model: CheckpointSpec, tokens: int, settings: TransformersSettings, n_held: int = 4
) -> int:
    """Gate, up, the activation of one and the product of both; of experts also gathered rows."""
    c = COMPUTE_BYTES[settings.compute_type]
    dense = tokens * (n_held * model.n_ff + model.n_embd) * c
    if not model.n_expert:
        return dense
    used = tokens * max(1, model.n_expert_used)
    routed = used * (n_held * model.n_ff_expert + 3 * model.n_embd) * c
    return max(dense, routed + tokens * model.n_expert * (c + _F32))


def _beside_a_matrix(
    model: CheckpointSpec,
    tensors: Iterable[LoadedTensor],
    settings: TransformersSettings,
    tokens: int,
) -> int:
    """What a product with a quantized matrix makes beside its result, for the widest of them.

    Four-bit ones are written out whole, with their scales; those that are ours a part at a time, as
    values, as what they are computed in, and once more while scales are put to them, with a scale
    and a zero for each where columns share them in an order of their own; of LLM.int8 it is the
    activations that are made into whole numbers, and the sums out of them."""
    quantized = [tensor for tensor in tensors if tensor.is_quantized]
    widest = max(quantized, key=lambda tensor: tensor.n_elements, default=None)
    if widest is None:
        return 0
    c, n = COMPUTE_BYTES[settings.compute_type], widest.n_elements
    if written_out_in_parts(model, settings):
        part = min(max(part_elements(settings), _sides(widest, model.stored)[1]), n)
        gathered = model.stored is not None and model.stored.act_order
        return part * (2 * _F32 + c + (3 * _F32 if gathered else 0))
    if widest.kind != "int8":
        return n * c + -(-n // BLOCK) * _F32
    sides = [_sides(tensor, model.stored) for tensor in quantized]
    most = max(columns + INT8_BYTES * max(rows, columns) for rows, columns in sides)
    return tokens * most


def _sides(tensor: LoadedTensor, stored: Stored | None) -> tuple[int, int]:
    """Rows and columns of a matrix, also of one that is packed."""
    if stored and tensor.source and tensor.source.name.endswith(".qweight"):
        return packed_shape(tensor.source.shape, stored)
    rows = tensor.source.shape[0] if tensor.source else 1
    return rows, tensor.n_elements // max(1, rows)


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
