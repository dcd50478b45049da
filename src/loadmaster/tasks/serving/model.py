"""One model of a server: its worker, the requests that wait for it and those that run.

At most as many requests as the plan has sequences are with the worker. The others wait here, so
they outlive a worker that dies, and so does what was with it and had no text yet, once: it goes on
with the next worker. Everything else that was with the worker ends with an error, exactly once.
"""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from loadmaster.engine.types import DoneEvent, GenerateEvent, GenerateRequest, TextEvent
from loadmaster.errors import BusyError, EngineError, LoadmasterError
from loadmaster.model.checkpoint import AnyModel
from loadmaster.tasks.measurement import MemoryRow
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.answer import Answer, Mailbox
from loadmaster.tasks.serving.counts import Counts
from loadmaster.tasks.serving.requests import n_ctx_of
from loadmaster.tasks.serving.types import ModelRow, ModelState, Offer

T = TypeVar("T")
RETRY_AFTER_S = 2
# A request that was with so many workers when they died may be what they died of.
MOST_DEATHS = 2


class Visitor(Protocol):
    """A job that has the model while people leave it."""

    @property
    def n_in_flight(self) -> int:
        """Its requests with the worker."""

    def ask_to_leave(self, why: str) -> None:
        """Others need the model."""

    def lost(self) -> None:
        """The worker died."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Ticket:
    """A request and who reads its events."""

    request: GenerateRequest
    answer: Answer
    part: int
    arrived_s: float = field(default_factory=time.monotonic)
    first_text_s: float | None = None
    opened: Opened | None = None  # where it runs
    deaths: int = 0  # workers that it was with when they died

    def goes_on(self) -> bool:
        """Whether another worker may begin it anew: nobody has seen anything of it."""
        unseen = self.first_text_s is None and self.answer.is_open(self.part)
        return unseen and self.deaths < MOST_DEATHS


class ServedModel:
    """Everything but `call` is used from the event loop alone."""

    def __init__(self, offer: Offer, *, queue_cap: int, mailbox: Mailbox, counts: Counts) -> None:
        self.offer = offer
        self.state: ModelState = "unloaded"
        self.failure: LoadmasterError | None = None  # why the state is `failed`
        self.users = 0  # HTTP requests that hold it
        self.visitor: Visitor | None = None  # is no user: whoever asks goes first
        self.turned_out_s = -math.inf  # when a job last had to go
        self.last_used_s = time.monotonic()
        self.keep_alive_s = math.inf  # how long it stays after its last use
        self.opened: Opened | None = None
        self._measuring: asyncio.Task[None] | None = None
        self.last_memory: tuple[MemoryRow, ...] = ()  # as it was last measured
        self.header: AnyModel | None = None  # once somebody asked for its facts
        self.on_death: Callable[[ServedModel, LoadmasterError], None] = lambda model, error: None
        self._queue_cap = queue_cap
        self._mailbox = mailbox
        self._counts = counts
        self._ids = itertools.count(1)
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[str, _Ticket] = {}
        # One thread: the template's child answers one at a time.
        self.calls = ThreadPoolExecutor(1, thread_name_prefix="serve-call")

    # -- what others may know

    @property
    def id(self) -> str:
        return self.offer.id

    @property
    def n_parallel(self) -> int:
        """Requests that may be with the worker."""
        opened = self.opened
        return opened.session.plan.engine.n_seq_max if opened else 1

    @property
    def is_idle(self) -> bool:
        """No person's request holds it."""
        return self.users == 0 and not self._running and not self._waiting

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_working(self) -> bool:
        """Whether something of it is with the worker, or a job has not let go of it."""
        return bool(self._running) or self.visitor is not None

    def turn_out(self, why: str) -> None:
        """Have a job let go of the model, which `visitor` tells; it comes back later."""
        if self.visitor is not None:
            self.turned_out_s = time.monotonic()
            self.visitor.ask_to_leave(why)

    def yields_to_job(self, patience_s: float) -> bool:
        """Whether a job may take its place: nobody used it for so long, and no other job does."""
        idle_s = time.monotonic() - self.last_used_s
        return self.is_idle and self.visitor is None and idle_s >= patience_s

    @property
    def expires_in_s(self) -> float:
        """Seconds until it is unloaded; infinite while it is used, or when it is to stay."""
        if not self.is_idle or self.visitor is not None or self.state != "ready":
            return math.inf
        return self.last_used_s + self.keep_alive_s - time.monotonic()

    def row(self) -> ModelRow:
        """The model as `ps` shows it."""
        session = self.opened.session if self.opened else None
        expires = self.expires_in_s
        return ModelRow(
            id=self.id,
            state=self.state,
            n_ctx=n_ctx_of(self.opened) if self.opened else None,
            n_parallel=self.n_parallel if session else None,
            n_running=len(self._running),
            n_waiting=len(self._waiting),
            n_items=self.visitor.n_in_flight if self.visitor else 0,
            planned_bytes=(
                {d.id: d.planned_bytes for d in session.plan.devices} if session else {}
            ),
            idle_s=time.monotonic() - self.last_used_s if self.is_idle else None,
            expires_s=None if math.isinf(expires) else max(0.0, expires),
            reason=self.failure.message if self.failure else None,
        )

    # -- holding it

    def hold(self) -> None:
        """Count one more user.

        Raises:
            BusyError: as many wait as may.
        """
        if self.users >= self._queue_cap + self.n_parallel:
            self._counts.refused += 1
            raise BusyError(
                f"{self.users} requests for `{self.id}` are running or waiting, "
                f"the queue takes {self._queue_cap}",
                hint="try again later, or start the server with a larger `--queue`",
                numbers={"n_waiting": self.users, "retry_after_s": RETRY_AFTER_S},
            )
        self.users += 1

    def release(self) -> None:
        """The user of a `hold` is done."""
        self.users -= 1
        self.last_used_s = time.monotonic()

    # -- its worker

    def attach(self, opened: Opened) -> None:
        """A worker is ready: those who wait may run."""
        self.opened, self.state, self.failure = opened, "ready", None
        self.last_used_s = time.monotonic()
        self._fill()

    def detach(self) -> Opened | None:
        """Give the worker up to be closed; what runs on it is no longer ours to fill."""
        opened, self.opened = self.opened, None
        self.state = "unloaded"
        return opened

    @property
    def worker_failure(self) -> LoadmasterError | None:
        """Why the worker is no more."""
        return self.opened.session.engine.failure if self.opened else None

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a call to the worker or the template off the event loop, one at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.calls, partial(function, *args))

    @property
    def live(self) -> Opened:
        """The open model.

        Raises:
            EngineError: the worker died meanwhile.
        """
        if self.opened is None:
            raise self.failure or EngineError(
                f"the worker of `{self.id}` ended, a new one is on its way", hint="try again"
            )
        return self.opened

    def measure(self) -> "asyncio.Task[None]":
        """Have `last_memory` renewed. The worker answers after its step, and is asked once."""
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.create_task(self._measure(self.live))
        return self._measuring

    async def _measure(self, opened: Opened) -> None:
        with suppress(LoadmasterError):  # it died meanwhile
            self.last_memory = await asyncio.to_thread(opened.session.memory)

    # -- requests

    def new_request_id(self) -> str:
        return f"{self.id}-{next(self._ids)}"

    def submit(self, requests: Sequence[GenerateRequest]) -> Answer:
        """Queue the requests of one answer; the reader of the answer can cancel them."""
        answer = Answer(len(requests))
        for part, request in enumerate(requests):
            ticket = _Ticket(request=request, answer=answer, part=part)
            answer.on_cancel(part, partial(self._cancel, ticket))
            self._waiting.append(ticket)
        self._fill()
        return answer

    def _cancel(self, ticket: _Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._counts.ended("cancelled")
        elif self.opened is not None and ticket.request.request_id in self._running:
            self.opened.session.engine.cancel(ticket.request.request_id)

    def fail_waiting(self, error: LoadmasterError) -> None:
        """There will be no worker: everyone who waits is told."""
        waiting, self._waiting = self._waiting, deque()
        for ticket in waiting:
            self._counts.ended("failed")
            ticket.answer.put(ticket.part, error)

    def fail_all(self, error: LoadmasterError) -> None:
        """The server ends: nobody waits any longer, and what runs is cut."""
        self.fail_waiting(error)
        for ticket in list(self._running.values()):
            ticket.answer.put(ticket.part, error)

    def _fill(self) -> None:
        """Hand waiting requests to the worker, by priority and then as they came."""
        while self.state == "ready" and self._waiting and len(self._running) < self.n_parallel:
            ticket = min(self._waiting, key=lambda waiting: waiting.request.priority)
            self._waiting.remove(ticket)
            self._start(ticket)

    def _start(self, ticket: _Ticket) -> None:
        request = ticket.request
        self._running[request.request_id] = ticket
        ticket.opened = self.live
        try:
            self.live.session.engine.start_request(request, self._sink)
        except LoadmasterError as error:
            del self._running[request.request_id]
            if self.worker_failure is not None:  # it died a moment ago: keep the place in the queue
                self._wait_again(ticket)
                self._died()
            else:
                self._counts.ended("failed")
                ticket.answer.put(ticket.part, error)

    def _sink(self, request_id: str, outcome: GenerateEvent | LoadmasterError) -> None:
        """On the watcher's thread."""
        self._mailbox.post(partial(self._take, request_id, outcome))

    def _take(self, request_id: str, outcome: GenerateEvent | LoadmasterError) -> None:
        ticket = self._running.get(request_id)
        if ticket is None:
            return
        if isinstance(outcome, DoneEvent | LoadmasterError):
            del self._running[request_id]
            self.last_used_s = time.monotonic()
        if isinstance(outcome, DoneEvent) and self._lost_worker(ticket, outcome):
            return
        self._counts.took(ticket.arrived_s, outcome, first=ticket.first_text_s is None)
        if isinstance(outcome, TextEvent):
            ticket.first_text_s = ticket.first_text_s or time.monotonic()
        ticket.answer.put(ticket.part, outcome)
        if isinstance(outcome, DoneEvent | LoadmasterError):
            self._fill()

    def _lost_worker(self, ticket: _Ticket, done: DoneEvent) -> bool:
        """Whether a request ended because its worker did, and is dealt with here."""
        engine = ticket.opened.session.engine if ticket.opened else None
        failure = engine.failure if engine else None
        closed = self.opened is not ticket.opened  # for another model, or after its death
        if done.finish_reason != "failed" or not (failure or closed):
            return False
        ticket.deaths += failure is not None
        if ticket.goes_on() and self.state != "failed":
            self._wait_again(ticket)
        else:
            self._counts.took(ticket.arrived_s, done, first=False)
            ticket.answer.put(ticket.part, self.failure or failure or done)
        self._died()
        return True

    def _wait_again(self, ticket: _Ticket) -> None:
        """Back to its place: by arrival, before those who came later."""
        place = sum(other.arrived_s <= ticket.arrived_s for other in self._waiting)
        self._waiting.insert(place, ticket)

    def check_worker(self) -> None:
        """Notice a worker that died while nothing ran."""
        if self.state == "ready" and self.worker_failure is not None:
            self._died()

    def _died(self) -> None:
        """Once for each worker; its other requests get their own ends from the watcher."""
        failure = self.worker_failure
        if self.state == "ready" and failure is not None:
            self.state = "loading"
            self.on_death(self, failure)

    def shut(self) -> None:
        """No more calls."""
        self.calls.shutdown(wait=False, cancel_futures=True)
