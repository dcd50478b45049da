"""The `vllm serve` command for who outgrows one sequence after another: flags from the plan. Pure.

Flags as vLLM 0.18 and later document them. The engine there is not ours: the command starts from
the same budget, context and quantization, and shards every matrix over the GPUs (tensor parallel),
so that all of them work at the same time.
"""

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_checks import fp8_gpus
from loadmaster.plan.types import CPU, Plan, TransformersSettings

# What vLLM makes of weights while it loads them; LLM.int8 it has not.
_QUANTIZATION = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "fp8": "fp8"}
# Of a device's memory, what vLLM may take at most: the driver keeps some.
_MOST = 0.98


def vllm_command(reference: str, model: CheckpointSpec, machine: Machine, plan: Plan) -> str | None:
    """The command for the GPUs of a plan; None where it has no GPU of NVIDIA's."""
    settings = plan.engine
    gpus = [gpu for gpu in machine.gpus if gpu.backend == "cuda"]
    if not isinstance(settings, TransformersSettings) or not gpus:
        return None
    if all(device.id == CPU for device in plan.devices):
        return None
    size = tensor_parallel(model, len(gpus))
    caps = {device.id: device.budget_bytes for device in plan.devices}
    shares = [caps[gpu.id] / gpu.total_bytes for gpu in gpus if gpu.id in caps]
    # Rounded down: the cap is never passed.
    share = int(min(_MOST, *shares, _MOST) * 100) / 100
    words = [
        f"vllm serve {reference.removeprefix('hf:')}",
        f"--tensor-parallel-size {size}",
        f"--gpu-memory-utilization {share:.2f}",
        f"--max-model-len {settings.n_ctx // settings.n_seq_max}",
    ]
    able = fp8_gpus(gpus)
    kind = _QUANTIZATION.get(settings.quantize)
    if settings.quantize == "int8" and len(able) == len(gpus):
        kind = "fp8"  # as many bits
    if kind is not None and model.stored is None:
        words.append(f"--quantization {kind}")
    words.append(f"--kv-cache-dtype {'fp8' if kind == 'fp8' else 'auto'}")
    return " ".join(words)


def tensor_parallel(model: CheckpointSpec, n_gpus: int) -> int:
    """The most GPUs that share the heads evenly."""
    heads = [layer.n_head for layer in model.layers]
    keys = [layer.n_head_kv for layer in model.layers]
    for size in range(n_gpus, 1, -1):
        even = all(n % size == 0 for n in heads)
        if even and all(n % size == 0 or size % n == 0 for n in keys):
            return size
    return 1
