"""What is CUDA's alone: its devices, and the cap that torch keeps for itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from loadmaster.engine.types import DeviceFacts
from loadmaster.errors import EngineRefusedError
from loadmaster.units import Bytes

_CPU = "cpu"


def torch_device(device: str) -> Any:
    """`gpu:1` as torch names it."""
    return torch.device(_CPU if device == _CPU else f"cuda:{device.removeprefix('gpu:')}")


def device_id(name: str) -> str:
    """`cuda:1` as we name it."""
    return f"gpu:{name.removeprefix('cuda:')}" if name.startswith("cuda") else name


def devices() -> tuple[DeviceFacts, ...]:
    """The GPUs that torch sees; this makes a context on each."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            DeviceFacts(
                id=f"gpu:{index}",
                engine_name=f"cuda:{index}",
                description=torch.cuda.get_device_name(index),
                total_bytes=Bytes(total),
                free_bytes=Bytes(free),
            )
        )
    return tuple(found)


def check_present(wanted: Iterable[str]) -> None:
    """Raises EngineRefusedError: the plan is for a GPU that torch does not see."""
    n_gpus = torch.cuda.device_count()
    missing = sorted(d for d in wanted if d != _CPU and int(d.removeprefix("gpu:")) >= n_gpus)
    if missing:
        raise EngineRefusedError(
            f"the plan has weights on {missing[0]}, torch {torch.__version__} sees {n_gpus} GPUs",
            hint="plan again on this machine, or install a torch that is built for its GPU",
        )


def cap(caps: Mapping[str, int]) -> None:
    """Have torch refuse to allocate more than so many bytes on a device."""
    for device, limit_bytes in caps.items():
        if device == _CPU:
            continue
        place = torch_device(device)
        total = torch.cuda.get_device_properties(place).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes) / total), place)


def release() -> None:
    """Give back what torch keeps for later."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
