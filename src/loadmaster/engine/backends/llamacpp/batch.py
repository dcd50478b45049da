"""One `llama_batch`, allocated once and filled in place."""

import ctypes as c
from array import array
from collections.abc import Sequence
from typing import Any

from loadmaster.engine.types import SequenceWork


class Batch:
    """Arrays for `capacity` tokens, written through memoryviews: 40 ns for a token's field."""

    def __init__(self, api: Any, capacity: int) -> None:
        self.capacity = capacity
        self.drafts: dict[int, tuple[int, ...]] = {}  # of the last `fill`, by sequence
        tokens, positions, sequences, counts = ((c.c_int32 * capacity)() for _ in range(4))
        wanted = (c.c_int8 * capacity)()
        pointers = (c.POINTER(c.c_int32) * capacity)()
        address = c.addressof(sequences)
        for index in range(capacity):
            counts[index] = 1
            pointers[index] = c.cast(address + 4 * index, c.POINTER(c.c_int32))
        self.struct = api.llama_batch(
            n_tokens=0, token=tokens, pos=positions, n_seq_id=counts, seq_id=pointers,
            logits=wanted,
        )  # fmt: skip
        self._tokens, self._positions, self._sequences = (
            memoryview(block).cast("B").cast("i") for block in (tokens, positions, sequences)
        )
        self._wanted = memoryview(wanted).cast("B").cast("b")

    def fill(self, work: Sequence[SequenceWork]) -> list[tuple[int, int]]:
        """Write a step; return (sequence, row) of each whose logits are wanted; of a draft, the
        row before it, which its own rows follow."""
        end = 0
        outputs = []
        self.drafts = {}
        for part in work:
            start, end = end, end + len(part.tokens)
            if end > self.capacity:
                raise ValueError(f"a step of more than n_batch {self.capacity} tokens")
            if end - start == 1:
                self._tokens[start] = part.tokens[0]
                self._positions[start] = part.position
                self._sequences[start] = part.seq_id
            else:
                self._fill_many(part, start, end)
            self._wanted[end - 1] = part.sample
            if part.sample:
                outputs.append((part.seq_id, end - 1 - part.n_draft))
                if part.n_draft:
                    n = part.n_draft
                    self.drafts[part.seq_id] = part.tokens[-n:]
                    self._wanted[end - 1 - n : end - 1] = array("b", b"\x01" * n)
        self.struct.n_tokens = end
        return outputs

    def want_all(self) -> None:
        """Mark every token of the last `fill` as an output."""
        n = self.struct.n_tokens
        self._wanted[:n] = array("b", b"\x01" * n)

    def write_one(self, token: int, position: int) -> None:
        """The next token of the sequence that the last `fill` wrote alone."""
        self._tokens[0] = token
        self._positions[0] = position

    def _fill_many(self, part: SequenceWork, start: int, end: int) -> None:
        n = end - start
        self._tokens[start:end] = array("i", part.tokens)
        self._positions[start:end] = array("i", range(part.position, part.position + n))
        self._sequences[start:end] = array("i", [part.seq_id]) * n
        self._wanted[start:end] = array("b", bytes(n))
