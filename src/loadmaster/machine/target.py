"""Which GPUs of a machine an engine build can drive."""

from dataclasses import replace

from loadmaster.machine.rules import RULES
from loadmaster.machine.types import Gpu, Machine


def for_target(machine: Machine, target: str) -> Machine:
    """The machine as a build for `target` (`cpu`, `cuda`, `rocm`, `vulkan`, `metal`) sees it.

    GPUs it cannot drive are left out and the rest are numbered anew, as the engine numbers them.
    Stand-in devices live in the engine itself, so every build drives them.
    """
    kept = [gpu for gpu in (_driven(gpu, target) for gpu in machine.gpus) if gpu is not None]
    numbered = (replace(gpu, id=f"gpu:{index}") for index, gpu in enumerate(kept))
    return replace(machine, gpus=tuple(numbered))


def _driven(gpu: Gpu, target: str) -> Gpu | None:
    if gpu.backend == target or gpu.backend == "virtual":
        return gpu
    if target == "vulkan" and gpu.vendor in ("nvidia", "amd", "intel"):
        return replace(gpu, backend="vulkan", rules=RULES["vulkan"])
    if target == "rocm" and gpu.vendor == "amd":
        return replace(gpu, backend="rocm", rules=RULES["rocm"])
    return None
