"""What a person should know of a plan for the transformers engine. Pure."""

from collections.abc import Iterator

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_placement import Placed
from loadmaster.plan.hf_speed import launch_of
from loadmaster.plan.hf_weights import loaded_tensors
from loadmaster.plan.types import CPU, TransformersSettings, Workload
from loadmaster.units import format_size


def notes_of(
    machine: Machine, model: CheckpointSpec, placed: Placed, workload: Workload
) -> Iterator[str]:
    """What a person would ask about the plan."""
    settings = placed.settings
    yield from _of_placement(placed)
    yield from _of_weights(model, settings)
    n_ctx = settings.n_ctx // settings.n_seq_max
    if workload.n_ctx is None and model.n_ctx_train > n_ctx:
        yield f"n_ctx {n_ctx} of the model's {model.n_ctx_train}: `-c N` asks for another"
    if any(device.id != CPU for device in placed.devices):
        launch = 1000 * launch_of(machine, model, settings)
        yield (
            f"transformers launches every operation from Python: {launch:.2f} ms a layer, however "
            "little there is to read (published latencies, not measured here)"
        )
    elif settings.quantize != "none" or model.stored is not None:
        yield "nothing is published of quantized decode on a CPU: its speed is not predicted"


def _of_placement(placed: Placed) -> Iterator[str]:
    settings = placed.settings
    gpus = list(dict.fromkeys(device for _, device in settings.device_map if device != CPU))
    on_host = sum(
        name.startswith("model.layers.") and device == CPU for name, device in settings.device_map
    )
    if len(gpus) > 1:
        yield (
            f"layers are split over {len(gpus)} GPUs and run one after another: for one sequence "
            f"{len(gpus) - 1} of {len(gpus)} wait at any moment"
        )
    if gpus and on_host:
        host = placed.devices[-1]
        kept = format_size(host.of("model") + host.mapped_bytes)
        yield (
            f"{on_host} layers stay on the CPU, unquantized ({kept}): every token sends them over "
            "the link again"
        )


def _of_weights(model: CheckpointSpec, settings: TransformersSettings) -> Iterator[str]:
    tensors = loaded_tensors(model, settings)
    if settings.quantize in ("nf4", "fp4", "int8"):
        experts = sum(tensor.size_bytes for tensor in tensors if tensor.role == "expert")
        if experts:
            yield (
                f"{format_size(experts)} of experts are not quantized: transformers stacks them, "
                "and bitsandbytes quantizes single matrices; a GGUF has them in 4 bits"
            )
        plain = sum(t.size_bytes for t in tensors if t.role in ("embedding", "output"))
        yield f"embedding and output stay in {settings.compute_type}: {format_size(plain)}"
    if settings.quantize == "fp8" or (model.stored and model.stored.method == "fp8"):
        yield (
            "FP8 products need a kernel that transformers downloads from the Hub, which loadmaster "
            "keeps off: this plan is for its bytes, and for engines with FP8 of their own"
        )
    if model.skipped:
        size = format_size(sum(model.skipped.values()))
        yield f"{size} of the files are not loaded: {', '.join(sorted(model.skipped)[:3])}"
