"""What one step feeds: tokens of all its sequences in one row, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loadmaster.engine.types import SequenceWork
from loadmaster.errors import EngineError

# Sequences that decode side by side are attended to in one call over as many cells as the longest
# has, as long as that is at most so many times the cells they hold.
_MOST_WASTE = 2
_SMALL_CELLS = 64  # of so short ones it is always one call


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens in a row of the step whose cells are in slots that follow each other.

    Of one sequence `n_tokens` from `position` on; or one token of each of several sequences.
    """

    row: int  # of the step's first token of it
    slot: int
    n_slots: int
    n_tokens: int  # of each sequence
    positions: tuple[int, ...]  # of each sequence's first token

    @property
    def n_rows(self) -> int:
        return self.n_slots * self.n_tokens

    @property
    def end(self) -> int:
        """Cells that the longest sequence has after this step."""
        return max(self.positions) + self.n_tokens


class PackedStep:
    """One step, decoding sequences first. Masks are made once for all layers that want the same."""

    def __init__(self, work: Sequence[SequenceWork], *, prompts: bool = False) -> None:
        """With `prompts` all of them are, those of one token too."""
        ones = () if prompts else (w for w in work if len(w.tokens) == 1)
        self.decoding = sorted(ones, key=lambda w: w.seq_id)
        chunks = [w for w in work if prompts or len(w.tokens) > 1]
        self.work = (*self.decoding, *chunks)
        self.tokens = [token for w in self.work for token in w.tokens]
        self.positions = [w.position + i for w in self.work for i in range(len(w.tokens))]
        # Sequence, row of the logits; of a draft, the row before it, which its own rows follow.
        self.outputs: list[tuple[int, int]] = []
        self._rows: list[int] = []  # of the step, of which logits are wanted
        self.parts = [*_decode_parts(self.decoding), *_chunk_parts(chunks, len(self.decoding))]
        self._note_outputs()
        self._tensors: dict[object, Any] = {}

    def _note_outputs(self) -> None:
        row = 0
        for w in self.work:
            row += len(w.tokens)
            if w.sample:
                self.outputs.append((w.seq_id, len(self._rows)))
                self._rows += range(row - 1 - w.n_draft, row)

    def inputs(self, device: Any) -> dict[str, Any]:
        """What the model is called with."""
        rows = self._rows or [len(self.tokens) - 1]  # a model wants one at least
        return {
            "input_ids": torch.tensor([self.tokens], device=device),
            "position_ids": torch.tensor([self.positions], device=device),
            "logits_to_keep": rows,  # a list: a tensor would be sent to the first GPU
            "use_cache": False,
        }

    def cells(self, device: Any, n_cells: int) -> tuple[Any, Any]:
        """Slot and cell of every decoding sequence's token, where slots have `n_cells`."""
        rows = self.decoding
        slots = self._cached(("slots", device), lambda: [w.seq_id for w in rows], device)
        name = ("cells", n_cells, device)
        places = self._cached(name, lambda: [w.position % n_cells for w in rows], device)
        return slots, places

    def _cached(self, name: object, make: Callable[[], list[int]], device: Any) -> Any:
        return self._made(name, lambda: torch.tensor(make(), device=device))

    def mask_each(self, part: Part, window: int | None, cells: range, device: Any) -> Any:
        """Which of these cells each sequence's token sees, (slot, 1, 1, cell); None: all."""
        if part.n_slots == 1 or (window is None and min(part.positions) >= cells.stop - 1):
            return None
        return self._made(
            (part.row, window, cells, device), lambda: _mask_each(part, window, cells, device)
        )

    def mask_chunk(self, part: Part, window: int | None, device: Any) -> Any:
        """Which of the cells from `first_cell` on each token sees, (token, cell)."""
        return self._made((part.row, window, device), lambda: _mask_chunk(part, window, device))

    def _made(self, name: object, make: Callable[[], Any]) -> Any:
        if name not in self._tensors:
            self._tensors[name] = make()
        return self._tensors[name]


def first_cell(part: Part, window: int | None) -> int:
    """The position of the first cell that any token of a part sees."""
    return 0 if window is None else max(0, min(part.positions) + 1 - window)


def _mask_each(part: Part, window: int | None, cells: range, device: Any) -> Any:
    places = torch.arange(cells.start, cells.stop, device=device)
    rows = torch.tensor(part.positions, device=device).view(-1, 1, 1, 1)
    seen = places <= rows
    return seen if window is None else seen & (places > rows - window)


def _mask_chunk(part: Part, window: int | None, device: Any) -> Any:
    start = part.positions[0]
    places = torch.arange(first_cell(part, window), part.end, device=device)
    rows = torch.arange(start, part.end, device=device).view(-1, 1)
    seen = places <= rows
    return seen if window is None else seen & (places > rows - window)


def _decode_parts(decoding: Sequence[SequenceWork]) -> list[Part]:
    """Sequences whose slots follow each other together, where few cells are looked at in vain."""
    parts: list[Part] = []
    start = 0
    for row in range(1, len(decoding) + 1):
        if row < len(decoding) and decoding[row].seq_id == decoding[row - 1].seq_id + 1:
            continue
        parts += _together(decoding[start:row], start)
        start = row
    return parts


def _together(run: Sequence[SequenceWork], row: int) -> list[Part]:
    positions = tuple(w.position for w in run)
    longest = max(positions) + 1
    worth = len(run) * longest <= _MOST_WASTE * (sum(positions) + len(run))
    if worth or longest <= _SMALL_CELLS:
        first = run[0].seq_id
        return [Part(row=row, slot=first, n_slots=len(run), n_tokens=1, positions=positions)]
    return [
        Part(row=row + i, slot=w.seq_id, n_slots=1, n_tokens=1, positions=(w.position,))
        for i, w in enumerate(run)
    ]


def _chunk_parts(chunks: Sequence[SequenceWork], row: int) -> list[Part]:
    parts = []
    for w in chunks:
        n = len(w.tokens)
        parts.append(Part(row=row, slot=w.seq_id, n_slots=1, n_tokens=n, positions=(w.position,)))
        row += n
    return parts


def check_work(work: Sequence[SequenceWork], n_slots: int, n_cells: int) -> None:
    """Raises EngineError: a step that these slots cannot take."""
    for w in work:
        if not (w.tokens and w.seq_id < n_slots and w.position + len(w.tokens) <= n_cells):
            raise EngineError(
                f"sequence {w.seq_id} cannot be fed {len(w.tokens)} tokens at {w.position}: there "
                f"are {n_slots} slots of {n_cells} cells"
            )
