"""What of a model costs time: weights by type and use, and the width of everything else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loadmaster.model.quants import BY_NAME
from loadmaster.model.types import LayerKind, ModelSpec, TensorSpec
from loadmaster.plan import layout

_ROUTED = re.compile(r"_exps\.")
_OUTPUT = re.compile(r"^(output|cls|cls_out)\b")
# Operations of a layer that are no products: norms, sums, positions, cache writes, attention,
# activation (llm_build_llama of llama.cpp 0c1e57098); routing adds sorting and weighing.
_NODES_PER_LAYER = 12
_NODES_PER_ROUTER = 10
# Norm, scale and residual sum: before attention and before the feed-forward.
_NORMS_PER_LAYER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMix:
    """The model as the speed model sees it. Bytes are those that one token reads."""

    dense: Mapping[str, int]  # type → bytes, in the layers
    experts: Mapping[str, int]
    output: Mapping[str, int]
    elements_per_byte: float  # weights per byte
    n_expert: int
    n_expert_used: int
    n_vocab: int
    head_dim: int
    attention_width: int  # query elements of all layers together
    cache_width: int  # K and V elements of one cell, of all layers together
    row_width: int  # K elements of one cell of one layer
    # Per token, over all layers:
    norm_elements: int
    gate_elements: int
    rope_elements: int
    n_nodes: int

    @property
    def heads_per_kv(self) -> float:
        """Query elements for each element of K."""
        return max(1.0, 2 * self.attention_width / max(1, self.cache_width))

    @property
    def output_bytes(self) -> int:
        return sum(self.output.values())

    def cache_bytes(self, kv_type: str) -> float:
        """Bytes of cache behind one query element of one cell: heads share K and V rows."""
        quant = BY_NAME[kv_type]
        cells = self.cache_width * quant.block_bytes / quant.block_size
        return cells / max(1, self.attention_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWidth:
    """Query elements of one layer's attention: over all cells, or over a window of them."""

    full: int
    windowed: int


def layer_widths(model: ModelSpec) -> tuple[LayerWidth, ...]:
    """The attention widths of all layers, 0 where a layer has none."""
    widths = []
    for index, layer in enumerate(model.layers):
        width = _query_width(model, index)
        slides = layer.kind is LayerKind.SWA
        widths.append(LayerWidth(full=0 if slides else width, windowed=width if slides else 0))
    return tuple(widths)


def weight_mix(model: ModelSpec) -> WeightMix:
    """Sort a model's weights by what they cost. Rows looked up by token cost nothing."""
    dense: dict[str, int] = {}
    experts: dict[str, int] = {}
    output: dict[str, int] = {}
    gate = 0
    for tensor in model.tensors:
        if not layout.is_loaded(model, tensor) or len(tensor.shape) < 2:
            continue
        if is_routed(model, tensor):
            _add(experts, tensor, tensor.size_bytes * model.n_expert_used // model.n_expert)
        elif is_output(tensor):
            _add(output, tensor, tensor.size_bytes)
        elif tensor.name.partition(".")[0] not in layout.ROW_LOOKUPS:
            _add(dense, tensor, tensor.size_bytes)
        elif tensor.name == "token_embd.weight" and layout.is_tied(model):
            _add(output, tensor, tensor.size_bytes)
        gate += _gate_width(model, tensor)
    widths = [_query_width(model, index) for index in range(len(model.layers))]
    heads = [layer.n_head for layer in model.layers if layer.n_head]
    keys = sum(layer.k_width for layer in model.layers)
    return WeightMix(
        dense=dense,
        experts=experts,
        output=output,
        elements_per_byte=_elements(model) / max(1, model.weight_bytes),
        n_expert=model.n_expert,
        n_expert_used=model.n_expert_used,
        n_vocab=model.n_vocab,
        head_dim=max(widths, default=0) // max(heads, default=1),
        attention_width=sum(widths),
        cache_width=sum(layer.k_width + layer.v_width for layer in model.layers),
        row_width=max((layer.k_width for layer in model.layers), default=0),
        norm_elements=_NORMS_PER_LAYER * model.n_layer * model.n_embd,
        gate_elements=gate,
        rope_elements=sum(widths) + keys,
        n_nodes=model.n_layer * (_NODES_PER_LAYER + (_NODES_PER_ROUTER if model.n_expert else 0)),
    )


def is_routed(model: ModelSpec, tensor: TensorSpec) -> bool:
    """Whether it is a stack of experts, of which a token reads a few."""
    return bool(_ROUTED.search(tensor.name)) and model.n_expert > 0


def is_output(tensor: TensorSpec) -> bool:
    """Whether it makes logits, which are wanted once for each sequence and not for each token."""
    return bool(_OUTPUT.match(tensor.name)) and len(tensor.shape) > 1


def _add(sums: dict[str, int], tensor: TensorSpec, size: int) -> None:
    sums[tensor.type.name] = sums.get(tensor.type.name, 0) + size


def _gate_width(model: ModelSpec, tensor: TensorSpec) -> int:
    """Elements that leave an activation for one token: the rows of `ffn_down`'s input."""
    if ".ffn_down" not in tensor.name or not tensor.name.endswith(".weight"):
        return 0
    return tensor.shape[0] * (model.n_expert_used if _ROUTED.search(tensor.name) else 1)


def _query_width(model: ModelSpec, index: int) -> int:
    layer = model.layers[index]
    if layer.kind not in (LayerKind.FULL, LayerKind.SWA, LayerKind.MLA):
        return 0
    return layer.n_head * (layer.k_width // max(1, layer.n_head_kv))


def _elements(model: ModelSpec) -> int:
    return sum(
        tensor.size_bytes // tensor.type.block_bytes * tensor.type.block_size
        for tensor in model.tensors
    )
