"""A draft model beside a planned one: its settings, its lines in the ledger, what it may bring."""

from dataclasses import replace

from loadmaster.model.types import ModelSpec
from loadmaster.plan import hf_ledger
from loadmaster.plan.choices import Choice, base_settings
from loadmaster.plan.hf_ledger import HfBooks
from loadmaster.plan.ledger import Books, device_plans
from loadmaster.plan.types import (
    CPU,
    DRAFT_SEQUENCES,
    EngineSettings,
    Knobs,
    MemoryItem,
    Sizing,
    Source,
    TransformersSettings,
    Workload,
)
from loadmaster.units import Bytes

# It reads prompts in chunks of so many tokens: a smaller compute buffer than the model's own.
_N_UBATCH = 128
_BUFFERS = frozenset({"model", "kv", "recurrent", "compute"})
# Overheads that a second checkpoint has, too; the others belong to the process.
_OF_A_MODEL = frozenset({"rounding of torch's allocator", "scales as the CPU's kernels want them"})
# Host lines of a load that the process has once, whatever is loaded in it.
_ONCE = frozenset({"parent and worker process", "the chat template's process"})


def draft_settings(
    draft: ModelSpec, target: EngineSettings, device: str, *, n_gpus: int
) -> EngineSettings:
    """All of a draft model on one device, with as many cells as the model that it guesses for."""
    n_seq_max = min(target.n_seq_max, DRAFT_SEQUENCES)
    choice = Choice(
        n_ctx=target.n_ctx,
        type_k="f16",
        type_v="f16",
        n_ubatch=min(_N_UBATCH, target.n_ubatch),
        flash_attn=target.flash_attn,
    )
    workload = Workload(n_ctx=target.n_ctx, n_seq_max=n_seq_max, n_cells=target.n_ctx)
    # Cells are taken back after every step, further than a window's own cache reaches.
    knobs = Knobs(swa_full=True, op_offload=False, load_mode="none")
    base = base_settings(choice, workload, knobs, n_gpus=n_gpus, n_threads=target.n_threads)
    if device == CPU:
        return base
    count = draft.n_layer + 1
    shares = tuple(count if f"gpu:{i}" == device else 0 for i in range(n_gpus))
    return replace(base, n_gpu_layers=count, layers_per_device=shares)


def draft_items(
    books: Books, settings: EngineSettings, sizing: Sizing | None
) -> tuple[MemoryItem, ...]:
    """The ledger's lines of a draft model: its buffers by device as `draft`, and what else the
    worker has for a second model."""
    items: list[MemoryItem] = []
    source: Source = "bound" if sizing is None else "engine"
    for plan in device_plans(books, settings, sizing):
        buffers = Bytes(sum(item.bytes for item in plan.items if item.kind in _BUFFERS))
        if buffers:
            why = f"{books.model.name}: weights, {settings.n_ctx:,} cells, compute"
            items.append(
                MemoryItem(device=plan.id, kind="draft", bytes=buffers, source=source, why=why)
            )
        if plan.id == CPU:
            items += _host_extras(plan.items)
    return tuple(items)


def hf_draft_settings(target: TransformersSettings, device: str) -> TransformersSettings:
    """All of a checkpoint on one device, as it is stored, with slots as long as those of the model
    that it guesses for."""
    n_seq_max = min(target.n_seq_max, DRAFT_SEQUENCES)
    return replace(
        target,
        quantize="none",
        double_quant=False,
        device_map=(("", device),),
        n_ctx=target.n_ctx // target.n_seq_max * n_seq_max,
        n_seq_max=n_seq_max,
        n_ubatch=min(_N_UBATCH, target.n_ubatch),
        type_k=target.compute_type,
        type_v=target.compute_type,
        n_draft=0,
    )


def hf_draft_items(books: HfBooks, settings: TransformersSettings) -> tuple[MemoryItem, ...]:
    """The same of a checkpoint: weights and slots as `draft`, and what its steps take."""
    items: list[MemoryItem] = []
    for plan in hf_ledger.device_plans(books, settings):
        buffers = plan.of("model", "kv")
        if buffers:
            why = f"{books.model.name}: weights, {settings.n_ctx:,} cells"
            items.append(
                MemoryItem(device=plan.id, kind="draft", bytes=buffers, source="header", why=why)
            )
            items += [
                replace(item, kind="overhead", why=f"of the draft: {item.why}")
                for item in plan.items
                if item.kind == "compute" or item.why in _OF_A_MODEL
            ]
    return tuple(items)


def _host_extras(lines: tuple[MemoryItem, ...]) -> list[MemoryItem]:
    """Its tokenizer, graphs, logits and work buffer."""
    return [
        replace(item, kind="overhead", why=f"of the draft: {item.why}")
        for item in lines
        if item.kind in ("overhead", "output")
        and item.why not in _ONCE
        and not item.why.startswith("while loading")
    ]
