"""Where clients leave files and batches: what they order, what they see, and who attends to it."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from loadmaster.errors import BusyError, LoadmasterError, UsageError
from loadmaster.jobs.file_shelf import FileShelf, check_room, new_file_id
from loadmaster.jobs.orders import BatchOrder, OrderBook, new_batch_id
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Counts
from loadmaster.tasks.api.batch_objects import Body, NewBatch, batch_object, status_of
from loadmaster.tasks.api.openai_fields import BadFieldError
from loadmaster.tasks.serving.attending import Attendant
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.room import Room

MOST_UNFINISHED = 128  # batches that a server attends to at a time
MOST_UPLOADS = 4
RETRY_AFTER_S = 60
CLOSE_S = 20.0  # for what was computed to be committed; what is not is computed again
# A job's store has its lines once more, and its answers.
_ROOM_FACTOR = 3


class Desk:
    """The files and batches of a server's clients. Used from the event loop."""

    def __init__(self, serving: Serving, folder: Path) -> None:
        """`folder` is where this user's jobs are kept."""
        self.files = FileShelf(folder / "files")
        self._room = Room(
            serving=serving,
            files=self.files,
            orders=OrderBook(folder / "batches"),
            shelf=Shelf(folder / "jobs"),
            threads=ThreadPoolExecutor(max(1, len(serving.offers)), thread_name_prefix="batch"),
            reader=ThreadPoolExecutor(1, thread_name_prefix="batch-read"),
        )
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._n_uploads = 0

    async def start(self) -> None:
        """Go on with what servers before this one left, the oldest first."""
        await asyncio.to_thread(self.files.sweep)
        orders = await asyncio.to_thread(self._room.orders.all)
        for order in reversed(orders):
            if order.end is None:
                self._attend(order.batch_id)

    async def close(self) -> None:
        """Stop working; every job is left so that the next server goes on with it."""
        self._room.closing = True
        tasks = list(self._attending.values())
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pool in (self._room.threads, self._room.reader):
            pool.shutdown(wait=False, cancel_futures=True)

    def _attend(self, batch_id: str) -> None:
        task = asyncio.create_task(Attendant(self._room, batch_id).attend())
        self._attending[batch_id] = task
        task.add_done_callback(lambda done: self._left(batch_id, done))

    def _left(self, batch_id: str, task: "asyncio.Task[None]") -> None:
        self._attending.pop(batch_id, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a defect: its text may quote a prompt
            self._room.say("", f"{batch_id}: the work on it failed: {type(error).__name__}")

    # -- uploads

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """An upload is under way.

        Raises:
            BusyError: as many are as may be.
        """
        if self._n_uploads >= MOST_UPLOADS:
            raise BusyError(f"{self._n_uploads} files are being uploaded, as many as may be")
        self._n_uploads += 1
        try:
            yield
        finally:
            self._n_uploads -= 1

    # -- ordering

    async def order(self, new: NewBatch, owner: str) -> Body:
        """Take an order; it is on the disk when this returns.

        Raises:
            NotFoundError: there is no such file.
            BusyError: as many batches are under way as may be.
            StorageFullError: the disk has no room for its job.
        """
        if len(self._attending) >= MOST_UNFINISHED:
            raise BusyError(
                f"{len(self._attending)} batches are under way, as many as may be",
                hint="wait until one of them ends",
                numbers={"retry_after_s": RETRY_AFTER_S},
            )
        order = await asyncio.to_thread(self._take, new, owner)
        self._attend(order.batch_id)
        return batch_object(order, None)

    def _take(self, new: NewBatch, owner: str) -> BatchOrder:
        card = self.files.find(new.input_file_id, owner)
        if card.purpose != "batch":
            raise BadFieldError("input_file_id", f"`{card.file_id}` was not uploaded for batches")
        check_room(self.files.folder, _ROOM_FACTOR * card.size_bytes)
        now = time.time()
        order = BatchOrder(
            batch_id=new_batch_id(),
            owner=owner,
            endpoint=new.endpoint,
            input_file_id=card.file_id,
            completion_window=new.completion_window,
            created_s=now,
            expires_s=now + new.window_s,
            output_file_id=new_file_id(),
            error_file_id=new_file_id(),
            metadata=new.metadata,
        )
        self._room.orders.add(order)
        return order

    async def cancel(self, batch_id: str, owner: str) -> Body:
        """Ask for the end of a batch; what is done stays done.

        Raises:
            NotFoundError: there is no such batch.
            UsageError: it is at its end.
        """
        return await asyncio.to_thread(self._cancel, batch_id, owner)

    def _cancel(self, batch_id: str, owner: str) -> Body:
        order = self._room.orders.find(batch_id, owner)
        if order.end is not None:
            raise UsageError(f"`{batch_id}` is {order.end.status}, it cannot be cancelled")
        self._room.orders.ask_to_cancel(batch_id)
        return self._seen(self._room.orders.find(batch_id, owner))

    # -- looking

    async def batch(self, batch_id: str, owner: str) -> Body:
        """A batch as it is now.

        Raises:
            NotFoundError: there is no such batch.
        """
        return await asyncio.to_thread(lambda: self._seen(self._room.orders.find(batch_id, owner)))

    async def batches(self, owner: str, after: str | None, limit: int) -> tuple[list[Body], bool]:
        """A page of an owner's batches, the newest first, and whether there are more.

        Raises:
            NotFoundError: there is no batch `after`.
        """
        return await asyncio.to_thread(self._batches, owner, after, limit)

    def _batches(self, owner: str, after: str | None, limit: int) -> tuple[list[Body], bool]:
        orders = [order for order in self._room.orders.all() if order.owner == owner]
        if after is not None:
            self._room.orders.find(after, owner)
            ids = [order.batch_id for order in orders]
            orders = orders[ids.index(after) + 1 :]
        return [self._seen(order) for order in orders[:limit]], len(orders) > limit

    def _seen(self, order: BatchOrder) -> Body:
        return batch_object(order, order.end.counts if order.end else self._counts(order))

    def _counts(self, order: BatchOrder) -> Counts | None:
        """Of a job that is under way; None when there is none yet."""
        if not self._room.shelf.exists(order.batch_id):
            return None
        with (
            suppress(LoadmasterError),
            JobStore(self._room.shelf.path(order.batch_id), read_only=True) as store,
        ):
            return store.counts()
        return Counts(done=0, failed=0, left=0)

    # -- figures

    async def statuses(self) -> Mapping[str, int]:
        """How many batches are at what."""
        return await asyncio.to_thread(self._statuses)

    def _statuses(self) -> Mapping[str, int]:
        shelf = self._room.shelf
        return Counter(
            status_of(order, has_job=shelf.exists(order.batch_id))
            for order in self._room.orders.all()
        )

    @property
    def items(self) -> Mapping[str, Mapping[str, int]]:
        """What came of items since the server started, by model."""
        return self._room.items


@asynccontextmanager
async def open_desk(serving: Serving, folder: Path) -> AsyncIterator[Desk]:
    """A desk that goes on with what is there, closed at the end."""
    desk = Desk(serving, folder)
    await desk.start()
    try:
        yield desk
    finally:
        await desk.close()
