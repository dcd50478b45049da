"""Memory outside the engine's buffers: GPU context, worker process, tokenizer, work buffers.

None of it is in the engine's own breakdown. Device figures are calibrated on the machine (measured
total less breakdown, after the peak was committed) or, until then, bounds from published reports.
Host figures were fitted to measured worker processes; `docs/log.md` has the runs.
"""

from collections.abc import Sequence

from loadmaster.machine.types import Gpu
from loadmaster.model.types import ModelSpec
from loadmaster.plan import memory
from loadmaster.plan.types import CPU, EngineSettings, MemoryItem, Overheads, Source
from loadmaster.units import MIB, Bytes

# CUDA context and kernels (107–555 MiB reported), cuBLAS workspace (4 or 32 MiB), the first growth
# of the scratch pool and graphs: the highest reported, rounded up.
CUDA_CONTEXT_BYTES = 640 * MIB
ROCM_CONTEXT_BYTES = 640 * MIB
VULKAN_CONTEXT_BYTES = 256 * MIB
METAL_CONTEXT_BYTES = 64 * MIB
_CONTEXT_BYTES = {
    "cuda": CUDA_CONTEXT_BYTES,
    "rocm": ROCM_CONTEXT_BYTES,
    "sycl": ROCM_CONTEXT_BYTES,
    "vulkan": VULKAN_CONTEXT_BYTES,
    "metal": METAL_CONTEXT_BYTES,
    "virtual": 0,
}

# Parent and worker before a model is open: two Python processes and the engine's libraries.
PROCESS_BYTES = 96 * MIB
# The engine's vocabulary: token text, hash maps and merges, per entry.
TOKENIZER_ENTRY_BYTES = 320
# Graph and scheduler metadata of one layer, for both graphs that the engine keeps.
GRAPH_LAYER_BYTES = 192 * 1024
# The CPU's work buffer holds one quantized activation row per token and matrix, at most this many
# bytes for each element of the widest row.
WORK_ELEMENT_BYTES = 2


def default_overheads(gpus: Sequence[Gpu]) -> Overheads:
    """Bounds for a machine where nothing has been calibrated."""
    return Overheads(
        device_bytes={gpu.id: Bytes(_CONTEXT_BYTES[gpu.backend]) for gpu in gpus},
        device_source="bound",
        process_bytes=Bytes(PROCESS_BYTES),
        process_source="bound",
    )


def host_items(
    model: ModelSpec, settings: EngineSettings, overheads: Overheads
) -> tuple[MemoryItem, ...]:
    """The host's memory outside the engine's buffers, the transient of loading included."""
    rows: list[tuple[int, Source, str]] = [
        (overheads.process_bytes, overheads.process_source, "parent and worker process"),
        (model.n_vocab * TOKENIZER_ENTRY_BYTES, "bound", f"tokenizer, {model.n_vocab:,} entries"),
        (model.n_layer * GRAPH_LAYER_BYTES, "bound", "graph metadata"),
        (work_bytes(model, settings), "bound", f"CPU work buffer, n_ubatch {settings.n_ubatch}"),
    ]
    items = [
        MemoryItem(device=CPU, kind="overhead", bytes=Bytes(size), source=source, why=why)
        for size, source, why in rows
    ]
    output = MemoryItem(
        device=CPU,
        kind="output",
        bytes=memory.output_bytes(model, settings),
        source="header",
        why=f"logits, {settings.n_outputs_max} outputs",
    )
    return (output, *items)


def work_bytes(model: ModelSpec, settings: EngineSettings) -> Bytes:
    """The CPU backend's scratch: activations of one ubatch, quantized for the widest matrix."""
    widest = max(model.n_ff, model.n_embd, 1)
    return Bytes(widest * settings.n_ubatch * WORK_ELEMENT_BYTES)


def staging_bytes(model: ModelSpec, settings: EngineSettings) -> Bytes:
    """The largest tensor passes through host memory on its way to a GPU (load mode `none`).

    It is gone before caches and compute buffers are allocated, so a plan counts what exceeds them.
    """
    if settings.n_gpu_layers == 0 and not settings.overrides:
        return Bytes(0)
    return max((tensor.size_bytes for tensor in model.tensors), default=Bytes(0))
