"""The `vllm serve` command for who outgrows one GPU after another: flags from the plan. Pure.

Flags as vLLM 0.18 and later document them. The engine there is not ours: the command starts from
the same budget, context and quantization, and shards every matrix over the GPUs (tensor parallel),
so that all of them work at the same time. Small cells are vLLM's `int8_per_token_head` and
`int4_per_token_head` (vllm/config/cache.py at 002f10e0; the latter is vllm#40835, in 0.25.1).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_caches import cache_allocations
from loadmaster.plan.hf_checks import fp8_gpus
from loadmaster.plan.hf_weights import loaded_tensors
from loadmaster.plan.types import CPU, Budget, Plan, Quantize, TransformersSettings
from loadmaster.units import GIB, format_size

# What vLLM makes of weights while it loads them, as we call it; and the cells nearest to ours.
_FLAGS: Mapping[Quantize, str] = {"nf4": "bitsandbytes", "fp8": "fp8"}
_CELLS: Mapping[str, str] = {"q8_0": "int8_per_token_head", "q4_0": "int4_per_token_head"}
# Of a device's memory, what vLLM may take at most: the driver keeps some.
_MOST = 0.98
# Beside weights and cache on each GPU: context, activations and CUDA graphs, to the GiB.
_BESIDE_BYTES = 2 * GIB


def server_note(
    reference: str, model: CheckpointSpec, machine: Machine, plan: Plan, budget: Budget
) -> str | None:
    """Advice on tensor parallelism with its command, or why it is none; None without several of
    NVIDIA's GPUs, and where vectors are made."""
    settings = plan.engine
    gpus = [gpu for gpu in machine.gpus if gpu.backend == "cuda" and budget.cap(gpu.id) > 0]
    if not isinstance(settings, TransformersSettings) or len(gpus) < 2:
        return None
    if settings.pooling is not None or all(device.id == CPU for device in plan.devices):
        return None
    able = len(fp8_gpus(gpus)) == len(gpus)
    found = [
        (kind, shards)
        for kind in _kinds(model, settings, able=able)
        for shards in _shards(model, settings, kind, gpus, budget)
    ]
    if not found:
        together = format_size(sum(budget.cap(gpu.id) for gpu in gpus))
        weights = format_size(_weight_bytes(model, settings, settings.quantize))
        return (
            f"tensor parallelism is no way out: {weights} of weights are too much for the "
            f"{together} that {len(gpus)} GPUs have together"
        )
    kind, (tensor, pipeline) = found[0]
    used = sorted(_chosen(gpus, budget, tensor * pipeline), key=machine.gpus.index)
    words = [
        *_visible(machine, used),
        f"vllm serve {reference.removeprefix('hf:')}",
        *_flags(settings, _share(used, budget), tensor, pipeline),
        *([f"--quantization {_FLAGS[kind]}"] if kind != "none" else []),
        f"--kv-cache-dtype {_CELLS.get(_cell_type(settings), 'auto')}",
    ]
    advice = f"{_advice(model, tensor, pipeline)}: `{' '.join(words)}`"
    return "; ".join([advice, *_other_cells(settings, able=able)])


def _kinds(model: CheckpointSpec, settings: TransformersSettings, *, able: bool) -> list[Quantize]:
    """What vLLM can make of the weights, the nearest first. LLM.int8 it has not: FP8 has as many
    bits, where the hardware has it."""
    if model.stored is not None:
        return ["none"]
    if settings.quantize == "int8":
        return ["fp8"] if able else ["none", "nf4"]
    return ["nf4" if settings.quantize == "fp4" else settings.quantize]


def _cell_type(settings: TransformersSettings) -> str:
    """What vLLM's cells are like, which are of one type for keys and values: the wider of both."""
    types = {settings.type_k, settings.type_v}
    if types - {*_CELLS}:
        return settings.compute_type
    return "q8_0" if "q8_0" in types else "q4_0"


def _other_cells(settings: TransformersSettings, *, able: bool) -> Iterator[str]:
    """In what vLLM's cells differ from those of the plan."""
    kind, planned = _cell_type(settings), {settings.type_k, settings.type_v}
    if not planned & {*_CELLS}:
        return
    if len(planned) > 1:
        yield f"keys and values are of one type there, so both are as wide as {kind}"
    if kind in _CELLS:
        older = "has `fp8` for that" if able else "has nothing for that on these GPUs: `auto`"
        yield (
            f"`{_CELLS[kind]}` has a scale for each head of a token where {kind} has one for each "
            f"32 values, and vLLM before 0.25.1 {older}"
        )


def _advice(model: CheckpointSpec, tensor: int, pipeline: int) -> str:
    """What tensor parallelism gives, and what it asks of the links."""
    row = format_size(2 * model.n_embd)
    stages = f", {pipeline} groups of them one after another" if pipeline > 1 else ""
    return (
        f"all GPUs at the same time, for many users: tensor parallel over {tensor} GPUs{stages}, "
        f"each with 1/{tensor} of every matrix; {2 * model.n_layer} sums of {row} pass between "
        "them for each token, which wants NVLink or PCIe without a detour through the CPU"
    )


def _shards(
    model: CheckpointSpec,
    settings: TransformersSettings,
    kind: Quantize,
    gpus: Sequence[Gpu],
    budget: Budget,
) -> Iterator[tuple[int, int]]:
    """GPUs for each matrix and groups of them in a row, that hold the model; the widest first."""
    kept = _cell_type(settings)
    alike = replace(settings, type_k=kept, type_v=kept)
    cells = cache_allocations(model, range(model.n_layer), alike)
    whole = _weight_bytes(model, settings, kind) + sum(cells) / settings.n_seq_max
    for tensor in tensor_parallel(model, len(gpus)):
        for pipeline in range(1, len(gpus) // tensor + 1):
            used = _chosen(gpus, budget, tensor * pipeline)
            room = min(_share(used, budget) * gpu.total_bytes for gpu in used) - _BESIDE_BYTES
            if whole / (tensor * pipeline) <= room:
                yield tensor, pipeline


def _weight_bytes(model: CheckpointSpec, settings: TransformersSettings, kind: Quantize) -> int:
    """All weights as they are on GPUs, whatever share the plan leaves on the CPU."""
    on_gpu = replace(settings, device_map=(("", "gpu:0"),), quantize=kind)
    return sum(tensor.size_bytes for tensor in loaded_tensors(model, on_gpu))


def _chosen(gpus: Sequence[Gpu], budget: Budget, count: int) -> list[Gpu]:
    """The GPUs with the largest budgets."""
    return sorted(gpus, key=lambda gpu: -budget.cap(gpu.id))[:count]


def _share(gpus: Sequence[Gpu], budget: Budget) -> float:
    """Of a GPU's memory, what is inside the budget on each of them; rounded down, because a cap is
    never passed."""
    shares = [budget.cap(gpu.id) / gpu.total_bytes for gpu in gpus]
    return int(min(_MOST, *shares, _MOST) * 100) / 100


def _visible(machine: Machine, used: Sequence[Gpu]) -> list[str]:
    if len(used) == len(machine.gpus):
        return []
    return ["CUDA_VISIBLE_DEVICES=" + ",".join(gpu.id.removeprefix("gpu:") for gpu in used)]


def _flags(
    settings: TransformersSettings, share: float, tensor: int, pipeline: int
) -> Iterator[str]:
    yield f"--tensor-parallel-size {tensor}"
    if pipeline > 1:
        yield f"--pipeline-parallel-size {pipeline}"
    yield f"--gpu-memory-utilization {share:.2f}"
    yield f"--max-model-len {settings.n_ctx // settings.n_seq_max}"
    if settings.n_seq_max > 1:
        yield f"--max-num-seqs {settings.n_seq_max}"


def tensor_parallel(model: CheckpointSpec, n_gpus: int) -> list[int]:
    """Numbers of GPUs that share the heads evenly, the most first."""
    heads = [layer.n_head for layer in model.layers]
    keys = [layer.n_head_kv for layer in model.layers]
    return [
        size
        for size in range(n_gpus, 0, -1)
        if all(n % size == 0 for n in heads)
        and all(n % size == 0 or size % n == 0 for n in keys if n)
    ]
