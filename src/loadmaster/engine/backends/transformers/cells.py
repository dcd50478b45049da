"""One layer's keys and values: a slot for each sequence, of all its cells or of a window's."""

from typing import Any

import torch

from loadmaster.engine.backends.transformers.kept import Coded, Kept, put, take
from loadmaster.engine.backends.transformers.packing import PackedStep, Part, first_cell

_ALL = slice(None)


class LayerCells:
    """Keys and values of the shape (slot, head, cell, width).

    Where only a window is kept, position `p` is in cell `p % window`: each token takes the place of
    the one that has just left its window. The order of cells means nothing to attention.
    """

    def __init__(self, keys: Kept, values: Kept, window: int | None, *, is_ring: bool) -> None:
        self.keys, self.values = keys, values
        self.window, self.is_ring = window, is_ring
        self.n_cells = int(keys.tensors[0].shape[2])  # of each slot

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (*self.keys.tensors, *self.values.tensors)

    def put_each(self, step: PackedStep, keys: Any, values: Any) -> None:
        """The new cells of all sequences that decode; (head, token, width), they come first."""
        n = len(step.decoding)
        if n == 1:
            one = step.decoding[0]
            at = (one.seq_id, _ALL, one.position % self.n_cells)
            put(self.keys, at, self.keys.code(keys[:, 0]))
            put(self.values, at, self.values.code(values[:, 0]))
        elif n:
            slots, places = step.cells(keys.device, self.n_cells)
            for kept, rows in ((self.keys, keys), (self.values, values)):
                put(kept, (slots, _ALL, places), kept.code(rows[:, :n].transpose(0, 1)))

    def seen_by_each(self, part: Part) -> tuple[Any, Any, int]:
        """What a token of each sequence of a part sees, its own cell included; (slot, head, cell,
        width), and the position of the first cell. More than a sequence has is to be masked."""
        slots = slice(part.slot, part.slot + part.n_slots)
        first = 0 if self.is_ring else first_cell(part, self.window)
        at = (slots, _ALL, slice(first, min(part.end, self.n_cells)))
        return take(self.keys, at), take(self.values, at), first

    def feed(self, part: Part, keys: Any, values: Any) -> tuple[Any, Any]:
        """Put a chunk of one sequence; what its tokens see, from `first_cell` on, (head, cell,
        width)."""
        return self._feed(part, self.keys, keys), self._feed(part, self.values, values)

    def _feed(self, part: Part, kept: Kept, rows: Any) -> Any:
        start, first = part.positions[0], first_cell(part, self.window)
        coded = kept.code(rows)
        slot = slice(part.slot, part.slot + 1)
        if first == start or start == 0:
            seen = kept.decode(coded)
        elif self.is_ring:
            old = torch.arange(first, start, device=rows.device) % self.n_cells
            before = take(kept, (slot, _ALL, old))[0].to(rows.dtype)
            seen = torch.cat([before, kept.decode(coded)], dim=1)
        else:
            self._put(part, kept, coded)
            return take(kept, (slot, _ALL, slice(first, part.end)))[0]
        self._put(part, kept, coded)
        return seen

    def _put(self, part: Part, kept: Kept, coded: Coded) -> None:
        start, end = part.positions[0], part.end
        if end <= self.n_cells:
            put(kept, (part.slot, _ALL, slice(start, end)), coded)
            return
        n_kept = min(part.n_tokens, self.n_cells)
        cells = torch.arange(end - n_kept, end, device=coded[0].device) % self.n_cells
        at = (slice(part.slot, part.slot + 1), _ALL, cells)
        put(kept, at, tuple(one[None, :, -n_kept:] for one in coded))
