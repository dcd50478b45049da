"""Exact subset sums over matrices of few kinds: how many of each get the most bytes into a room."""

from collections.abc import Sequence
from math import gcd


class SubsetSums:
    """All sums of `least…most` pieces of each size, as the bits of one integer.

    Sizes are counted in their greatest common divisor; 48 matrices of a model take microseconds.
    """

    def __init__(self, sizes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        """`ranges` has the least and the most pieces of each size."""
        self._sizes, self._ranges = sizes, ranges
        self._unit = gcd(*sizes) or 1
        self._prefixes = [1]  # bit s: the sum s can be made of the sizes so far
        for size, (least, most) in zip(sizes, ranges, strict=True):
            step, reached = size // self._unit, 0
            for n in range(least, most + 1):
                reached |= self._prefixes[-1] << (n * step)
            self._prefixes.append(reached)

    def most(self, room: int) -> tuple[int, ...] | None:
        """The counts with the largest sum that is not above `room`; None when there is none."""
        if room < 0:
            return None
        mask = (1 << (room // self._unit + 1)) - 1
        total = (self._prefixes[-1] & mask).bit_length() - 1
        return None if total < 0 else self._counts(total)

    def _counts(self, total: int) -> tuple[int, ...]:
        counts = []
        for index in reversed(range(len(self._sizes))):
            step = self._sizes[index] // self._unit
            least, most = self._ranges[index]
            for n in range(least, most + 1):
                rest = total - n * step
                if rest >= 0 and self._prefixes[index] >> rest & 1:
                    counts.append(n)
                    total = rest
                    break
        return tuple(reversed(counts))
