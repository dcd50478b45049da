"""From header to bytes: how large the engine's model, KV and output buffers are.

Pure arithmetic over a `ModelSpec`. Each formula names the function of llama.cpp 0c1e57098 that it
repeats; `python -m benchmarks.plan_accuracy` holds them against the engine, to the byte. Where
tensors go is in `layout`, the bound for compute buffers in `bounds`.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

from loadmaster.machine.types import SizingRules
from loadmaster.model.quants import BY_NAME, F32
from loadmaster.model.types import LayerKind, LayerSpec, ModelSpec, QuantType, TensorSpec
from loadmaster.plan.layout import (
    ROW_LOOKUPS,
    Overrides,
    copies_tied_output,
    device_ids,
    device_of_tensor,
    is_tied,
    layer_devices,
    opened_gpus,
    placed_tensors,
)
from loadmaster.plan.types import CPU, EngineSettings
from loadmaster.units import Bytes, align

__all__ = [
    "HOST_RULES",
    "alloc_bytes",
    "context_bytes",
    "device_ids",
    "device_of_tensor",
    "kv_bytes",
    "layer_cache_bytes",
    "layer_devices",
    "layer_state_bytes",
    "model_bytes",
    "n_ctx_per_stream",
    "output_bytes",
    "placed_tensors",
    "recurrent_bytes",
    "repacked_bytes",
    "repacked_types",
    "round_n_ctx",
    "swa_cells",
]

CELL_PADDING = 256  # llama_context and llama_kv_cache_iswa pad numbers of cells to this
HOST_RULES = SizingRules(
    alignment_bytes=32,  # TENSOR_ALIGNMENT of ggml-cpu, also of its repacked and pinned buffers
    row_padding=0,
    offload_min_batch=0,
    pinned_host=False,
)

Rules = Mapping[str, SizingRules]  # one entry for each GPU: `gpu:0`, …


def alloc_bytes(quant: QuantType, shape: Sequence[int], rules: SizingRules) -> Bytes:
    """What a tensor takes in a buffer, aligned.

    ggml_backend_alloc_ctx_tensors_from_buft_size (ggml-alloc.c) over the buffer type's
    get_alloc_size; CUDA pads a quantized row to `row_padding` elements, once for each tensor
    (ggml_backend_cuda_buffer_type_get_alloc_size, ggml-cuda.cu).
    """
    n_bytes = quant.row_bytes(shape[0]) * prod(shape[1:])
    if rules.row_padding and quant.block_size > 1 and shape[0] % rules.row_padding:
        n_bytes += quant.row_bytes(rules.row_padding - shape[0] % rules.row_padding)
    return Bytes(align(n_bytes, rules.alignment_bytes))


# ---- weights


def model_bytes(
    model: ModelSpec,
    settings: EngineSettings,
    rules: Rules,
    *,
    repacked: frozenset[str] = frozenset(),
) -> Mapping[str, Bytes]:
    """Weight bytes per device with load mode `none`; every device of the settings has a row.

    `repacked` is what `repacked_types` gives for the host's CPU. It matters for a tied output on
    a host without page-locked buffers: the output is then a second, repacked copy.
    """
    sums = dict.fromkeys((*device_ids(settings), CPU), 0)
    for placed in placed_tensors(model, settings):
        rule = rules.get(placed.device, HOST_RULES)
        sums[placed.device] += alloc_bytes(placed.tensor.type, placed.tensor.shape, rule)
    if not copies_tied_output(model):
        sums[CPU] += _repacked_output_bytes(model, settings, rules, repacked)
    return {device: Bytes(total) for device, total in sums.items()}


def repacked_bytes(
    model: ModelSpec, settings: EngineSettings, rules: Rules, repacked: frozenset[str]
) -> Bytes:
    """The part of the host's weights that the engine copies into repacked buffers.

    It is private memory under every load mode; with mmap the rest are file pages.
    """
    if not _repacks(settings, rules):
        return Bytes(0)
    copies = (
        placed.tensor
        for placed in placed_tensors(model, settings)
        if placed.device == CPU and _is_repacked(placed.tensor, repacked)
    )
    total = sum(alloc_bytes(tensor.type, tensor.shape, HOST_RULES) for tensor in copies)
    return Bytes(total + _repacked_output_bytes(model, settings, rules, repacked))


def _repacks(settings: EngineSettings, rules: Rules) -> bool:
    """make_cpu_buft_list (llama-model.cpp): page-locked buffers come before repacked ones."""
    pinned = any(rules[device].pinned_host for device in opened_gpus(settings))
    return settings.use_extra_bufts and not pinned


def _is_repacked(tensor: TensorSpec, repacked: frozenset[str]) -> bool:
    """ggml-cpu/repack.cpp, extra_buffer_type::supports_op: MUL_MAT in 2-D, MUL_MAT_ID in 3-D."""
    if tensor.type.name not in repacked or len(tensor.shape) < 2 or tensor.shape[1] % 8:
        return False
    if len(tensor.shape) == 3:
        return "_exps." in tensor.name
    return tensor.name.partition(".")[0] not in ROW_LOOKUPS


def _repacked_output_bytes(
    model: ModelSpec, settings: EngineSettings, rules: Rules, repacked: frozenset[str]
) -> int:
    """The second host copy of a tied output, 0 when both uses share one buffer type.

    token_embd itself is read with GET_ROWS, which no repacked type supports.
    """
    if not is_tied(model) or not _repacks(settings, rules):
        return 0
    tensor = next((t for t in model.tensors if t.name == "token_embd.weight"), None)
    if tensor is None or tensor.type.name not in repacked or tensor.shape[1] % 8:
        return 0
    override = Overrides(settings.overrides).device(tensor)
    if (override or layer_devices(model, settings)[-1]) != CPU:
        return 0
    return alloc_bytes(tensor.type, tensor.shape, HOST_RULES)


def repacked_types(isa: Sequence[str]) -> frozenset[str]:
    """Tensor types for which ggml has repacked kernels on a CPU with these extensions.

    ggml_repack_get_optimal_repack_type (ggml-cpu/repack.cpp), x86 and Arm. Rows must come in
    eights; types that Arm repacks in fours are rounded to that rule. On a CPU with `amx_int8` the
    engine has packed layouts of other sizes besides: there its own figure for the host counts.
    """
    has = set(isa)
    types: set[str] = set()
    if "avx2" in has:
        types |= {"q4_0", "q4_K", "iq4_nl", "mxfp4"}
    if "avx512" in has:
        types.add("q2_K")
    if has & {"dotprod", "i8mm"}:
        types |= {"q4_0", "q4_K", "q5_K", "q6_K", "q8_0", "iq4_nl", "mxfp4", "q1_0"}
    return frozenset(types)


# ---- caches


def round_n_ctx(n_ctx: int, *, n_seq_max: int = 1, kv_unified: bool = True) -> int:
    """Total cells as the engine rounds them (llama_context::llama_context).

    Without a unified cache every sequence gets an equal share, padded on its own.
    """
    total = align(n_ctx, CELL_PADDING)
    if kv_unified:
        return total
    return max(CELL_PADDING, align(total // n_seq_max, CELL_PADDING)) * n_seq_max


def n_ctx_per_stream(settings: EngineSettings) -> int:
    """Cells of one stream of the cache (cparams.n_ctx_seq)."""
    total = round_n_ctx(
        settings.n_ctx, n_seq_max=settings.n_seq_max, kv_unified=settings.kv_unified
    )
    return total if settings.kv_unified else total // settings.n_seq_max


def effective_n_ubatch(settings: EngineSettings) -> int:
    """cparams.n_ubatch: no more than n_batch, which is no more than n_ctx (causal models)."""
    n_batch = min(settings.n_ctx, settings.n_batch)
    return min(n_batch, settings.n_ubatch or settings.n_batch)


def swa_cells(model: ModelSpec, settings: EngineSettings) -> int:
    """Cells of one stream of the sliding-window cache (llama_kv_cache_iswa)."""
    full = n_ctx_per_stream(settings)
    if settings.swa_full:
        return full
    sequences = settings.n_seq_max if settings.kv_unified else 1
    window = model.n_swa * sequences + effective_n_ubatch(settings)
    return align(min(full, window), CELL_PADDING)


def kv_bytes(model: ModelSpec, settings: EngineSettings, rules: Rules) -> Mapping[str, Bytes]:
    """K and V bytes per device (llama_kv_cache): a layer's cache is where the layer is.

    With offload_kqv false all of it is on the host. Every device has a row.
    """
    return _sum_layers(model, settings, rules, layer_cache_bytes)


def recurrent_bytes(
    model: ModelSpec, settings: EngineSettings, rules: Rules
) -> Mapping[str, Bytes]:
    """State bytes per device (llama_memory_recurrent); a dry run really allocates them."""
    return _sum_layers(model, settings, rules, layer_state_bytes)


def context_bytes(model: ModelSpec, settings: EngineSettings, rules: Rules) -> Mapping[str, Bytes]:
    """KV and recurrent state together: the engine's `context` figure."""
    kv = kv_bytes(model, settings, rules)
    state = recurrent_bytes(model, settings, rules)
    return {device: Bytes(kv[device] + state[device]) for device in kv}


def layer_cache_bytes(
    model: ModelSpec, layer: LayerSpec, settings: EngineSettings, rules: SizingRules
) -> int:
    """K and V of one layer for all streams; 0 for a layer that has no cache of its own.

    Without flash attention V is stored transposed, its rows padded to the widest layer's
    ([TAG_V_CACHE_VARIABLE] in llama_kv_cache::llama_kv_cache).
    """
    if layer.kind is LayerKind.NONE or _has_state_alone(layer):
        return 0
    cells = (
        swa_cells(model, settings) if layer.kind is LayerKind.SWA else n_ctx_per_stream(settings)
    )
    streams = 1 if settings.kv_unified else settings.n_seq_max
    k = alloc_bytes(BY_NAME[settings.type_k], (layer.k_width, cells, streams), rules)
    if layer.kind is LayerKind.MLA:
        return k
    width = layer.v_width
    if not settings.flash_attn:
        width = max(one.v_width for one in model.layers)
    return k + alloc_bytes(BY_NAME[settings.type_v], (width, cells, streams), rules)


def _has_state_alone(layer: LayerSpec) -> bool:
    return layer.kind is LayerKind.RECURRENT and layer.k_width == 0


def layer_state_bytes(
    model: ModelSpec, layer: LayerSpec, settings: EngineSettings, rules: SizingRules
) -> int:
    """The recurrent state of one layer for all sequences, F32 (llama_memory_recurrent)."""
    if layer.kind is not LayerKind.RECURRENT:
        return 0
    rows = max(1, settings.n_seq_max)
    widths = (layer.recurrent_r_width, layer.recurrent_s_width)
    return sum(alloc_bytes(F32, (width, rows), rules) for width in widths)


def _sum_layers(
    model: ModelSpec,
    settings: EngineSettings,
    rules: Rules,
    size: Callable[[ModelSpec, LayerSpec, EngineSettings, SizingRules], int],
) -> Mapping[str, Bytes]:
    sums = dict.fromkeys((*device_ids(settings), CPU), 0)
    for layer, device in zip(model.layers, layer_devices(model, settings), strict=False):
        home = device if settings.offload_kqv else CPU
        sums[home] += size(model, layer, settings, rules.get(home, HOST_RULES))
    return {device: Bytes(total) for device, total in sums.items()}


# ---- output


def output_bytes(model: ModelSpec, settings: EngineSettings) -> Bytes:
    """The host's logits buffer once a step asked for n_outputs_max rows.

    llama_context::output_reserve: it begins with n_seq_max rows and grows; it is in no memory
    breakdown. n_outputs_max 0 means n_batch. With embeddings, a row has logits all the same.
    """
    n_outputs = settings.n_outputs_max or settings.n_batch
    width = model.n_vocab + (0 if settings.pooling is None else model.n_embd)
    return Bytes(4 * width * max(n_outputs, settings.n_seq_max))
