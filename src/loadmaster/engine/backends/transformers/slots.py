"""Keys and values of every sequence: a slot of cells for each, allocated once, in every layer.

A slot holds its sequence's cells from position 0 on; in layers with a sliding window, the window's
alone. So beginnings can be copied and tails dropped anywhere in a model without windows, and only
where a sequence stands in one that has them.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loadmaster.engine.backends.transformers.cells import LayerCells
from loadmaster.engine.backends.transformers.kept import check_type, new_kept
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.units import Bytes

_STATE = struct.Struct("<4sIIII")  # of a saved state: mark, layers, its bytes a cell, cells, first
_MARK = b"LMHF"


class Slots:
    """`n_slots` sequences of up to `n_cells` cells; a layer's tensors are made at its first use."""

    def __init__(
        self, *, n_slots: int, n_cells: int, windows: Sequence[int | None], type_k: str, type_v: str
    ) -> None:
        """Raises EngineRefusedError for a type that these caches do not have."""
        self.n_slots, self.n_cells = n_slots, n_cells
        self._windows = tuple(windows)
        rings = [window for window in windows if window is not None and window < n_cells]
        self.ring = min(rings, default=None)  # the fewest cells that a layer keeps
        self._types = (check_type(type_k), check_type(type_v))
        self._layers: dict[int, LayerCells] = {}
        self._lengths = [0] * n_slots
        self._firsts = [0] * n_slots  # where the cells begin that every layer still has

    def layer(self, index: int, key: Any, value: Any) -> LayerCells:
        """A layer's cells; new ones as wide and where these keys and values of a step are, (1,
        head, token, width)."""
        found = self._layers.get(index)
        if found is None:
            window = self._windows[index]
            is_ring = window is not None and window < self.n_cells
            n_cells = window if window is not None and is_ring else self.n_cells
            keys, values = (
                new_kept(kind, (self.n_slots, like.shape[1], n_cells, like.shape[3]), like)
                for like, kind in zip((key, value), self._types, strict=True)
            )
            found = self._layers[index] = LayerCells(keys, values, window, is_ring=is_ring)
        return found

    def __iter__(self) -> Iterator[Any]:
        """Every tensor, layer by layer."""
        for index in sorted(self._layers):
            yield from self._layers[index].tensors

    def bytes_by_device(self) -> dict[str, Bytes]:
        """What they take, by torch's names of devices."""
        sums: dict[str, Bytes] = {}
        for tensor in self:
            device = str(tensor.device)
            sums[device] = Bytes(sums.get(device, 0) + tensor.nbytes)
        return sums

    # -- sequences

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def begin(self, slot: int, end: int) -> None:
        """Cells up to `end` are about to be written; in a ring they take the place of others."""
        if self.ring is not None:
            self._firsts[slot] = max(self._firsts[slot], end - self.ring)

    def written(self, slot: int, end: int) -> None:
        """They are."""
        self._lengths[slot] = end

    def _reaches(self, slot: int, n: int) -> bool:
        """Whether a sequence has all that the tokens after its first `n` need."""
        needed = 0 if self.ring is None else max(0, n + 1 - self.ring)
        return n <= self._lengths[slot] and self._firsts[slot] <= needed

    def remove(self, slot: int, start: int) -> bool:
        """Drop cells from `start` on. False: all are dropped, it cannot go on from there."""
        reached = start == 0 or self._reaches(slot, start)
        self._lengths[slot] = start if reached else 0
        if self._lengths[slot] == 0:
            self._firsts[slot] = 0
        return reached

    def clear(self) -> None:
        for slot in range(self.n_slots):
            self.remove(slot, 0)

    def share(self, source: int, slot: int, n: int) -> bool:
        """Copy the first `n` cells of a sequence; False when they are not all there any more."""
        if n == 0:
            return True
        if not self._reaches(source, n):
            return False
        if source != slot:
            with torch.inference_mode():
                for tensor in self:
                    end = min(n, tensor.shape[2])
                    tensor[slot, :, :end].copy_(tensor[source, :, :end])
        self._lengths[slot], self._firsts[slot] = n, self._firsts[source]
        return True

    # -- states

    @property
    def _layer_bytes(self) -> int:
        """A cell in every layer: what tells one model's states from another's."""
        return sum(_cell_bytes(tensor) for tensor in self)

    def state_bytes(self, start: int, end: int) -> int:
        """A saved state of these cells."""
        return _STATE.size + sum(
            _cell_bytes(tensor) * (min(end, int(tensor.shape[2])) - start) for tensor in self
        )

    def save(self, slot: int, start: int = 0) -> bytes:
        """The cells of a sequence from `start` on; from 0, where a layer keeps a window alone."""
        end = self._lengths[slot]
        if start > end or (start and self.ring is not None):
            raise EngineError(f"sequence {slot} has {end} cells, it is not saved from {start} on")
        header = _STATE.pack(
            _MARK, len(self._layers), self._layer_bytes, end - start, self._firsts[slot]
        )
        return header + b"".join(
            _raw(tensor[slot, :, start : min(end, tensor.shape[2])]) for tensor in self
        )

    def restore(self, slot: int, state: bytes, start: int) -> None:
        """Raises EngineRefusedError when it is of another model or there are no cells for it."""
        n, first = self._described(state, start)
        if start > self._lengths[slot] or start + n > self.n_cells:
            raise EngineRefusedError(f"there is no room for a saved state of {n} cells at {start}")
        with torch.inference_mode():
            self._fill(slot, start, start + n, bytearray(state))
        self._lengths[slot], self._firsts[slot] = start + n, first

    def _fill(self, slot: int, start: int, end: int, state: bytearray) -> None:
        at = _STATE.size
        for tensor in self:
            part = tensor[slot, :, start : min(end, tensor.shape[2])]
            if part.numel():
                saved = torch.frombuffer(state, dtype=tensor.dtype, count=part.numel(), offset=at)
                part.copy_(saved.view(part.shape))
            at += part.numel() * tensor.element_size()

    def _described(self, state: bytes, start: int) -> tuple[int, int]:
        """How many cells a state holds, and where those begin that every layer has."""
        if len(state) >= _STATE.size:
            mark, n_layer, layer_bytes, n, first = _STATE.unpack_from(state)
            ours = (mark, n_layer, layer_bytes) == (_MARK, len(self._layers), self._layer_bytes)
            if ours and len(state) == self.state_bytes(start, start + n):
                return n, first
        raise EngineRefusedError(
            f"the engine refused a saved state of {len(state)} bytes: it is of another model"
        )


def _cell_bytes(tensor: Any) -> int:
    return int(tensor.shape[1] * tensor.shape[3] * tensor.element_size())


def _raw(tensor: Any) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return data
