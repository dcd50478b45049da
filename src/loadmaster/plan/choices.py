"""What the planner may vary around the user's knobs, and in which order it tries it."""

from collections.abc import Iterator
from dataclasses import dataclass

from loadmaster.model.types import LayerKind, ModelSpec
from loadmaster.plan.patterns import number_regex
from loadmaster.plan.types import (
    CPU,
    DRAFT_STEP_TOKENS,
    EngineSettings,
    Knobs,
    Override,
    Workload,
)
from loadmaster.units import align

# n_ctx when nobody asked for one: enough for a conversation, and 1/16 of the cache of a model
# that was trained for 131,072.
DEFAULT_N_CTX = 8192
# No automatic choice goes below this; a smaller n_ctx must be asked for.
MIN_N_CTX = 2048
DEFAULT_N_UBATCH = 512
_SMALLER_N_UBATCH = (256, 128, 64, 32)
# The engine rounds n_ctx up to this many cells (llama-context.cpp, GGML_PAD(n_ctx, 256)).
N_CTX_STEP = 256
# ggml streams host weights to a GPU from this batch on (GGML_OP_OFFLOAD_MIN_BATCH).
OFFLOAD_MIN_BATCH = 32
# Sequences of one context (LLAMA_MAX_SEQ of llama-cparams.h).
MAX_SEQUENCES = 256
# Attention sinks lose accuracy even with a q8_0 cache (performance notes: same-top 74.9 %).
_EXACT_CACHE_ARCHITECTURES = frozenset({"gpt-oss"})
_Q8_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One setting of everything that is not placement."""

    n_ctx: int  # per sequence
    type_k: str
    type_v: str
    n_ubatch: int
    flash_attn: bool


def first_choice(model: ModelSpec, workload: Workload, knobs: Knobs) -> Choice:
    """What the user fixed, and defaults for the rest."""
    n_ctx = workload.n_ctx or min(model.n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)
    return Choice(
        n_ctx=n_ctx,
        type_k=knobs.type_k or "f16",
        type_v=knobs.type_v or "f16",
        n_ubatch=knobs.n_ubatch or DEFAULT_N_UBATCH,
        flash_attn=knobs.flash_attn is not False,
    )


def smaller_cache(model: ModelSpec, knobs: Knobs, choice: Choice) -> Choice | None:
    """The same with a q8_0 cache, where the user left the type open and the model bears it."""
    if knobs.type_k or knobs.type_v or not choice.flash_attn:
        return None
    if model.architecture in _EXACT_CACHE_ARCHITECTURES or not _rows_divide(model):
        return None
    return Choice(
        n_ctx=choice.n_ctx,
        type_k="q8_0",
        type_v="q8_0",
        n_ubatch=choice.n_ubatch,
        flash_attn=choice.flash_attn,
    )


def _rows_divide(model: ModelSpec) -> bool:
    """Whether every head's K and V row is whole blocks of q8_0, and there is a cache at all."""
    cached = [
        layer for layer in model.layers if layer.kind not in (LayerKind.NONE, LayerKind.RECURRENT)
    ]
    return bool(cached) and all(
        width % max(1, layer.n_head_kv) == 0 and width // max(1, layer.n_head_kv) % _Q8_BLOCK == 0
        for layer in cached
        for width in (layer.k_width, layer.v_width)
    )


def shrinking(
    model: ModelSpec, workload: Workload, knobs: Knobs, choice: Choice
) -> Iterator[Choice]:
    """Ever smaller choices for when the first does not fit: cache type, n_ubatch, then n_ctx."""
    small = smaller_cache(model, knobs, choice) or choice
    if small != choice:
        yield small
    if knobs.n_ubatch is None:
        for n_ubatch in _SMALLER_N_UBATCH:
            small = _with(small, n_ubatch=n_ubatch)
            yield small
    if workload.n_ctx is None:
        n_ctx = small.n_ctx // 2
        while n_ctx >= MIN_N_CTX:
            small = _with(small, n_ctx=n_ctx)
            yield small
            n_ctx //= 2


def _with(choice: Choice, *, n_ctx: int | None = None, n_ubatch: int | None = None) -> Choice:
    return Choice(
        n_ctx=n_ctx or choice.n_ctx,
        type_k=choice.type_k,
        type_v=choice.type_v,
        n_ubatch=n_ubatch or choice.n_ubatch,
        flash_attn=choice.flash_attn,
    )


def base_settings(
    choice: Choice, workload: Workload, knobs: Knobs, *, n_gpus: int, n_threads: int
) -> EngineSettings:
    """Engine settings with nothing on a GPU yet."""
    each = align(choice.n_ctx, N_CTX_STEP)
    n_ctx = each * workload.n_seq_max
    if workload.n_cells is not None:
        n_ctx = align(max(choice.n_ctx, workload.n_cells), N_CTX_STEP)
    n_ubatch = max(1, min(choice.n_ubatch, each if workload.n_cells is None else n_ctx))
    threads = knobs.n_threads or n_threads
    n_batch = knobs.n_batch or max(n_ubatch, workload.n_seq_max)
    n_draft = 0 if knobs.pooling is not None else knobs.n_draft or 0
    n_outputs_max = knobs.n_outputs_max or workload.n_seq_max
    if n_draft:  # every token of a draft is an output
        n_outputs_max = max(n_outputs_max, min(n_batch, DRAFT_STEP_TOKENS))
    if knobs.pooling is not None:  # a prompt is pooled within one ubatch, each token an output
        n_batch = n_outputs_max = n_ubatch = align(n_ubatch, workload.n_seq_max)
    return EngineSettings(
        n_gpu_layers=0,
        layers_per_device=(0,) * n_gpus,
        overrides=(),
        n_ctx=n_ctx,
        n_seq_max=workload.n_seq_max,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_outputs_max=n_outputs_max,
        type_k=choice.type_k,
        type_v=choice.type_v,
        flash_attn=choice.flash_attn,
        offload_kqv=knobs.offload_kqv is not False,
        op_offload=n_gpus > 0 and knobs.op_offload is not False,
        op_offload_min_batch=knobs.op_offload_min_batch or OFFLOAD_MIN_BATCH,
        swa_full=bool(knobs.swa_full),
        kv_unified=workload.n_seq_max > 1 and knobs.kv_unified is not False,
        load_mode=knobs.load_mode or "none",
        use_extra_bufts=(knobs.load_mode or "none") == "none",
        n_threads=threads,
        n_threads_batch=threads,
        adapters=knobs.adapters,
        pooling=knobs.pooling,
        n_draft=n_draft,
    )


def pinned_overrides(knobs: Knobs) -> tuple[Override, ...]:
    """The user's own overrides: `-ot` first, then what `-ncmoe` and `-ncffn` stand for."""
    pinned = list(knobs.overrides)
    for count, suffix in ((knobs.n_cpu_moe, "_exps"), (knobs.n_cpu_ffn, "")):
        if count:
            layers = number_regex(range(count))
            pattern = rf"^blk\.({layers})\.ffn_(up|down|gate|gate_up){suffix}\.weight$"
            pinned.append(Override(pattern=pattern, device=CPU))
    return tuple(pinned)
