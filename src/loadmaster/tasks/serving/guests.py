"""A job on a served model: it has the model while people leave it, and gives it back when asked.

The executor of the job runs on a thread of its own and calls a guest as it would its own model. The
guest goes straight to the worker, whose scheduler lets people's requests go first; what blocks the
worker for others, tokenizing and embedding, is done a little at a time.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from functools import partial

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import DoneEvent, GenerateEvent, GenerateRequest
from loadmaster.errors import EngineError, LoadmasterError, UsageError
from loadmaster.tasks.batch.model import SHARED, Messages, Vectors
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.requests import check_writes, n_ctx_of

WAITING = "waiting for its model: people's requests go first"


class Guest:
    """A `BatchModel` on a served model.

    `grant`, `ask_to_leave`, `lost`, `granted` and `gone` are called in the event loop, everything
    else by the threads of the job.
    """

    pace = SHARED

    def __init__(self, model: ServedModel, *, prefix_scope: str) -> None:
        """`prefix_scope`: whose prompts may share cells with those of the job."""
        self.name = model.id
        self.wake: Callable[[], None] = lambda: None  # has the executor look at `withheld`
        self._model = model
        self._prefix_scope = prefix_scope
        self._loop = asyncio.get_running_loop()
        self._granted, self._gone = asyncio.Event(), asyncio.Event()
        self._moving = threading.Lock()  # held while one of the next three changes
        self._next: Opened | None = None  # granted, not taken up yet
        self._opened: Opened | None = None  # taken up; it may be dead
        self._leaving: str | None = None
        self._in_flight: set[str] = set()

    # -- in the event loop

    @property
    def n_in_flight(self) -> int:
        """Requests of the job that are with the worker."""
        return len(self._in_flight)

    def grant(self, opened: Opened) -> None:
        """The job may have the model, until it is asked to leave."""
        with self._moving:
            self._next, self._leaving = opened, None
        self._gone.clear()
        self._granted.set()
        self.wake()

    def ask_to_leave(self, why: str) -> None:
        """The model is needed by others; `gone` ends when the job has let go of it."""
        with self._moving:
            self._leaving = why
            has_begun = self._next is None
            self._next = None
        if not has_begun:
            self._gone.set()
        self.wake()

    def lost(self) -> None:
        """There is no worker any more: nothing to let go of."""
        with self._moving:
            self._next = None
        self._gone.set()
        self.wake()

    async def granted(self) -> None:
        """Wait until the job may have the model for the first time."""
        await self._granted.wait()

    async def gone(self) -> None:
        """Wait until the job has let go of the model."""
        await self._gone.wait()

    # -- as the executor sees it

    @property
    def withheld(self) -> str | None:
        if self._leaving is not None:
            return self._leaving
        dead = self._opened is None or self.failure is not None
        return WAITING if self._next is None and dead else None

    @property
    def failure(self) -> LoadmasterError | None:
        opened = self._opened
        return None if opened is None else opened.session.engine.failure

    @property
    def n_ctx(self) -> int:
        opened = self._live
        return opened.session.loaded.n_embed_max or n_ctx_of(opened)

    @property
    def n_vocab(self) -> int:
        return self._live.session.loaded.n_vocab

    @property
    def n_sequences(self) -> int:
        opened = self._opened
        return 1 if opened is None else opened.session.plan.engine.n_seq_max

    @property
    def _live(self) -> Opened:
        opened = self._opened
        if opened is None:
            raise EngineError(f"`{self.name}` is not open for jobs now")
        return opened

    def reopen(self) -> None:
        """Take up what was granted.

        Raises:
            EngineError: nothing was.
        """
        with self._moving:
            if self._next is None:
                raise EngineError(f"`{self.name}` is not open for jobs now")
            self._opened, self._next = self._next, None
        self._in_flight.clear()

    def close(self) -> None:
        with self._moving:
            self._opened = self._next = None
        self._in_flight.clear()
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._gone.set)

    def render(self, messages: Messages) -> str:
        opened = self._live
        loaded = opened.session.loaded
        work = partial(
            opened.template.render, messages, bos_text=loaded.bos_text, eos_text=loaded.eos_text
        )
        try:
            return self._model.calls.submit(work).result()
        except (CancelledError, RuntimeError):
            raise EngineError("the server is shutting down") from None

    def tokens_of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return self._live.session.tokens_of(texts)

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        opened = self._live
        check_writes(self.name, opened)

        def hearing(request_id: str, event: GenerateEvent | LoadmasterError) -> None:
            if isinstance(event, DoneEvent | LoadmasterError):
                self._in_flight.discard(request_id)
            sink(request_id, event)

        self._in_flight.add(request.request_id)
        try:
            scoped = replace(request, prefix_scope=self._prefix_scope)
            opened.session.engine.start_request(scoped, hearing)
        except BaseException:
            self._in_flight.discard(request.request_id)
            raise

    def cancel(self, request_id: str) -> None:
        opened = self._opened
        if opened is not None:
            opened.session.engine.cancel(request_id)

    def embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        opened = self._live
        if opened.session.plan.engine.pooling in (None, "rank"):
            raise UsageError(
                f"`{self.name}` is not served for embeddings",
                hint=f"`loadmaster serve --embeddings {self.name}=MODEL` offers it for them",
            )
        return opened.session.engine.embed(prompts)  # a call for each step: others get in between
