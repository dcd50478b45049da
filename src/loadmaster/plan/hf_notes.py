"""What a person should know of a plan for the transformers engine. Pure."""

from collections.abc import Iterator

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_attention import attention_text
from loadmaster.plan.hf_placement import Placed
from loadmaster.plan.hf_rates import launch_of, timed
from loadmaster.plan.hf_several import notes_of_several
from loadmaster.plan.hf_weights import loaded_tensors, written_out_in_parts
from loadmaster.plan.types import CPU, TransformersSettings, Workload
from loadmaster.units import format_size


def notes_of(
    machine: Machine, model: CheckpointSpec, placed: Placed, workload: Workload
) -> Iterator[str]:
    """What a person would ask about the plan."""
    settings = placed.settings
    yield from notes_of_several(machine, model, settings, placed.devices, workload)
    yield from _of_host(model, placed)
    if settings.pooling is not None and not model.writes_text:
        yield (
            f"saved without `lm_head`: planned for vectors ({settings.pooling} pooling) of texts "
            f"of up to {settings.n_ubatch} tokens, as `loadmaster serve` opens it"
        )
    yield from _of_weights(model, settings)
    used = {device.id for device in placed.devices}
    gpus = [gpu for gpu in machine.gpus if gpu.id in used]
    yield attention_text(gpus, model, settings)
    if gpus and (settings.compute_type, model.dtype) == ("f16", "bf16"):
        yield (
            "computed in F16, which ends at 65,504: a GPU here has no BF16 (compute capability 8.0)"
        )
    n_ctx = settings.n_ctx // settings.n_seq_max
    if workload.n_ctx is None and model.n_ctx_train > n_ctx:
        yield f"n_ctx {n_ctx} of the model's {model.n_ctx_train}: `-c N` asks for another"
    if any(timed(machine, device.id) for device in placed.devices):
        return
    if any(device.id != CPU for device in placed.devices):
        launch = 1000 * launch_of(machine, model, settings)
        yield (
            f"transformers launches every operation from Python: {launch:.2f} ms a layer, however "
            "little there is to read (published latencies, not measured here)"
        )
    elif settings.quantize != "none" or model.stored is not None:
        yield (
            "nothing is published of quantized decode on a CPU: its speed is not predicted before "
            "`loadmaster doctor --measure`"
        )


def _of_host(model: CheckpointSpec, placed: Placed) -> Iterator[str]:
    settings = placed.settings
    gpus = list(dict.fromkeys(device for _, device in settings.device_map if device != CPU))
    on_host = sum(
        name.startswith("model.layers.") and device == CPU for name, device in settings.device_map
    )
    if gpus and on_host:
        host = placed.devices[-1]
        kept = format_size(host.of("model") + host.mapped_bytes)
        plain = "" if written_out_in_parts(model, settings) else "unquantized, "
        yield (
            f"{on_host} layers stay on the CPU ({plain}{kept}): every token sends them over the "
            "link again"
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
    if model.stored is not None and not model.stored.runs:
        yield (
            f"{model.stored.label} needs kernels that the engine does not have: this plan is for "
            "its bytes, and for engines that do"
        )
    elif written_out_in_parts(model, settings):
        yield (
            f"matrices keep their bits and are written out in {settings.compute_type.upper()} for "
            "every product, a part at a time: a step of one token is slower than without "
            "quantization; activations are not quantized"
        )
    if model.skipped:
        size = format_size(sum(model.skipped.values()))
        yield f"{size} of the files are not loaded: {', '.join(sorted(model.skipped)[:3])}"
