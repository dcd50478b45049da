"""A batch from its order to its end: read its lines, run its job, write its files.

Whatever happens, the next look at the order and the job says what to do: a server that died is
followed by one that goes on from there. The lock of the order says which server attends to it, the
lock of the job who works on it: `loadmaster batch resume` may do that as well.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from loadmaster.errors import (
    BusyError,
    DamagedFileError,
    DoesNotFitError,
    InterruptedRunError,
    LoadmasterError,
    ModelChangedError,
    NotFoundError,
    UsageError,
)
from loadmaster.jobs.intake import BadInputError
from loadmaster.jobs.lock import JobLock
from loadmaster.jobs.orders import BatchOrder, EndStatus, OrderEnd, OrderError
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Counts, Item, Job
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.items import failed_result
from loadmaster.tasks.batch.lives import HOPELESS
from loadmaster.tasks.batch.outputs import export
from loadmaster.tasks.batch.policy import StopReason
from loadmaster.tasks.serving.guests import Guest
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.room import Room
from loadmaster.tasks.serving.shift import Shift, Told
from loadmaster.tasks.serving.taking_in import line_errors, take_in
from loadmaster.tasks.serving.visits import entertain

LOOK_S = 0.25  # how often a cancellation, the time and the server's end are looked at
FIRST_PAUSE_S, MOST_PAUSE_S = 2.0, 300.0  # after an error that may pass
EXPIRED = "expired"  # the reason of a job whose last items were failed for that
_CHUNK = 256

# What the same try would meet again: the batch fails. Everything else may pass.
_FINAL = (UsageError, NotFoundError, DamagedFileError, DoesNotFitError, ModelChangedError)


class ExpiredError(LoadmasterError):
    """An item was not run before its batch's window closed."""

    code = "batch_expired"


class Attendant:
    """Attends to one batch."""

    def __init__(self, room: Room, batch_id: str) -> None:
        self._room = room
        self._id = batch_id
        self._exported = False

    async def attend(self) -> None:
        """Until the batch is at its end, or the server is."""
        failures = 0
        while not self._room.is_closing:
            order = self._room.orders.read(self._id)
            if order is None or order.end is not None:
                return
            try:
                with self._room.orders.claim(self._id):
                    await self._advance()
                failures = 0
            except InterruptedRunError:
                await asyncio.sleep(LOOK_S)
            except BusyError:  # another process has it now
                await self._pause(FIRST_PAUSE_S)
            except (LoadmasterError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error.message
                self._room.say(order.model or "", f"{self._id}: {reason}")
                await self._pause(min(MOST_PAUSE_S, FIRST_PAUSE_S * 2**failures))
                failures += 1

    async def _advance(self) -> None:
        """One step of the batch, by what it is at."""
        order = self._room.orders.read(self._id)
        if order is None or order.end is not None:
            return
        try:
            await self._step(order)
        except BadInputError as error:
            await self._end(order, "failed", line_errors(error))
        except LoadmasterError as error:
            if not isinstance(error, _FINAL) and error.code != HOPELESS:
                raise
            await self._end(order, "failed", [OrderError(code=error.code, message=error.message)])

    async def _step(self, order: BatchOrder) -> None:
        job = await asyncio.to_thread(self._job)
        if job is None:
            await self._begin(order)
        elif job.state == "finished":
            await self._end(order, "expired" if job.reason == EXPIRED else "completed")
        elif job.state == "cancelled":
            await self._end(order, "cancelled")
        elif order.cancelling_s is not None:
            if await asyncio.to_thread(batch_jobs.cancel, self._room.shelf, self._id):
                raise BusyError("another process is about to give it up")
        elif time.time() >= order.expires_s:
            await self._room.slowly(self._expire)
        elif self._room.shelf.owner(self._id) is not None:
            raise BusyError("another process works on it")
        else:
            await self._run(order, job)

    def _job(self) -> Job | None:
        if not self._room.shelf.exists(self._id):
            return None
        with JobStore(self._room.shelf.path(self._id), read_only=True) as store:
            return store.job()

    # -- from lines to a job

    async def _begin(self, order: BatchOrder) -> None:
        if order.cancelling_s is not None:
            await self._end(order, "cancelled")
        elif time.time() >= order.expires_s:
            await self._end(order, "expired")
        else:
            await self._room.slowly(take_in, self._room, order)

    # -- running it

    async def _run(self, order: BatchOrder, job: Job) -> None:
        settings = batch_jobs.read_settings(job)
        name = settings.served_names[0] if settings.served_names else ""
        model = self._model(name)
        if order.model is None:
            order = replace(order, model=name, in_progress_s=time.time())
            await asyncio.to_thread(self._room.orders.write, order)
        ending = asyncio.create_task(self._ending(order))
        turn = self._room.turns.setdefault(name, asyncio.Lock())
        waiting = asyncio.create_task(turn.acquire())
        try:
            await asyncio.wait({ending, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                await self._visit(order, model, settings.model, ending)
        finally:
            ending.cancel()
            if waiting.done() and not waiting.cancelled():
                turn.release()
            waiting.cancel()

    def _model(self, name: str) -> ServedModel:
        found = self._room.serving.models.get(name)
        if found is None:
            raise BusyError(f"`{name}` is not served now")
        return found

    async def _visit(
        self,
        order: BatchOrder,
        model: ServedModel,
        path: str,
        ending: "asyncio.Task[StopReason]",
    ) -> None:
        """Have the job run on the served model, until it is done or has to end."""
        guest = Guest(model, prefix_scope=order.owner)
        visit = asyncio.create_task(entertain(self._room.serving, model, guest))
        watcher = Told(partial(self._room.count, model.id), partial(self._say, model.id))
        shift = Shift(self._room.shelf, self._id, path, guest, watcher)
        granted = asyncio.create_task(guest.granted())
        try:
            await asyncio.wait({ending, visit, granted}, return_when=asyncio.FIRST_COMPLETED)
            if granted.done():
                await self._work(shift, visit, ending)
            elif visit.done():
                await visit
        finally:
            granted.cancel()
            visit.cancel()
            await asyncio.gather(visit, granted, return_exceptions=True)

    async def _work(
        self, shift: Shift, visit: "asyncio.Task[None]", ending: "asyncio.Task[StopReason]"
    ) -> None:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._room.threads, shift.work)
        events: set[asyncio.Future[Any]] = {work, visit, ending}
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            shift.stop(ending.result() if ending.done() else "interrupted")
        await work
        self._exported = shift.has_exported
        if visit.done():
            await visit

    def _say(self, model: str, line: str) -> None:
        self._room.say(model, f"{self._id}: {line}")

    async def _ending(self, order: BatchOrder) -> StopReason:
        """Returns when the work has to end, and why."""
        while True:
            if self._room.is_closing:
                return "interrupted"
            if self._room.orders.cancel_asked(self._id):
                return "cancelled"
            if time.time() >= order.expires_s:
                return "expired"
            await asyncio.sleep(LOOK_S)

    async def _pause(self, seconds: float) -> None:
        """A pause that ends early when there is something to do."""
        until = time.monotonic() + seconds
        asked = self._room.orders.cancel_asked(self._id)
        while time.monotonic() < until and not self._room.is_closing:
            if self._room.orders.cancel_asked(self._id) != asked:
                return
            await asyncio.sleep(LOOK_S)

    def _expire(self) -> None:
        """What was not run in time fails for that, and the job is finished."""
        folder = self._room.shelf.path(self._id)
        with JobLock(folder), JobStore(folder) as store:
            error = ExpiredError("it was not run before the completion window closed")
            for items in _chunks(store.pending()):
                store.commit([failed_result(item, error) for item in items])
            store.set_state("finished", EXPIRED)

    # -- the end

    async def _end(
        self, order: BatchOrder, status: EndStatus, errors: Sequence[OrderError] = ()
    ) -> None:
        order = replace(order, finalizing_s=time.time())
        await asyncio.to_thread(self._room.orders.write, order)
        end = await self._room.slowly(self._settle, order, status, tuple(errors))
        await asyncio.to_thread(self._room.orders.write, replace(order, end=end))

    def _settle(
        self, order: BatchOrder, status: EndStatus, errors: tuple[OrderError, ...]
    ) -> OrderEnd:
        """Write and publish the files. Done twice, it comes to the same."""
        counts = self._export(order) if self._room.shelf.exists(self._id) else None
        has_output = counts is not None and counts.done > 0
        has_errors = counts is not None and counts.failed > 0
        self._publish(order, order.output_file_id, "output", has_lines=has_output)
        self._publish(order, order.error_file_id, "error", has_lines=has_errors)
        return OrderEnd(
            status=status,
            at_s=time.time(),
            counts=counts,
            has_output=has_output,
            has_errors=has_errors,
            errors=errors,
        )

    def _export(self, order: BatchOrder) -> Counts:
        folder = self._room.shelf.path(self._id)
        with JobLock(folder), JobStore(folder) as store:
            if not self._exported:
                self._room.files.reserve(order.output_file_id)
                self._room.files.reserve(order.error_file_id)
                export(store, store.job())
            return store.counts()

    def _publish(self, order: BatchOrder, file_id: str, kind: str, *, has_lines: bool) -> None:
        if has_lines:
            filename = f"{self._id}_{kind}.jsonl"
            self._room.files.publish(file_id, filename=filename, owner=order.owner)
        else:
            self._room.files.discard(file_id)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
