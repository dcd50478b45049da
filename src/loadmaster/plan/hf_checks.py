"""What a request for a checkpoint must be before it is planned: each refusal says what to type."""

from collections.abc import Iterator, Sequence

from loadmaster.errors import UsageError
from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.checks import check_gpus, check_n_ctx
from loadmaster.plan.hf_attention import has_flash
from loadmaster.plan.hf_caches import CACHE_TYPES
from loadmaster.plan.hf_weights import BLOCK
from loadmaster.plan.types import Knobs, Workload

# GPUs that torch and bitsandbytes drive.
BACKENDS = ("cuda", "rocm")
FP8_FROM = (8, 9)  # compute capability: Ada, Hopper
BITSANDBYTES_FROM = (6, 0)  # of bitsandbytes 0.50.2, by its own table of devices


def check_request(
    machine: Machine,
    model: CheckpointSpec,
    workload: Workload,
    knobs: Knobs,
    gpus: Sequence[Gpu],
) -> None:
    """Refuse what the engine cannot do.

    Raises:
        UsageError: it cannot; the hint has what it can.
    """
    _check_devices(machine, gpus)
    _check_knobs(knobs)
    check_gpus(knobs, machine)
    _check_split(model, knobs)
    _check_quantize(model, knobs, gpus)
    _check_kernels(model, knobs, gpus)
    _check_blocks(model, knobs, gpus)
    _check_cache(knobs)
    _check_attention(model, knobs, gpus)
    _check_pooling(model, knobs)
    check_n_ctx(model, workload)


def fp8_gpus(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Those with FP8 arithmetic."""
    return tuple(
        gpu
        for gpu in gpus
        if gpu.backend == "cuda"
        and gpu.compute_capability is not None
        and gpu.compute_capability >= FP8_FROM
    )


def _check_devices(machine: Machine, gpus: Sequence[Gpu]) -> None:
    other = [gpu for gpu in gpus if gpu.backend not in BACKENDS]
    if other:
        raise UsageError(
            f"safetensors models run on CUDA and ROCm GPUs or on the CPU, not on {other[0].name} "
            f"of {machine.name}",
            hint="a GGUF of the model runs there; `--vram 0` plans it for the CPU",
        )


def _check_knobs(knobs: Knobs) -> None:
    for flag, given in _llamacpp_only(knobs):
        if given:
            raise UsageError(
                f"`{flag}` is llama.cpp's, and a safetensors model runs with transformers",
                hint=f"leave `{flag}` out, or take a GGUF of the model",
            )


def _llamacpp_only(knobs: Knobs) -> Iterator[tuple[str, bool]]:
    yield "-ot", bool(knobs.overrides)
    yield "--n-cpu-moe", knobs.n_cpu_moe is not None
    yield "--n-cpu-ffn", knobs.n_cpu_ffn is not None
    yield "-b", knobs.n_batch is not None
    yield "--load-mode", knobs.load_mode is not None
    yield "--no-kv-offload", knobs.offload_kqv is not None
    yield "--no-op-offload", knobs.op_offload is not None
    yield "--op-offload-min-batch", knobs.op_offload_min_batch is not None
    yield "--swa-full", knobs.swa_full is not None
    yield "--lora", bool(knobs.adapters)


def _check_split(model: CheckpointSpec, knobs: Knobs) -> None:
    """`-ts` names the layers of every GPU: those that it leaves out would be the CPU's, unasked."""
    split = knobs.layers_per_device
    if split is None:
        return
    text = f"`-ts {','.join(map(str, split))}`"
    asked = model.n_layer if knobs.n_gpu_layers is None else knobs.n_gpu_layers
    asked, named = min(asked, model.n_layer), sum(split)
    if named == asked:
        return
    of = f"the {asked} layers of `{model.name}`"
    if knobs.n_gpu_layers is not None:
        raise UsageError(
            f"{text} places {named} layers, and `-ngl {asked}` asks for {asked}",
            hint=f"numbers of `-ts` are layers, and their sum is that of `-ngl`: {asked}",
        )
    less = f", or add `-ngl {named}` to keep {asked - named} on the CPU" if named < asked else ""
    raise UsageError(
        f"{text} places {named} of {of}",
        hint=f"numbers of `-ts` are layers: let their sum be {asked}{less}",
    )


def _check_quantize(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    stored = model.stored
    if stored is None:
        return
    if knobs.quantize not in (None, "none"):
        raise UsageError(
            f"`{model.name}` is {stored.label} already, and is not quantized again",
            hint="leave `--quantize` out, or take the checkpoint it was made from",
        )
    if not stored.runs and not gpus:
        raise UsageError(
            f"`{model.name}` is {stored.label}, whose kernels are for CUDA GPUs",
            hint="take the unquantized checkpoint and `--quantize nf4`, or a GGUF of it",
        )
    shared = knobs.n_gpu_layers is not None and 0 < knobs.n_gpu_layers < model.n_layer
    if shared and gpus and stored.method in ("bnb4", "bnb8"):
        raise UsageError(
            f"`{model.name}` is {stored.label}, and bitsandbytes sends no quantized layers of the "
            "CPU to a GPU",
            hint="leave `-ngl` out, or take a GGUF of it",
        )


def _check_kernels(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    stored = model.stored
    method = knobs.quantize if stored is None else stored.method
    if method not in ("nf4", "fp4", "int8", "bnb4", "bnb8") or knobs.n_gpu_layers == 0:
        return
    older = too_old(gpus)
    if older:
        major, minor = older[0].compute_capability or (0, 0)
        label = method.upper() if stored is None else stored.label
        raise UsageError(
            f"{label} is bitsandbytes', which needs compute capability 6.0, and {older[0].name} "
            f"({older[0].id}) has {major}.{minor}",
            hint=f"a GGUF of the model runs there{_without(older, gpus)}",
        )


def too_old(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Those that bitsandbytes has no kernels for; of one that does not say its level it may."""
    return tuple(
        gpu
        for gpu in gpus
        if gpu.compute_capability is not None and gpu.compute_capability < BITSANDBYTES_FROM
    )


def _without(older: Sequence[Gpu], gpus: Sequence[Gpu]) -> str:
    """The flag that names the other GPUs alone; what `--vram` does not name has no budget."""
    kept = [gpu.id.removeprefix("gpu:") for gpu in gpus if gpu not in older]
    names = ",".join(f"{number}=100%" for number in kept)
    return f"; `--vram {names}` leaves it out" if kept else ""


def _check_blocks(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    odd = undivided_rows(model, knobs, gpus)
    if odd is not None:
        raise UsageError(
            f"`{model.name}` has rows of {odd} weights, which blocks of {BLOCK} do not divide: on "
            "the CPU bitsandbytes restores them wrongly",
            hint="`--quantize int8` of the unquantized checkpoint has no blocks; on a CUDA GPU "
            "4 bits are right too",
        )


def undivided_rows(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> int | None:
    """The width of rows that 4 bits on the CPU would spoil; None: there are none.

    With AVX-512 bitsandbytes 0.50.2 restores rows of, say, 80 weights with the scales of other
    blocks, and says nothing; with AVX-512 BF16 its own packing of them cannot work either.
    """
    if gpus and knobs.n_gpu_layers != 0:
        return None
    return next((width for width in _four_bit_rows(model, knobs) if width % BLOCK), None)


def _four_bit_rows(model: CheckpointSpec, knobs: Knobs) -> Iterator[int]:
    """The widths of matrices in NF4 or FP4; of those that are stored so, by the config."""
    if model.stored is not None:
        yield from (model.n_embd, model.n_ff) if model.stored.method == "bnb4" else ()
    elif knobs.quantize in ("nf4", "fp4"):
        for tensor in model.tensors:
            if tensor.role == "linear" and tensor.name.endswith(".weight"):
                yield tensor.shape[-1]


def _check_cache(knobs: Knobs) -> None:
    for flag, given in (("-ctk", knobs.type_k), ("-ctv", knobs.type_v)):
        if given is not None and given not in CACHE_TYPES:
            raise UsageError(
                f"`{flag} {given}` is a type of llama.cpp's caches",
                hint=f"transformers keeps {', '.join(CACHE_TYPES)}",
            )


def _check_attention(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    if knobs.flash_attn is not True:
        return
    older = [gpu for gpu in gpus if not has_flash(gpu)]
    if older or not gpus:
        where = older[0].name if older else "a CPU"
        raise UsageError(
            f"`-fa on`: flash attention needs compute capability 8.0, and this is {where}",
            hint="leave `-fa` out: torch's own attention (SDPA) takes what the hardware has",
        )
    if model.softcap:
        raise UsageError(
            f"`-fa on`: `{model.name}` caps its scores, which no flash kernel does",
            hint="leave `-fa` out: attention is spelled out then",
        )


def _check_pooling(model: CheckpointSpec, knobs: Knobs) -> None:
    if knobs.pooling is None and not model.writes_text:
        raise UsageError(
            f"`{model.name}` writes no text: it was saved without `lm_head`, for vectors alone",
            hint="`loadmaster serve` gives them at `/v1/embeddings`",
        )
    if knobs.pooling == "rank":
        raise UsageError(
            "the transformers engine ranks no documents", hint="take a GGUF of a reranker"
        )
    if knobs.pooling is not None and model.dense_after_pooling:
        raise UsageError(
            f"`{model.name}` puts its vectors through a dense layer, which is not loaded",
            hint="take a GGUF of the model, or another one for embeddings",
        )
