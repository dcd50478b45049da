"""The items of a job one by one, as they are played: what each feeds, finds and generates."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from loadmaster.plan.batch import JobOutline


@dataclass(frozen=True, slots=True)
class PlayedItem:
    """One request: what it feeds itself, what it finds there, what it generates."""

    fed: float  # prompt tokens
    found: float
    output: int
    own_part: float  # of what it feeds, the part that is not shared

    @property
    def own_fed(self) -> float:
        return self.fed * self.own_part

    def depth(self, owed: int) -> float:
        """Cells that it sees when it still owes so many tokens."""
        return self.found + self.fed + self.output - 1 - owed


def items_of(job: JobOutline) -> Iterator[PlayedItem]:
    """All items in order; where the order is not known, classes come evenly mixed.

    The first item brings a prefix of the usual length, the others their share of what is left.
    """
    n_items = job.n_items
    first = min(float(job.prefix_tokens), job.shared_tokens)
    later = (job.prefix_tokens - first) / max(1, n_items - 1)
    for place, index in enumerate(_mixed(job) if job.mixed else _in_order(job)):
        it = job.classes[index]
        brought = min(float(it.shared_tokens), first if place == 0 else later)
        yield PlayedItem(
            fed=it.own_tokens + brought,
            found=it.shared_tokens - brought,
            output=max(1, it.output_tokens),
            own_part=it.own_tokens / max(1.0, it.own_tokens + brought),
        )


def _in_order(job: JobOutline) -> Iterator[int]:
    for index, it in enumerate(job.classes):
        yield from (index for _ in range(it.count))


def _mixed(job: JobOutline) -> Iterator[int]:
    """Each class spread evenly over the job: next comes the one whose next item is due first."""
    due = [(0.5 / it.count, index) for index, it in enumerate(job.classes) if it.count]
    heapq.heapify(due)
    left = [it.count for it in job.classes]
    while due:
        at, index = heapq.heappop(due)
        yield index
        left[index] -= 1
        if left[index]:
            heapq.heappush(due, (at + 1 / job.classes[index].count, index))
