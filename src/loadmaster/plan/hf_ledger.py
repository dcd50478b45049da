"""The ledger of a checkpoint under the transformers engine: every byte on every device. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadmaster.machine.types import Gpu
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan import hf_memory
from loadmaster.plan.hf_caches import cache_allocations
from loadmaster.plan.hf_loading import device_loading, host_loading
from loadmaster.plan.hf_weights import (
    BLOCK,
    LoadedTensor,
    device_of,
    loaded_tensors,
    written_out_in_parts,
)
from loadmaster.plan.types import (
    CPU,
    Budget,
    DevicePlan,
    Kind,
    MemoryItem,
    Overheads,
    Source,
    TransformersSettings,
)
from loadmaster.units import MIB, Bytes

# cuBLAS keeps a workspace for each handle and stream: 32 MiB on Hopper, 8 elsewhere
# (`_cublas` of torch's CUDABlas, CUBLAS_WORKSPACE_CONFIG), and cuBLASLt one of its own.
WORKSPACE_BYTES = 40 * MIB
# The worker: Python, torch, transformers and bitsandbytes, their private memory on a CPU build (299
# MiB after importing), and what the first steps leave (up to 11 more than their activations, 7 in
# the mean).
WORKER_BYTES = 312 * MIB
# CUDA's own memory on the host once a context is open.
CUDA_HOST_BYTES = 320 * MIB
# A token in the fast tokenizer: text, merges and their hash tables.
TOKENIZER_TOKEN_BYTES = 700
# torch's CPU kernels unpack a matrix to repack it: 32-bit values, and three copies of 8 bits.
REPACKING_BYTES_PER_WEIGHT = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class HfBooks:
    """What a ledger is kept for."""

    model: CheckpointSpec
    gpus: tuple[Gpu, ...]
    budget: Budget
    overheads: Overheads
    cpu_isa: tuple[str, ...] = ()

    @property
    def repacks(self) -> bool:
        """Whether the CPU's four-bit kernels want another layout, made at the first token."""
        return "avx512_bf16" in self.cpu_isa


def device_plans(books: HfBooks, settings: TransformersSettings) -> tuple[DevicePlan, ...]:
    """A `DevicePlan` for each GPU in use, then the host."""
    by_device = tensors_by_device(books.model, settings)
    caches = caches_by_device(books.model, settings)
    plans = []
    for gpu in books.gpus:
        tensors = by_device.get(gpu.id, [])
        drafted = _draft_items(books, gpu.id)
        if tensors or drafted:
            streams = gpu.id == streaming_gpu(settings)
            sent = _sent_bytes(by_device.get(CPU, [])) if streams else 0
            items = _gpu_items(books, settings, gpu, tensors, caches.get(gpu.id, []), sent)
            items += drafted
            plans.append(_plan(books, gpu.id, gpu.name, items))
    return (*plans, _host(books, settings, by_device.get(CPU, []), caches.get(CPU, []), len(plans)))


def _draft_items(books: HfBooks, device: str) -> list[MemoryItem]:
    return [item for item in books.overheads.draft_items if item.device == device]


def tensors_by_device(
    model: CheckpointSpec, settings: TransformersSettings
) -> dict[str, list[LoadedTensor]]:
    """Every loaded tensor by the device that the map gives it, in the order of loading: by name,
    so the output is first."""
    found: dict[str, list[LoadedTensor]] = {}
    for tensor in sorted(loaded_tensors(model, settings), key=lambda one: one.role != "output"):
        found.setdefault(device_of(tensor.name, settings.device_map), []).append(tensor)
    return found


def caches_by_device(
    model: CheckpointSpec, settings: TransformersSettings
) -> Mapping[str, list[int]]:
    """The cache tensors by device: a layer's cache is where the layer computes."""
    found: dict[str, list[int]] = {}
    for index in range(model.n_layer):
        device = compute_device(f"model.layers.{index}", settings)
        sizes = cache_allocations(model, [index], settings)
        found.setdefault(device, []).extend(sizes)
    return found


def compute_device(module: str, settings: TransformersSettings) -> str:
    """Where a module's products are made: weights of the CPU are sent to a GPU."""
    device = device_of(module, settings.device_map)
    return streaming_gpu(settings) or device if device == CPU else device


def streaming_gpu(settings: TransformersSettings) -> str | None:
    """The GPU that weights of the CPU are sent to: the one with the lowest number, wherever layers
    begin (`main_device` of accelerate's `dispatch_model`). None without a GPU."""
    gpus = {device for _, device in settings.device_map if device != CPU}
    return min(gpus, key=lambda device: int(device.removeprefix("gpu:")), default=None)


def _gpu_items(
    books: HfBooks,
    settings: TransformersSettings,
    gpu: Gpu,
    tensors: Sequence[LoadedTensor],
    caches: Sequence[int],
    sent_bytes: int,
) -> list[MemoryItem]:
    model, overheads = books.model, books.overheads
    weights = [size for tensor in tensors for size in tensor.allocations]
    held = sum(weights) + sum(caches)
    compute = hf_memory.activation_bytes(model, tensors, settings, sent_bytes)
    in_parts = written_out_in_parts(model, settings)
    reserved = hf_memory.reserved_bytes([*weights, *caches], _warmed(tensors, in_parts))
    loading = max(0, device_loading(model, tensors) - compute - sum(caches))
    rows: list[tuple[Kind, int, Source, str]] = [
        ("model", sum(weights), _weights_source(model), _weights_why(tensors)),
        ("kv", sum(caches), "header", _cache_why(settings)),
        ("compute", compute, "bound", f"activations, n_ubatch {settings.n_ubatch}"),
        ("overhead", reserved - held, "bound", "rounding of torch's allocator"),
        ("overhead", loading, "bound", "while loading: the largest matrix before it is quantized"),
        ("overhead", overheads.device_bytes.get(gpu.id, 0), overheads.device_source,
         f"{gpu.backend} context"),
        ("overhead", WORKSPACE_BYTES, "bound", "cuBLAS workspaces"),
    ]  # fmt: skip
    return _items(gpu.id, rows)


def _sent_bytes(on_host: Iterable[LoadedTensor]) -> int:
    """The most that a GPU has of the CPU's weights at a time: those of a module while it is
    multiplied with, of experts all of a layer."""
    sums: dict[tuple[int | None, str], int] = {}
    for tensor in on_host:
        key = tensor.layer, "experts" if tensor.role == "expert" else tensor.module
        sums[key] = sums.get(key, 0) + tensor.size_bytes
    return max(sums.values(), default=0)


def _warmed(tensors: Iterable[LoadedTensor], in_parts: bool) -> int:
    """What the engine expects the weights to take (`get_total_byte_count`): without the scales that
    bitsandbytes makes with the data; ours are parameters."""
    return sum(sum(t.allocations) if in_parts else t.allocations[0] for t in tensors)


def _host(
    books: HfBooks,
    settings: TransformersSettings,
    tensors: Sequence[LoadedTensor],
    caches: Sequence[int],
    n_gpus: int,
) -> DevicePlan:
    model = books.model
    weights = sum(tensor.size_bytes for tensor in tensors)
    # Weights of the CPU are sent to a GPU that has some; beside a draft's GPU they stay.
    on_gpu = any(device != CPU for _, device in settings.device_map)
    compute = 0 if on_gpu else hf_memory.activation_bytes(model, tensors, settings)
    repacked, unpacking = _repacking(books, tensors)
    loading = max(0, host_loading(model, settings, tensors, n_gpus) - compute - sum(caches))
    logits = hf_memory.sampling_bytes(model, settings) if on_gpu else 0
    n_rows = hf_memory.n_outputs(settings)
    template = 11 * MIB if model.chat_template else 0
    rows: list[tuple[Kind, int, Source, str]] = [
        ("model", weights, _weights_source(model), _weights_why(tensors)),
        ("kv", sum(caches), "header", _cache_why(settings)),
        ("compute", max(compute, unpacking), "bound", f"activations, n_ubatch {settings.n_ubatch}"),
        ("output", logits, "bound", f"logits as they are sampled from, {n_rows} outputs"),
        ("overhead", repacked, "header", "scales as the CPU's kernels want them"),
        ("overhead", loading, "bound", "while loading: the largest tensor on its way"),
        ("overhead", books.overheads.process_bytes, books.overheads.process_source,
         "parent and worker process"),
        ("overhead", WORKER_BYTES, "bound", "Python, torch, transformers"),
        ("overhead", CUDA_HOST_BYTES if n_gpus else 0, "bound", "CUDA's side of the host"),
        ("overhead", model.n_vocab * TOKENIZER_TOKEN_BYTES, "bound",
         f"tokenizer, {model.n_vocab:,} entries"),
        ("overhead", template, "bound", "the chat template's process"),
    ]  # fmt: skip
    return _plan(books, CPU, "host RAM", _items(CPU, rows) + _draft_items(books, CPU))


def _repacking(books: HfBooks, tensors: Iterable[LoadedTensor]) -> tuple[int, int]:
    """What scales grow by when the CPU's kernels repack four-bit matrices to BF16 scales, and what
    repacking the largest of them holds (`_convert_weight_packed_for_cpu`)."""
    four_bit = [tensor for tensor in tensors if tensor.kind in ("nf4", "fp4")]
    if not books.repacks or not four_bit:
        return 0, 0
    grown = 0
    for tensor in four_bit:
        scales = -(-tensor.n_elements // BLOCK)
        kept = sum(tensor.allocations[1:])
        grown += max(0, 2 * scales + 64 - kept)
    return grown, max(t.n_elements for t in four_bit) * REPACKING_BYTES_PER_WEIGHT


def _weights_source(model: CheckpointSpec) -> Source:
    """Formulas of formats that other libraries unpack are bounds."""
    return "header" if model.stored is None or model.stored.runs else "bound"


def _weights_why(tensors: Sequence[LoadedTensor]) -> str:
    layers = {tensor.layer for tensor in tensors if tensor.layer is not None}
    sums: dict[str, int] = {}
    for tensor in tensors:
        if tensor.role not in ("statistic", "buffer"):
            sums[tensor.kind] = sums.get(tensor.kind, 0) + tensor.size_bytes
    total = sum(sums.values()) or 1
    parts = [
        f"{kind.upper()} {100 * size / total:.0f} %"
        for kind, size in sorted(sums.items(), key=lambda pair: -pair[1])
        if 200 * size >= total
    ]
    return f"{len(layers)} layers: {', '.join(parts)}" if parts else "tables"


def _cache_why(settings: TransformersSettings) -> str:
    same = settings.type_k == settings.type_v
    types = settings.type_k if same else f"{settings.type_k}/{settings.type_v}"
    sequences = "1 sequence" if settings.n_seq_max == 1 else f"{settings.n_seq_max} sequences"
    return f"{types}, n_ctx {settings.n_ctx}, {sequences}"


def _items(device: str, rows: Iterable[tuple[Kind, int, Source, str]]) -> list[MemoryItem]:
    return [
        MemoryItem(device=device, kind=kind, bytes=Bytes(size), source=source, why=why)
        for kind, size, source, why in rows
    ]


def _plan(books: HfBooks, device: str, name: str, items: Iterable[MemoryItem]) -> DevicePlan:
    return DevicePlan(
        id=device,
        name=name,
        budget_bytes=books.budget.cap(device),
        budget_origin=books.budget.origin.get(device, "not given"),
        items=tuple(item for item in items if item.bytes),
        mapped_bytes=Bytes(0),
    )
