"""What is CUDA's alone: its devices, and the cap that torch keeps for itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from loadmaster.engine.types import DeviceFacts
from loadmaster.errors import EngineRefusedError
from loadmaster.units import Bytes

_CPU = "cpu"
_INSTALL = (
    "install a torch that is built for its GPU: `pip install --force-reinstall torch` brings "
    "CUDA's on Linux"
)


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


def prefer_flash() -> None:
    """Attention by kernels that take any length. On Hopper and newer server cards torch takes
    cuDNN's first (`check_prefer_cudnn_attention` of sdp_utils.cpp), which are built anew for each
    number of cells: in decode, for every token."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_present(wanted: Iterable[str]) -> None:
    """Raises EngineRefusedError: the plan is for a GPU that torch does not see, or has no kernels
    for."""
    gpus = {device: int(device.removeprefix("gpu:")) for device in sorted(wanted) if device != _CPU}
    n_gpus = torch.cuda.device_count()
    missing = [device for device, index in gpus.items() if index >= n_gpus]
    if missing:
        raise EngineRefusedError(
            f"the plan has weights on {missing[0]}, torch {torch.__version__} sees {n_gpus} GPUs",
            hint=f"plan again on this machine, or {_INSTALL}; `--vram 0` stays on the CPU",
        )
    for device, index in gpus.items():
        _check_kernels(device, index)


def _check_kernels(device: str, index: int) -> None:
    """A driver that is too old is found here, too: this is what first asks for CUDA itself."""
    try:
        level, built_for = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    except (RuntimeError, AssertionError) as error:
        raise EngineRefusedError(
            f"torch {torch.__version__} cannot use {device}: {words_of(error)}",
            hint=f"a newer driver, or {_INSTALL}; `--vram 0` stays on the CPU",
        ) from None
    levels = [_level(name) for name in built_for if name.startswith("sm_")]
    if levels and level < min(levels):
        raise EngineRefusedError(
            f"{device} has compute capability {level[0]}.{level[1]}, torch {torch.__version__} is "
            "built for {}.{} and newer".format(*min(levels)),
            hint="a GGUF of the model runs there with llama.cpp; `--vram 0` stays on the CPU",
        )


def _level(name: str) -> tuple[int, int]:
    """`sm_90a` as (9, 0)."""
    digits = name.removeprefix("sm_").rstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits[:-1]), int(digits[-1])


def cap(caps: Mapping[str, int]) -> None:
    """Have torch refuse to allocate more than so many bytes on a device."""
    for device, limit_bytes in caps.items():
        if device == _CPU:
            continue
        place = torch_device(device)
        total = torch.cuda.get_device_properties(place).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes) / total), place)


def words_of(error: BaseException) -> str:
    """What torch said, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def hint_of(error: BaseException) -> str | None:
    """What to type after a GPU had no memory left under its cap."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    return "`-c`, `-ub` or `-np` with less take less of it, a larger `--vram` gives it more"


def release() -> None:
    """Give back what torch keeps for later."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
