"""The ledger of one set of engine settings: every byte on every device, with its source."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loadmaster.machine.types import Gpu, SizingRules
from loadmaster.model.types import ModelSpec
from loadmaster.plan import bounds, layout, memory, overhead
from loadmaster.plan.types import (
    CPU,
    Budget,
    DevicePlan,
    EngineSettings,
    Kind,
    MemoryItem,
    Overheads,
    Sizing,
    Source,
)
from loadmaster.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What a ledger is kept for: a model, the devices, their caps and what lies outside buffers."""

    model: ModelSpec
    gpus: tuple[Gpu, ...]
    budget: Budget
    overheads: Overheads
    cpu_isa: tuple[str, ...] = ()  # decides which weights are repacked on the host

    @property
    def rules(self) -> Mapping[str, SizingRules]:
        return {gpu.id: gpu.rules for gpu in self.gpus}


def sizing_key(settings: EngineSettings) -> EngineSettings:
    """The settings with everything set aside that does not change a buffer's size."""
    return replace(settings, load_mode="none", n_threads=1, n_threads_batch=1, adapters=())


def device_plans(
    books: Books, settings: EngineSettings, sizing: Sizing | None, *, check: bool = True
) -> tuple[DevicePlan, ...]:
    """The ledger: a `DevicePlan` for each GPU in use, then the host.

    With `sizing`, buffers are the engine's own figures; weights and caches get the source `header`
    where the header's formula says the same (`check`; a search leaves that to its end). Without
    it, compute buffers are bounds.
    """
    model, rules = books.model, books.rules
    weights: Mapping[str, Bytes] = {}
    caches: Mapping[str, Bytes] = {}
    states: Mapping[str, Bytes] = {}
    if check or sizing is None:
        repacked = memory.repacked_types(books.cpu_isa)
        weights = memory.model_bytes(model, settings, rules, repacked=repacked)
        caches = memory.kv_bytes(model, settings, rules)
        states = memory.recurrent_bytes(model, settings, rules)
    compute = bounds.bound_compute_bytes(model, settings, rules) if sizing is None else {}
    plans = []
    drafted = {item.device for item in books.overheads.draft_items}
    opened = {*layout.opened_gpus(settings), *drafted}
    for gpu in (gpu for gpu in books.gpus if gpu.id in opened):
        items = _buffers(gpu.id, settings, sizing, weights, caches, states, compute)
        items += _gpu_extras(books, settings, gpu)
        plans.append(_plan(books, gpu.id, gpu.name, items, Bytes(0)))
    items = _buffers(CPU, settings, sizing, weights, caches, states, compute)
    items += _host_extras(books, settings, items)
    mapped = Bytes(0)
    if settings.load_mode == "mmap":
        mapped = Bytes(sum(item.bytes for item in items if item.kind == "model"))
        items = [item for item in items if item.kind != "model"]
    plans.append(_plan(books, CPU, "host RAM", items, mapped))
    return tuple(plans)


def with_states(devices: Sequence[DevicePlan], settings: EngineSettings) -> tuple[DevicePlan, ...]:
    """The ledger with host RAM for the states of preempted sequences, where there can be any.

    They never take more than the caches they come from: who was preempted runs again before anyone
    new. Half of what is left stays free, and a mapped file's pages come first.
    """
    *gpus, host = devices
    if settings.n_seq_max == 1 or settings.pooling is not None:
        return tuple(devices)
    caches = sum(device.of("kv", "recurrent") for device in devices)
    room = max(0, host.left_bytes - host.mapped_bytes) // 2
    item = MemoryItem(
        device=CPU,
        kind="cache",
        bytes=Bytes(min(caches, room)),
        source="bound",
        why="states of preempted sequences, at most",
    )
    return (*gpus, replace(host, items=(*host.items, item)) if item.bytes else host)


def _plan(
    books: Books, device: str, name: str, items: Iterable[MemoryItem], mapped: Bytes
) -> DevicePlan:
    return DevicePlan(
        id=device,
        name=name,
        budget_bytes=books.budget.cap(device),
        budget_origin=books.budget.origin.get(device, "not given"),
        items=tuple(item for item in items if item.bytes),
        mapped_bytes=mapped,
    )


def _buffers(
    device: str,
    settings: EngineSettings,
    sizing: Sizing | None,
    weights: Mapping[str, Bytes],
    caches: Mapping[str, Bytes],
    states: Mapping[str, Bytes],
    compute_bounds: Mapping[str, Bytes],
) -> list[MemoryItem]:
    zero = Bytes(0)
    weight, cache, state = (table.get(device, zero) for table in (weights, caches, states))
    compute, compute_source = compute_bounds.get(device, zero), "bound"
    weight_source = cache_source = "header"
    if sizing is not None:
        engine = sizing.on(device)
        compute, compute_source = engine.compute_bytes, "engine"
        if engine.model_bytes != weight:
            weight, weight_source = engine.model_bytes, "engine"
        if engine.context_bytes != cache + state:
            cache, state, cache_source = engine.context_bytes, zero, "engine"
    rows: list[tuple[Kind, Bytes, str, str]] = [
        ("model", weight, weight_source, _weights_why(device, settings)),
        ("kv", cache, cache_source, _cache_why(settings)),
        ("recurrent", state, cache_source, f"{settings.n_seq_max} sequences"),
        ("compute", compute, compute_source, f"n_ubatch {settings.n_ubatch}"),
    ]
    return [
        MemoryItem(device=device, kind=kind, bytes=size, source=_source(source), why=why)
        for kind, size, source, why in rows
    ]


def _source(name: str) -> Source:
    return "header" if name == "header" else "engine" if name == "engine" else "bound"


def _gpu_extras(books: Books, settings: EngineSettings, gpu: Gpu) -> list[MemoryItem]:
    overheads = books.overheads
    items = [
        MemoryItem(
            device=gpu.id,
            kind="overhead",
            bytes=overheads.device_bytes.get(gpu.id, Bytes(0)),
            source=overheads.device_source,
            why=f"{gpu.backend} context, workspaces and pools",
        )
    ]
    return items + _adapters(settings, gpu.id) + _draft_items(books, gpu.id)


def _draft_items(books: Books, device: str) -> list[MemoryItem]:
    return [item for item in books.overheads.draft_items if item.device == device]


def _host_extras(
    books: Books, settings: EngineSettings, buffers: Sequence[MemoryItem]
) -> list[MemoryItem]:
    items = list(overhead.host_items(books.model, settings, books.overheads))
    items += _adapters(settings, CPU)
    items += _draft_items(books, CPU)
    transient = _loading_bytes(books, settings, (*buffers, *items))
    if transient > 0:
        items.append(
            MemoryItem(
                device=CPU,
                kind="overhead",
                bytes=Bytes(transient),
                source="bound",
                why="while loading: the file's string tables, the largest tensor",
            )
        )
    return items


def _loading_bytes(books: Books, settings: EngineSettings, items: Sequence[MemoryItem]) -> int:
    """What loading takes beyond what comes after it in the same memory."""
    later = sum(item.bytes for item in items if item.kind in _AFTER_LOADING)
    strings = overhead.header_strings_bytes(books.model)
    if settings.load_mode != "none":
        return strings - later
    staging = overhead.staging_bytes(books.model, settings, books.gpus)
    if staging + strings > later and any(gpu.rules.pinned_host for gpu in books.gpus):
        weights = sum(item.bytes for item in items if item.kind == "model")
        staging = Bytes(staging - max(0, weights - _kept_bytes(books.model, settings)))
    return strings + max(0, staging) - later


def _kept_bytes(model: ModelSpec, settings: EngineSettings) -> int:
    """Weights that overrides keep on the host: they are not in pinned memory, and come first."""
    overrides = layout.Overrides(settings.overrides)
    return sum(t.size_bytes for t in model.tensors if overrides.device(t) == CPU)


# Allocated after the weights, so they are not there while these are loaded.
_AFTER_LOADING = ("kv", "recurrent", "compute", "output")


def _adapters(settings: EngineSettings, device: str) -> list[MemoryItem]:
    """An adapter's matrices lie beside the weights they belong to; each device may get them all."""
    return [
        MemoryItem(
            device=device,
            kind="adapter",
            bytes=adapter.size_bytes,
            source="bound",
            why=f"LoRA {adapter.path}",
        )
        for adapter in settings.adapters
    ]


def _weights_why(device: str, settings: EngineSettings) -> str:
    away = sum(1 for override in settings.overrides if override.device == CPU)
    if device == CPU:
        return "weights kept on the CPU" + (", mapped from the file" if _mapped(settings) else "")
    share = settings.layers_per_device[int(device.removeprefix("gpu:"))]
    exceptions = ", less the matrices kept on the CPU" if away else ""
    return f"{share} of {settings.n_gpu_layers} GPU layers{exceptions}"


def _mapped(settings: EngineSettings) -> bool:
    return settings.load_mode == "mmap"


def _cache_why(settings: EngineSettings) -> str:
    types = (
        settings.type_k
        if settings.type_k == settings.type_v
        else (f"{settings.type_k}/{settings.type_v}")
    )
    sequences = "1 sequence" if settings.n_seq_max == 1 else f"{settings.n_seq_max} sequences"
    return f"{types}, n_ctx {settings.n_ctx}, {sequences}"
