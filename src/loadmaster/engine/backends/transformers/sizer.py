"""What a load takes: the plan's own sums, by the headers of the files as they are now."""

from pathlib import Path

from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.hf_ledger import caches_by_device, tensors_by_device
from loadmaster.plan.types import BufferSizes, Sizing, TransformersSettings
from loadmaster.units import Bytes


def size_of(path: Path, settings: TransformersSettings) -> Sizing:
    """Weights and caches of every device that has some."""
    model = read_checkpoint(path)
    tensors = tensors_by_device(model, settings)
    caches = caches_by_device(model, settings)
    rows = [
        BufferSizes(
            device=device,
            model_bytes=Bytes(sum(one.size_bytes for one in tensors.get(device, ()))),
            context_bytes=Bytes(sum(caches.get(device, ()))),
            compute_bytes=Bytes(0),
        )
        for device in sorted({*tensors, *caches})
    ]
    per_sequence = settings.n_ctx // settings.n_seq_max
    return Sizing(buffers=tuple(rows), n_ctx=per_sequence * settings.n_seq_max)
