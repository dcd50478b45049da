"""GPUs that are not there: tensors say they are on one, and may not be mixed.

Every tensor is on the CPU. A mode between Python and torch keeps which storages are said to be on
which GPU: it answers when a tensor is asked for its device, moves by copying, and refuses what CUDA
refuses, an operation on tensors of two devices. Memory is not pretended: the functions of
`torch.cuda` that a load calls answer as of empty cards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from loadmaster.units import GIB

TOTAL_BYTES = 8 * GIB
_CPU = torch.device("cpu")
_MAY_MIX = frozenset({"copy_", "__set__", "_has_compatible_shallow_copy_type"})
_MOVES = frozenset({"to", "cpu", "cuda"})


class MixedError(RuntimeError):
    """An operation had tensors of two devices."""


@contextmanager
def pretended_gpus(n_gpus: int = 2, level: tuple[int, int] = (9, 0)) -> Iterator["PretendedGpus"]:
    """So many empty cards of a compute capability."""
    mode = PretendedGpus()
    card = SimpleNamespace(total_memory=TOTAL_BYTES)
    answers: dict[str, Any] = {
        "device_count": lambda: n_gpus,
        "get_arch_list": lambda: ["sm_80", "sm_90a", "compute_90"],
        "get_device_capability": lambda *_: level,
        "get_device_properties": lambda *_: card,
        "mem_get_info": lambda *_: (TOTAL_BYTES, TOTAL_BYTES),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "set_per_process_memory_fraction": mode.cap,
    }
    with mock.patch.multiple(torch.cuda, **answers), mode:
        yield mode


class PretendedGpus(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, tensors may say that they are on `cuda:N`."""

    def __init__(self) -> None:
        super().__init__()
        self.caps: dict[str, float] = {}  # of each device, and before anything was on it
        self._labels: dict[int, torch.device] = {}  # by where a storage begins

    def cap(self, fraction: float, device: torch.device) -> None:
        assert device not in self._labels.values()
        self.caps[str(device)] = fraction

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in _MOVES and args and isinstance(args[0], torch.Tensor):
            return self._moved(func, args, kwargs)
        asked = kwargs.get("device")
        place = None if asked is None else _device(asked)
        if place is not None and place.type == "cuda":
            kwargs["device"] = _CPU
        seen = self._common(name, args, kwargs) if name != "__setitem__" else self._set(args)
        if name == "histc":  # CUDA alone has it of whole numbers
            args = (args[0].float(), *args[1:])
        found = func(*args, **kwargs)
        self._label(found, place or seen)
        return found

    # -- labels

    def device(self, tensor: torch.Tensor) -> torch.device:
        """Where it says that it is."""
        real: torch.device = _real_device(tensor)
        if real.type != "cpu":
            return real
        return self._labels.get(tensor.untyped_storage().data_ptr(), real)

    def _label(self, found: Any, place: torch.device | None) -> None:
        for tensor in _tensors(found):
            at = tensor.untyped_storage().data_ptr()
            if not at or _real_device(tensor).type != "cpu":
                continue
            if place is None or place.type == "cpu":
                self._labels.pop(at, None)  # what was there before has been freed
            else:
                self._labels[at] = place

    # -- what is answered and done

    def _attribute(self, func: Any, tensor: torch.Tensor) -> Any:
        what = getattr(func.__self__, "__name__", "")
        if what == "device":
            return self.device(tensor)
        if what == "is_cuda":
            return self.device(tensor).type == "cuda"
        return func(tensor)

    def _moved(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensor, source = args[0], self.device(args[0])
        if func.__name__ == "cpu":
            return self._arrived(tensor.clone() if source.type == "cuda" else tensor, _CPU)
        device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **{
            key: value for key, value in kwargs.items() if key != "copy"
        })  # fmt: skip
        target = source if device is None else _device(device)
        if target.type == "meta" or source.type == "meta":
            return func(*args, **kwargs)
        copied = kwargs.get("copy", False) or target != source
        found = torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copied)
        return self._arrived(found, target)

    def _arrived(self, tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
        self._label(tensor, place)
        return tensor

    # -- what is refused

    def _set(self, args: Sequence[Any]) -> torch.device:
        """`tensor[at] = value`."""
        own = self.device(args[0])
        self._check_index(own, args[1])
        self._common("__setitem__", (args[0], args[2]), {})
        return own

    def _check_index(self, own: torch.device, index: Any) -> None:
        for one in _tensors(index):
            if self.device(one) not in (own, _CPU):
                raise MixedError(f"an index on {self.device(one)} into a tensor on {own}")

    def _common(self, name: str, args: Sequence[Any], kwargs: Any) -> torch.device | None:
        """The device of all tensors. A number in a tensor may be the CPU's, as may an index."""
        given = [one for one in _tensors((args, kwargs)) if one.untyped_storage().nbytes()]
        if name == "__getitem__":
            self._check_index(self.device(args[0]), args[1])
            given = [args[0]]
        places = {self.device(one) for one in given if one.ndim or self.device(one) != _CPU}
        places = {one for one in places if one.type != "meta"}
        if len(places) > 1 and name not in _MAY_MIX:
            raise MixedError(f"`{name}` of tensors on {' and '.join(sorted(map(str, places)))}")
        if name in _MAY_MIX and given:
            return self.device(given[0])
        return next(iter(places), _CPU if given else None)


def _real_device(tensor: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return tensor.device


def _device(named: Any) -> torch.device:
    return torch.device("cuda", named) if isinstance(named, int) else torch.device(named)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
