"""What a request for a checkpoint must be before it is planned: each refusal says what to type."""

from collections.abc import Iterator, Sequence

from loadmaster.errors import UsageError
from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_memory import CACHE_TYPES
from loadmaster.plan.types import Knobs, Workload

# GPUs that torch and bitsandbytes drive.
BACKENDS = ("cuda", "rocm")
FP8_FROM = (8, 9)  # compute capability: Ada, Hopper
FLASH_FROM = (8, 0)


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
    _check_quantize(model, knobs, gpus)
    _check_cache(knobs)
    _check_attention(knobs, gpus)
    if workload.n_ctx is not None and workload.n_ctx > model.n_ctx_train > 0:
        raise UsageError(
            f"n_ctx {workload.n_ctx} is beyond the {model.n_ctx_train} tokens that `{model.name}` "
            "was trained for",
            hint=f"`--ctx {model.n_ctx_train}` is the most it takes",
            numbers={"n_ctx": workload.n_ctx, "n_ctx_train": model.n_ctx_train},
        )


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


def _check_quantize(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    if model.stored is not None:
        _check_stored(model, knobs, gpus)
        return
    if knobs.quantize != "fp8":
        return
    if not gpus or knobs.n_gpu_layers is not None:
        raise UsageError(
            "`--quantize fp8` needs all layers on GPUs with FP8 arithmetic",
            hint="`--quantize int8` and `--quantize nf4` run on the CPU too",
        )
    _require_fp8(gpus, "`--quantize fp8`", "`--quantize int8` has as many bits, on any CUDA GPU")


def _check_stored(model: CheckpointSpec, knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    assert model.stored is not None
    label = model.stored.label
    if knobs.quantize not in (None, "none"):
        raise UsageError(
            f"`{model.name}` is {label} already, and is not quantized again",
            hint="leave `--quantize` out, or take the checkpoint it was made from",
        )
    if model.stored.method in ("fp8", "fbgemm-fp8"):
        hint = "take the unquantized checkpoint and `--quantize nf4` or `int8`"
        if not gpus:
            raise UsageError(
                f"`{model.name}` is FP8, which the CPU does not compute with: transformers would "
                "make BF16 of it, twice the size",
                hint=hint,
            )
        _require_fp8(gpus, f"`{model.name}` is FP8 and", hint)
    elif model.stored.method in ("gptq", "awq", "compressed-tensors") and not gpus:
        raise UsageError(
            f"`{model.name}` is {label}, whose kernels are for CUDA GPUs",
            hint="take the unquantized checkpoint and `--quantize nf4`, or a GGUF of it",
        )


def _require_fp8(gpus: Sequence[Gpu], what: str, hint: str) -> None:
    able = fp8_gpus(gpus)
    for gpu in gpus:
        if gpu not in able:
            found = gpu.compute_capability
            level = f"{found[0]}.{found[1]}" if found else "unknown"
            raise UsageError(
                f"{what} needs compute capability 8.9, {gpu.name} has {level}: transformers would "
                "make BF16 of it, twice the size",
                hint=hint,
            )


def _check_cache(knobs: Knobs) -> None:
    for flag, given in (("-ctk", knobs.type_k), ("-ctv", knobs.type_v)):
        if given is not None and given not in CACHE_TYPES:
            raise UsageError(
                f"`{flag} {given}` is a type of llama.cpp's caches",
                hint=f"transformers keeps {', '.join(CACHE_TYPES)}",
            )


def _check_attention(knobs: Knobs, gpus: Sequence[Gpu]) -> None:
    if knobs.flash_attn is not True:
        return
    older = [gpu for gpu in gpus if gpu.compute_capability and gpu.compute_capability < FLASH_FROM]
    if older or not gpus:
        where = older[0].name if older else "a CPU"
        raise UsageError(
            f"`-fa on`: flash attention needs compute capability 8.0, and this is {where}",
            hint="leave `-fa` out: torch's own attention (SDPA) takes what the hardware has",
        )
