"""What a request for a GGUF must be before it is planned: each refusal says what to type. Pure."""

from dataclasses import replace

from loadmaster.errors import UsageError
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import AnyModel
from loadmaster.model.types import ModelSpec
from loadmaster.plan.types import Knobs, Workload


def checked_knobs(machine: Machine, model: ModelSpec, workload: Workload, knobs: Knobs) -> Knobs:
    """The knobs, with `-ngl all` and `-ncmoe all` as what the model has.

    Raises:
        UsageError: the request contradicts the model, the machine or the engine build.
    """
    _check_quantize(knobs, model)
    check_n_ctx(model, workload)
    _check_draft(knobs, model)
    check_gpus(knobs, machine)
    return _clamped(knobs, model)


def check_n_ctx(model: AnyModel, workload: Workload) -> None:
    """Refuse more tokens than the model was trained for.

    Raises:
        UsageError: `n_ctx` is beyond the model's.
    """
    if workload.n_ctx is not None and workload.n_ctx > model.n_ctx_train > 0:
        raise UsageError(
            f"n_ctx {workload.n_ctx} is beyond the {model.n_ctx_train} tokens that `{model.name}` "
            "was trained for",
            hint=f"`--ctx {model.n_ctx_train}` is the most it takes",
            numbers={"n_ctx": workload.n_ctx, "n_ctx_train": model.n_ctx_train},
        )


def _check_quantize(knobs: Knobs, model: ModelSpec) -> None:
    if knobs.quantize is not None or knobs.double_quant is not None:
        raise UsageError(
            f"`{model.name}` is a GGUF in {model.quantization}, and `--quantize` "
            "is for safetensors",
            hint="leave `--quantize` out, or give a folder or a repository with safetensors",
        )


def _check_draft(knobs: Knobs, model: ModelSpec) -> None:
    if knobs.n_draft and knobs.pooling is None and model.is_recurrent:
        raise UsageError(
            f"`{model.name}` keeps a recurrent state: what a step fed cannot be taken back, and "
            "drafts need that",
            hint="leave `--draft` out",
        )


def check_gpus(knobs: Knobs, machine: Machine) -> None:
    """Refuse GPU layers where there is no GPU to hold them; llama.cpp ignores them instead.

    Raises:
        UsageError: `-ngl` or `-ts` is for GPUs that are not there.
    """
    split = knobs.layers_per_device or ()
    if len(split) > len(machine.gpus) > 0:
        raise UsageError(
            f"`-ts {','.join(map(str, split))}` is for {len(split)} GPUs, and {machine.name} has "
            f"{len(machine.gpus)}",
            hint="give as many numbers as there are GPUs, or leave `-ts` out",
        )
    if (knobs.n_gpu_layers or split) and not machine.gpus:
        flag = "-ngl" if knobs.n_gpu_layers else "-ts"
        raise UsageError(
            f"`{flag}` fixes layers on the GPU, and {machine.name} has none that this engine "
            "drives",
            hint=f"leave `{flag}` out; `loadmaster doctor` shows GPUs and engines",
        )


def _clamped(knobs: Knobs, model: ModelSpec) -> Knobs:
    def at_most(value: int | None, limit: int) -> int | None:
        return None if value is None else min(value, limit)

    return replace(
        knobs,
        n_gpu_layers=at_most(knobs.n_gpu_layers, model.n_layer + 1),
        n_cpu_moe=at_most(knobs.n_cpu_moe, model.n_layer),
        n_cpu_ffn=at_most(knobs.n_cpu_ffn, model.n_layer),
    )
