"""Many models behind one server, under one budget.

A model is loaded when it is first asked for. One load at a time: what does not fit beside the open
models takes the place of those that were used least recently, idle ones first; where even that is
not enough, nothing is closed and the client is told how many bytes are missing.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import (
    EngineCrashedError,
    EngineError,
    EngineRefusedError,
    EngineStalledError,
    LoadmasterError,
    OverBudgetError,
)
from loadmaster.plan.types import Plan
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.planning import PlanRefusedError
from loadmaster.tasks.schema_trial import SchemaTrial
from loadmaster.tasks.serving.answer import Answer, Mailbox
from loadmaster.tasks.serving.counts import Counts
from loadmaster.tasks.serving.deaths import Breaker, is_out_of_memory, shutting_down
from loadmaster.tasks.serving.events import EventLog, LoadProgress, ready_text
from loadmaster.tasks.serving.fitting import Fitting
from loadmaster.tasks.serving.liveness import Liveness, step_deadline_s
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.offers import Offers
from loadmaster.tasks.serving.opening import (
    Ledger,
    ModelOpener,
    Prepared,
    close_and_confirm,
    smaller_text,
)
from loadmaster.tasks.serving.types import ModelRow, ServeOptions
from loadmaster.units import format_size

T = TypeVar("T")

TICK_S = 0.25


class Serving:
    """The models of a server. Everything is used from one event loop."""

    def __init__(
        self,
        offers: Offers,
        options: ServeOptions,
        opener: ModelOpener,
        *,
        events: EventLog | None = None,
        close: Callable[[Opened], Ledger] = close_and_confirm,
    ) -> None:
        """To be made inside the running event loop."""
        self.options = options
        self.offers = offers
        self.events = events or EventLog()
        self.started_s = time.time()
        self.closing = False
        self._close = close
        mailbox = Mailbox(asyncio.get_running_loop())
        self.mailbox = mailbox
        self.counts = {offer.id: Counts() for offer in offers}
        self.models = {
            offer.id: ServedModel(
                offer, queue_cap=options.queue_cap, mailbox=mailbox, counts=self.counts[offer.id]
            )
            for offer in offers
        }
        for model in self.models.values():
            model.on_death = self._on_death
            model.keep_alive_s = options.keep_alive_s
        self._probes = {
            name: Liveness(every_s=options.probe_s, mailbox=mailbox) for name in self.models
        }
        self._turn = asyncio.Lock()  # one load or unload at a time
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._job_loads: set[asyncio.Task[Any]] = set()
        self._breaker = Breaker()
        self._loader = ThreadPoolExecutor(2, thread_name_prefix="serve-load")
        self._fitting = Fitting(
            opener, self.models.values, self._loader, job_patience_s=options.job_patience_s
        )
        self._schemas = SchemaTrial()
        self._trier = ThreadPoolExecutor(1, thread_name_prefix="serve-schema")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watch = self._background(self._supervise())

    # -- asking

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """A model that is loaded, held until the block ends.

        Raises:
            NotFoundError: there is none of this name.
            BusyError: too many requests wait for it.
            PlanRefusedError: it does not fit, even alone.
        """
        model = self.find(name)
        model.hold()
        try:
            await self.ensure(model)
            yield model
        finally:
            model.release()

    def find(self, name: str | None) -> ServedModel:
        """The model a client means; loaded or not."""
        return self.models[self.offers.find(name).id]

    def rows(self) -> tuple[ModelRow, ...]:
        """Every model that is more than an offer."""
        return tuple(m.row() for m in self.models.values() if m.state != "unloaded")

    async def ensure(self, model: ServedModel) -> None:
        """Wait until the model is loaded. The load goes on when the one who asked is gone."""
        self._check_open()
        if model.state == "failed":
            assert model.failure is not None
            raise model.failure
        if model.state != "ready":
            await asyncio.shield(self._load_task(model))

    async def live(self, model: ServedModel) -> Opened:
        """The open model, loaded again where somebody had it unloaded meanwhile."""
        await self.ensure(model)
        while model.opened is None:
            await self.ensure(model)
        return model.opened

    async def call(self, model: ServedModel, function: Callable[[Opened], T]) -> T:
        """A call to the model's worker or template, off the event loop.

        A worker that was closed or died meanwhile is tried once more when there is a new one.
        """
        opened = await self.live(model)
        try:
            return await model.call(function, opened)
        except EngineError:
            if model.opened is opened and opened.session.engine.failure is None:
                raise
        return await model.call(function, await self.live(model))

    async def check_schema(self, schema: str) -> None:
        """Have a schema tried out that was not seen before, away from the workers.

        Raises:
            UsageError: it is not valid, not supported, or beyond the limits.
        """
        if not self._schemas.knows(schema):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._trier, self._schemas.check, schema)

    def submit(self, model: ServedModel, requests: Sequence[GenerateRequest]) -> Answer:
        """Have requests run; one model may have been closed for another meanwhile."""
        self._check_open()
        answer = model.submit(requests)
        if model.state == "unloaded":
            self._load_task(model)
        return answer

    def _check_open(self) -> None:
        if self.closing:
            raise shutting_down()

    def _load_task(self, model: ServedModel) -> asyncio.Task[None]:
        task = self._loads.get(model.id)
        if task is None:
            task = self._background(self._load(model))
            self._loads[model.id] = task
            task.add_done_callback(lambda _: self._loads.pop(model.id, None))
        return task

    async def load_for_job(self, model: ServedModel) -> None:
        """Load a model that nobody waits for, if that takes nothing from people.

        Raises:
            BusyError: models that people used lately hold the memory.
            InterruptedRunError: somebody asked for another model meanwhile.
            PlanRefusedError: it does not fit, even alone.
        """
        self._check_open()
        task = self._background(self._load(model, for_job=True))
        self._job_loads.add(task)
        task.add_done_callback(self._job_loads.discard)
        await asyncio.shield(task)

    def _background(self, work: Any) -> asyncio.Task[Any]:
        """Run something nobody waits for; its error is kept from being an unheard one."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LoadmasterError):
            self.events.add("note", "", f"a task failed: {type(error).__name__}")

    async def _blocking(self, function: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, partial(function, *args))

    # -- loading

    async def _load(self, model: ServedModel, *, for_job: bool = False) -> None:
        async with self._turn:
            if model.state in ("ready", "failed") or self.closing:
                return
            model.state = "loading"
            started = time.monotonic()
            if not for_job:  # which may try for hours
                self.events.add("loading", model.id, "planning")
            try:
                opened = await self._opened(model, for_job=for_job)
            except Exception as error:
                self._not_loaded(model, error, for_job=for_job)
                raise
            self.counts[model.id].loads += 1
            opened.session.engine.limit_steps(step_deadline_s(opened.session.plan))
            model.attach(opened)
            self.events.add("ready", model.id, ready_text(opened, time.monotonic() - started))

    def _not_loaded(self, model: ServedModel, error: Exception, *, for_job: bool) -> None:
        if not isinstance(error, LoadmasterError):  # a defect: its text is for nobody
            error = EngineError(f"loading `{model.id}` failed: {type(error).__name__}")
        model.state = "unloaded" if model.failure is None else "failed"
        if for_job and model.failure is None:  # people who wait for it have a load of their own
            return
        model.fail_waiting(error)
        self.events.add("refused", model.id, error.message)

    async def _opened(self, model: ServedModel, *, for_job: bool) -> Opened:
        """Open it. A worker that dies on the way counts as any other that dies; a plan that was to
        be smaller than the last one and cannot be gives way to another of that size."""
        while True:
            limited = self._fitting.is_limited(model)
            try:
                return await self._open(model, for_job=for_job)
            except (EngineCrashedError, EngineStalledError) as error:
                self.events.add("crashed", model.id, error.message)
                self._count_death(model, error)
                if model.failure is not None:
                    raise model.failure from error
                if self.closing:
                    raise
            except (PlanRefusedError, OverBudgetError, EngineRefusedError) as error:
                if not limited:
                    raise
                self._fitting.forget_limit(model)
                text = f"no smaller plan will do ({error.message}), it is planned as before"
                self.events.add("note", model.id, text)

    async def _open(self, model: ServedModel, *, for_job: bool) -> Opened:
        prepared, victims = await self._fitting.choose(model, for_job=for_job)
        for victim in victims:
            await self._unload(victim, "evicted", f"its memory is for `{model.id}`")
            self.counts[victim.id].evictions += 1
        if victims:  # what the drivers really gave back counts
            prepared = await self._fitting.beside_open(model)
        try:
            return await self._blocking(prepared.open, self._progress(model, for_job=for_job))
        except EngineError as error:
            if is_out_of_memory(error):
                self._take_less(model, prepared.plan)
            raise

    def _progress(self, model: ServedModel, *, for_job: bool) -> LoadProgress:
        say = partial(self.events.add, "note", model.id)

        def stopping() -> bool:
            return self.closing or (for_job and any(name != model.id for name in self._loads))

        return LoadProgress(
            say=lambda line: self.mailbox.post(partial(say, line)), stopping=stopping
        )

    async def would_get(self, model: ServedModel) -> Prepared:
        """The plan that a model would be loaded with now, beside what is open.

        Raises:
            PlanRefusedError: it does not fit beside them.
        """
        async with self._turn:
            return await self._fitting.beside_open(model)

    # -- unloading

    async def unload(self, model: ServedModel) -> bool:
        """Drain a model, stop its worker, and have its memory back; False when none is loaded."""
        async with self._turn:
            if model.state == "failed":  # a person looked at it: the breaker closes
                model.state, model.failure = "unloaded", None
                self._breaker.close(model.id)
                self._fitting.forget_limit(model)
                return True
            return await self._unload(model, "unloaded", "asked")

    async def _unload(self, model: ServedModel, kind: str, why: str) -> bool:
        if model.opened is None or model.state != "ready":
            return False
        model.state = "draining"  # new requests wait; those that run go on
        model.turn_out(why)
        deadline = time.monotonic() + self.options.drain_s
        while model.is_working and model.worker_failure is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        opened = model.detach()
        assert opened is not None
        if model.visitor is not None:  # too slow to leave by itself
            model.visitor.lost()
        missing = await self._blocking(self._close, opened)
        for device, size in missing.items():
            self.events.add("note", model.id, f"{format_size(size)} of {device} are not back yet")
        self.events.add(kind, model.id, why)
        if model.n_waiting and not self.closing:
            self._load_task(model)  # its requests wait for their turn
        return True

    # -- supervision

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for model in self.models.values():
                model.check_worker()
                self._look(model)
                if model.expires_in_s <= 0 and not self._turn.locked():
                    self._background(self._expire(model))

    def _look(self, model: ServedModel) -> None:
        """Have a model that nobody asks decode now and then."""
        now = time.monotonic()
        ready = model.state == "ready"
        is_quiet = ready and model.is_idle and model.visitor is None
        idle_s = now - model.last_used_s if is_quiet else 0.0
        self._probes[model.id].look(model.opened if ready else None, idle_s=idle_s, now=now)

    async def _expire(self, model: ServedModel) -> None:
        async with self._turn:
            if model.expires_in_s <= 0:
                await self._unload(model, "unloaded", f"idle for {model.keep_alive_s:g} s")

    def _on_death(self, model: ServedModel, failure: LoadmasterError) -> None:
        self.events.add("crashed", model.id, failure.message)
        is_of_job = model.visitor is not None  # whose executor counts deaths by item
        if model.visitor is not None:
            model.visitor.lost()
        if is_out_of_memory(failure) and model.opened is not None:
            self._take_less(model, model.opened.session.plan)
        opened = model.detach()
        model.state = "loading"
        if is_of_job:
            self.counts[model.id].deaths += 1
        else:
            self._count_death(model, failure)
        self._background(self._replace(model, opened))

    def _count_death(self, model: ServedModel, failure: LoadmasterError) -> None:
        """After too many in too short a time the model is down, and who waits is told."""
        self.counts[model.id].deaths += 1
        down = self._breaker.count(model.id, failure, time.monotonic())
        if down is None:
            return
        model.state, model.failure = "failed", down
        self.events.add("failed", model.id, down.message)
        model.fail_waiting(down)

    def _take_less(self, model: ServedModel, plan: Plan) -> None:
        self._fitting.take_less(model, plan)
        self.events.add("note", model.id, smaller_text(plan))

    async def _replace(self, model: ServedModel, opened: Opened | None) -> None:
        """Bury a dead worker; where the model is to go on, load it anew."""
        if opened is not None:
            await self._blocking(self._close, opened)
        if self.closing:
            model.fail_waiting(shutting_down())
        elif model.state != "failed":
            await self.ensure(model)

    # -- the end

    async def drain(self, drain_s: float) -> None:
        """Take no more requests; those that run after `drain_s` end with an error."""
        self.closing = True
        self.events.close()
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and any(m.users for m in self.models.values()):
            await asyncio.sleep(0.05)
        for model in self.models.values():
            model.fail_all(shutting_down())

    async def close(self) -> None:
        """Stop every worker, whatever it does."""
        await self.drain(0)
        self._watch.cancel()
        await asyncio.gather(*self._loads.values(), *self._job_loads, return_exceptions=True)
        for model in self.models.values():
            if (opened := model.detach()) is not None:
                await self._blocking(opened.close)
            model.shut()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._trier.shutdown(wait=False, cancel_futures=True)
        self._schemas.close()
