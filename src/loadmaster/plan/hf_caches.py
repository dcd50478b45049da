"""What keys and values take under the transformers engine, by type: plain, or in groups of 8 or 4
bits. Pure.

Exact: the tensors of each layer are made whole when the model is opened, and never grow.
"""

from collections.abc import Iterable, Mapping
from math import gcd

from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import LayerKind, LayerSpec
from loadmaster.plan.hf_weights import COMPUTE_BYTES
from loadmaster.plan.types import TransformersSettings

# Bits of an element; the elements of a group share a scale, as in ggml's types of the same names.
GROUPED_BITS: Mapping[str, int] = {"q8_0": 8, "q4_0": 4}
CACHE_TYPES = (*COMPUTE_BYTES, *GROUPED_BITS)
SMALLER_CACHE = "q8_0"  # what is proposed beside a plain one
SCALE_BYTES = 2  # F16
_GROUP = 32


def group_of(head_width: int) -> int:
    """Elements that share a scale: 32, or as many as divide a head evenly."""
    return gcd(head_width, _GROUP)


def cells_of(layer: LayerSpec, window: int, settings: TransformersSettings) -> int:
    """Cells that one sequence has in a layer; one that slides keeps its window only."""
    n_ctx = settings.n_ctx // settings.n_seq_max
    slides = layer.kind is LayerKind.SWA and window
    return min(n_ctx, window) if slides else n_ctx


def cell_bytes(kind: str, width: int, n_head: int) -> tuple[int, ...]:
    """One cell's keys or values, `width` elements of `n_head` heads: the elements, then scales."""
    if kind in COMPUTE_BYTES:
        return (width * COMPUTE_BYTES[kind],)
    scales = width // group_of(width // max(1, n_head))
    return width * GROUPED_BITS[kind] // 8, scales * SCALE_BYTES


def layer_cache(layer: LayerSpec, window: int, settings: TransformersSettings) -> list[int]:
    """Bytes of each tensor of one layer's cache, for all sequences: of K, then of V. Where vectors
    are made, prompts are read whole, and nothing of them is kept."""
    if settings.pooling is not None:
        return []
    cells = settings.n_seq_max * cells_of(layer, window, settings)
    rows = ((settings.type_k, layer.k_width), (settings.type_v, layer.v_width))
    return [
        cells * part
        for kind, width in rows
        for part in cell_bytes(kind, width, layer.n_head_kv)
        if part
    ]


def cache_allocations(
    model: CheckpointSpec, layers: Iterable[int], settings: TransformersSettings
) -> list[int]:
    """The cache tensors of these layers, in the order in which they are made."""
    return [
        size for index in layers for size in layer_cache(model.layers[index], model.n_swa, settings)
    ]


def read_bytes(kind: str, width: int, n_head: int, compute_type: str) -> int:
    """What attention moves to see one cell: grouped ones are written out and read again."""
    kept = sum(cell_bytes(kind, width, n_head))
    return kept if kind in COMPUTE_BYTES else kept + 2 * width * COMPUTE_BYTES[compute_type]


def writing_bytes(layer: LayerSpec, tokens: int, settings: TransformersSettings) -> int:
    """What putting `tokens` into groups holds: a copy in F32 and its sizes, elements, and both as
    the cells then have them; and of 4 bits, the half bytes of all cells while they are read."""
    types = {settings.type_k, settings.type_v} & {*GROUPED_BITS}
    if not types or settings.pooling is not None:
        return 0
    widest, both = max(layer.k_width, layer.v_width), layer.k_width + layer.v_width
    making = tokens * (widest * (4 + 4 + 1) + both * COMPUTE_BYTES[settings.compute_type])
    return making + (settings.n_ctx * widest // 2 if "q4_0" in types else 0)
