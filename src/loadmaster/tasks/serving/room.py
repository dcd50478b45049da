"""What all who attend to batches share: the server's models, the folders, the threads, the sums."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from loadmaster.jobs.file_shelf import FileShelf
from loadmaster.jobs.orders import OrderBook
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.types import ItemResult
from loadmaster.tasks.serving.host import Serving

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Room:
    """What all attendants share."""

    serving: Serving
    files: FileShelf
    orders: OrderBook
    shelf: Shelf
    threads: ThreadPoolExecutor  # of runs, one for each model
    reader: ThreadPoolExecutor  # one file at a time is read or written, whatever its size
    items: dict[str, Counter[str]] = field(default_factory=dict)  # by model, what came of them
    turns: dict[str, asyncio.Lock] = field(default_factory=dict)  # one job of a model at a time
    closing: bool = False

    @property
    def is_closing(self) -> bool:
        return self.closing or self.serving.closing

    async def slowly(self, work: Callable[..., T], *args: Any) -> T:
        """Something that may take a minute, after all others of its kind."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, partial(work, *args))

    def say(self, model: str, line: str) -> None:
        """Tell what happened; from any thread."""
        self.serving.mailbox.post(partial(self.serving.events.add, "note", model, line))

    def count(self, model: str, results: Sequence[ItemResult]) -> None:
        """Results were committed; from any thread."""
        self.serving.mailbox.post(partial(self._count, model, results))

    def _count(self, model: str, results: Sequence[ItemResult]) -> None:
        counter = self.items.setdefault(model, Counter())
        for result in results:
            counter["failed" if result.failed else "done"] += 1
