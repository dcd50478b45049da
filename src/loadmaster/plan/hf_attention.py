"""Which kernels attention gets under the transformers engine: what torch's SDPA picks. Pure.

As torch picks them (`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, 2.13): flash kernels
are FlashAttention-2, want 16 bits, compute capability 8.0 and no mask; the memory-efficient ones
take masks. Which one the engine got is read from the engine once a model is open.
"""

from collections.abc import Sequence

from loadmaster.machine.types import Gpu
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.types import TransformersSettings

FLASH_FROM = (8, 0)  # compute capability: Ampere
_WIDEST_HEAD = 256


def attention_text(
    gpus: Sequence[Gpu], model: CheckpointSpec, settings: TransformersSettings
) -> str:
    """What a plan says of attention."""
    if settings.attention == "eager":
        return "attention is spelled out, as `-fa off` asks: scores of all tokens are in memory"
    if model.softcap:
        return "attention is spelled out: the model caps its scores, which no flash kernel does"
    return f"attention is torch's SDPA: {kernels_text(gpus, widest_head(model))}"


def kernels_text(gpus: Sequence[Gpu], head_width: int = 0) -> str:
    """Which kernels SDPA has on these devices; without any, on the CPU."""
    if not gpus:
        return "its flash kernels for the CPU"
    older = [gpu for gpu in gpus if not has_flash(gpu)]
    if older:
        return f"memory-efficient kernels: {_level(older[0])}, flash wants 8.0"
    if head_width > _WIDEST_HEAD:
        return f"memory-efficient kernels: flash takes heads of up to {_WIDEST_HEAD} elements"
    return "FlashAttention-2, and memory-efficient kernels where sequences of a step are masked"


def has_flash(gpu: Gpu) -> bool:
    """Whether torch's flash kernels run there; of a GPU that does not say its level they may."""
    return gpu.compute_capability is None or gpu.compute_capability >= FLASH_FROM


def widest_head(model: CheckpointSpec) -> int:
    """Elements of the widest head's keys."""
    return max((one.k_width // max(1, one.n_head_kv) for one in model.layers), default=0)


def _level(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability or (0, 0)
    return f"{gpu.name} has compute capability {major}.{minor}"
