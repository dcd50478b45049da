"""A bound for compute buffers, for when no engine is at hand to size them.

Compute buffers are the peak of ggml's graph allocator and follow no short formula: the engine's own
sizing (`engine`) is the source of a plan. This bound says how much a plan without an engine must
keep free; `python -m benchmarks.plan_accuracy` counts the cases where the engine needed more
(`bound_below`, 0). Its terms are those that dominate the graph of llama.cpp 0c1e57098: one prefill
of n_ubatch tokens with n_outputs_max rows of logits (llama_context::sched_reserve).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from loadmaster.model.types import LayerKind, LayerSpec, ModelSpec, TensorSpec
from loadmaster.plan.layout import (
    Placed,
    device_ids,
    is_tied,
    layer_devices,
    opened_gpus,
    placed_tensors,
)
from loadmaster.plan.memory import (
    HOST_RULES,
    Rules,
    alloc_bytes,
    effective_n_ubatch,
    layer_cache_bytes,
    n_ctx_per_stream,
    swa_cells,
)
from loadmaster.plan.types import CPU, EngineSettings
from loadmaster.units import MIB, Bytes

_F32, _F16 = 4, 2
# How many of a layer's matrix outputs, and copies of the residual stream, are alive at once.
# Found with benchmarks.plan_accuracy: the smallest small numbers without a case below.
_ALIVE_OUTPUTS = 2
_ALIVE_STREAMS = 8
_MARGIN_PCT = 10  # fragmentation of the graph allocator
_FLOOR_BYTES = 4 * MIB  # position and index inputs, alignment, scheduling leftovers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """The sizes of one prefill graph, wherever its parts run."""

    mask_bytes: int
    logits_bytes: int
    stream_bytes: int  # residual stream and its copies
    widest_layer_bytes: int  # outputs of one layer's matrices
    scores_bytes: int  # K·Q of one layer, without flash attention
    state_bytes: int
    cast_bytes: int  # f16 copies of one layer's K and V


def bound_compute_bytes(
    model: ModelSpec, settings: EngineSettings, rules: Rules
) -> Mapping[str, Bytes]:
    """At least what the engine's compute buffers take, per device; every device has a row."""
    graph = _graph(model, settings)
    placed = placed_tensors(model, settings)
    sizes = {
        device: _device_bound(model, settings, rules, placed, graph, device)
        for device in (*device_ids(settings), CPU)
    }
    return {
        device: Bytes(_FLOOR_BYTES + size * (100 + _MARGIN_PCT) // 100)
        for device, size in sizes.items()
    }


def _device_bound(
    model: ModelSpec,
    settings: EngineSettings,
    rules: Rules,
    placed: tuple[Placed, ...],
    graph: _Graph,
    device: str,
) -> int:
    if not _computes(settings, rules, placed, device):
        return 0
    streamed = _streamed_bytes(model, settings, rules, placed, device)
    logits = graph.logits_bytes if streamed or _has_output(model, settings, device) else 0
    layer = graph.widest_layer_bytes + graph.scores_bytes + graph.state_bytes + graph.cast_bytes
    foreign = _foreign_cache_bytes(model, settings, rules, device)
    # A streamed weight lies between what was freed for it: the phases add up there.
    phases = logits + layer + foreign if streamed else max(logits, layer + foreign)
    return graph.mask_bytes + graph.stream_bytes + streamed + phases


def _computes(
    settings: EngineSettings, rules: Rules, placed: tuple[Placed, ...], device: str
) -> bool:
    """Whether any operation may run on the device.

    Small batches too are taken by op offload where an operation has a row for each head.
    """
    if any(one.device == device for one in placed):
        return True
    return _offloads(settings, rules, device) and any(one.device == CPU for one in placed)


def _offloads(settings: EngineSettings, rules: Rules, device: str) -> bool:
    if not settings.op_offload or device not in opened_gpus(settings):
        return False
    return rules[device].offload_min_batch > 0


def _graph(model: ModelSpec, settings: EngineSettings) -> _Graph:
    tokens = effective_n_ubatch(settings)
    outputs = max(settings.n_seq_max, min(tokens, settings.n_outputs_max or settings.n_batch))
    return _Graph(
        mask_bytes=_mask_bytes(model, settings, tokens),
        logits_bytes=outputs * _F32 * (_logit_copies(model) * model.n_vocab + 2 * model.n_embd),
        stream_bytes=_ALIVE_STREAMS * tokens * _F32 * model.n_embd,
        widest_layer_bytes=_ALIVE_OUTPUTS * tokens * _F32 * _widest_layer(model),
        scores_bytes=0 if settings.flash_attn else _scores_bytes(model, settings, tokens),
        state_bytes=_state_bytes(model, settings),
        cast_bytes=_cast_bytes(model, settings) if settings.flash_attn else 0,
    )


def _logit_copies(model: ModelSpec) -> int:
    """Soft-capped logits exist twice (Gemma, Grok)."""
    return 2 if f"{model.architecture}.final_logit_softcapping" in model.metadata else 1


def _cells(model: ModelSpec, settings: EngineSettings, layer: LayerSpec) -> int:
    """Cells of one stream that a layer attends to; 0 for a layer without attention."""
    if layer.kind is LayerKind.NONE or layer.k_width == 0:
        return 0
    if layer.kind is LayerKind.SWA:
        return swa_cells(model, settings)
    return n_ctx_per_stream(settings)


def _mask_bytes(model: ModelSpec, settings: EngineSettings, tokens: int) -> int:
    """One mask for each kind of cache, F16 with flash attention (build_attn_inp_kq_mask)."""
    element = _F16 if settings.flash_attn else _F32
    sizes = {layer.kind: _cells(model, settings, layer) for layer in model.layers}
    return sum(cells * tokens * element for cells in sizes.values())


def _widest_layer(model: ModelSpec) -> int:
    """The outputs of one layer's matrices for one token, in elements, in the widest layer."""
    widths: dict[int, int] = {}
    for tensor in model.tensors:
        if tensor.layer is not None:
            widths[tensor.layer] = widths.get(tensor.layer, 0) + _output_width(model, tensor)
    return max(widths.values(), default=0)


def _output_width(model: ModelSpec, tensor: TensorSpec) -> int:
    if len(tensor.shape) < 2:
        return 0
    if "_exps." in tensor.name:
        return tensor.shape[1] * max(1, model.n_expert_used)
    return prod(tensor.shape[1:])


def _scores_bytes(model: ModelSpec, settings: EngineSettings, tokens: int) -> int:
    """K·Q of one layer; with attention sinks the softmax has a copy of its own."""
    copies = 2 if any(tensor.name.endswith("attn_sinks.weight") for tensor in model.tensors) else 1
    return copies * max(
        layer.n_head * _cells(model, settings, layer) * tokens * _F32 for layer in model.layers
    )


def _state_bytes(model: ModelSpec, settings: EngineSettings) -> int:
    """Recurrent states of one layer: read, written and kept while the layer runs."""
    widths = [layer.recurrent_r_width + layer.recurrent_s_width for layer in model.layers]
    return 4 * _F32 * settings.n_seq_max * max(widths, default=0)


def _cast_bytes(model: ModelSpec, settings: EngineSettings) -> int:
    """F16 copies for flash attention: of F32 caches everywhere, of others in CUDA's kernels.

    MLA has no V, its K is read and copied as both.
    """
    streams = 1 if settings.kv_unified else settings.n_seq_max
    cast_k, cast_v = settings.type_k != "f16", settings.type_v != "f16"
    sizes = [
        _cells(model, settings, layer) * streams * _F16
        * (layer.k_width * cast_k + (layer.v_width or layer.k_width) * cast_v)
        for layer in model.layers
    ]  # fmt: skip
    return max(sizes, default=0)


def _foreign_cache_bytes(
    model: ModelSpec, settings: EngineSettings, rules: Rules, device: str
) -> int:
    """Caches that lie elsewhere: the scheduler may run their attention here, two at once."""
    homes = layer_devices(model, settings)
    sizes = [
        layer_cache_bytes(model, layer, settings, rules.get(device, HOST_RULES))
        for layer, home in zip(model.layers, homes, strict=False)
        if (home if settings.offload_kqv else CPU) != device
    ]
    return 2 * max(sizes, default=0)


def _streamed_bytes(
    model: ModelSpec,
    settings: EngineSettings,
    rules: Rules,
    placed: tuple[Placed, ...],
    device: str,
) -> int:
    """The host tensors that may be copied here at once for a big batch (op offload).

    ggml_backend_sched_backend_id_from_cur (ggml-backend.cpp). Each such operation begins a new
    split, whose copies take the place of the last one's; a layer's up and gate may share one.
    """
    if not _offloads(settings, rules, device):
        return 0
    if effective_n_ubatch(settings) < rules[device].offload_min_batch:
        return 0
    sizes: dict[int | None, list[int]] = {}
    for one in placed:
        tensor = one.tensor
        if one.device == CPU and len(tensor.shape) > 1 and not _read_by_rows(model, tensor):
            size = alloc_bytes(tensor.type, tensor.shape, rules[device])
            sizes.setdefault(tensor.layer, []).append(size)
    return max((sum(sorted(group)[-2:]) for group in sizes.values()), default=0)


def _read_by_rows(model: ModelSpec, tensor: TensorSpec) -> bool:
    """Embeddings are read with GET_ROWS, which is never streamed."""
    return "token_embd" in tensor.name and not (
        tensor.name == "token_embd.weight" and is_tied(model)
    )


def _has_output(model: ModelSpec, settings: EngineSettings, device: str) -> bool:
    return layer_devices(model, settings)[-1] == device
