"""One layer's keys and values: a slot for each sequence, of all its cells or of a window's."""

from typing import Any

import torch

from loadmaster.engine.backends.transformers.packing import PackedStep, Part, first_cell


class LayerCells:
    """Tensors of the shape (slot, head, cell, width).

    Where only a window is kept, position `p` is in cell `p % window`: each token takes the place of
    the one that has just left its window. The order of cells means nothing to attention.
    """

    def __init__(self, keys: Any, values: Any, window: int | None, *, is_ring: bool) -> None:
        self.keys, self.values = keys, values
        self.window, self.is_ring = window, is_ring

    @property
    def n_cells(self) -> int:
        """Of each slot."""
        return int(self.keys.shape[2])

    def put_each(self, step: PackedStep, keys: Any, values: Any) -> None:
        """The new cells of all sequences that decode; (head, token, width), they come first."""
        n = len(step.decoding)
        if n == 1:
            one = step.decoding[0]
            cell = one.position % self.n_cells
            self.keys[one.seq_id, :, cell] = keys[:, 0]
            self.values[one.seq_id, :, cell] = values[:, 0]
        elif n:
            slots, places = step.cells(self.keys.device, self.n_cells)
            self.keys[slots, :, places] = keys[:, :n].transpose(0, 1).to(self.keys.dtype)
            self.values[slots, :, places] = values[:, :n].transpose(0, 1).to(self.values.dtype)

    def seen_by_each(self, part: Part) -> tuple[Any, Any, int]:
        """What a token of each sequence of a part sees, its own cell included; (slot, head, cell,
        width), and the position of the first cell. More than a sequence has is to be masked."""
        slots = slice(part.slot, part.slot + part.n_slots)
        first = 0 if self.is_ring else first_cell(part, self.window)
        cells = slice(first, min(part.end, self.n_cells))
        return self.keys[slots, :, cells], self.values[slots, :, cells], first

    def feed(self, part: Part, keys: Any, values: Any) -> tuple[Any, Any]:
        """Put a chunk of one sequence; what its tokens see, from `first_cell` on, (head, cell,
        width)."""
        start, first = part.positions[0], first_cell(part, self.window)
        if first == start or start == 0:
            seen = keys, values
        elif self.is_ring:
            old = torch.arange(first, start, device=keys.device) % self.n_cells
            seen = (
                torch.cat([self.keys[part.slot][:, old].to(keys.dtype), keys], dim=1),
                torch.cat([self.values[part.slot][:, old].to(values.dtype), values], dim=1),
            )
        else:
            self._put(part, keys, values)
            cells = slice(first, part.end)
            return self.keys[part.slot][:, cells], self.values[part.slot][:, cells]
        self._put(part, keys, values)
        return seen

    def _put(self, part: Part, keys: Any, values: Any) -> None:
        start, end = part.positions[0], part.end
        if end <= self.n_cells:
            self.keys[part.slot, :, start:end] = keys
            self.values[part.slot, :, start:end] = values
            return
        n_kept = min(part.n_tokens, self.n_cells)
        cells = torch.arange(end - n_kept, end, device=keys.device) % self.n_cells
        self.keys[part.slot][:, cells] = keys[:, -n_kept:].to(self.keys.dtype)
        self.values[part.slot][:, cells] = values[:, -n_kept:].to(self.values.dtype)
