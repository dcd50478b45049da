"""The events of one answer on their way from engine threads to one reader in the event loop.

An answer has one part for each of its requests (`n` choices, several prompts). What the reader has
not taken yet is joined, so a slow reader costs text and not events, and no other reader any time.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass

from loadmaster.engine.types import (
    SCHEMA_FAILED,
    DoneEvent,
    GenerateEvent,
    PrefillEvent,
    TextEvent,
)
from loadmaster.errors import EngineCrashedError, EngineError, LoadmasterError, UsageError

# Text that may wait for its reader. An answer is seldom a tenth of it; what is more belongs to
# somebody who has stopped reading.
WAITING_LIMIT_CHARS = 1 << 20

Outcome = GenerateEvent | LoadmasterError


@dataclass(frozen=True, slots=True, kw_only=True)
class PartEvent:
    """An event of one part of an answer."""

    part: int
    event: GenerateEvent


class Answer:
    """What one reader waits for. All of it is used from one event loop."""

    def __init__(self, n_parts: int) -> None:
        self._events: deque[PartEvent] = deque()
        self._open = set(range(n_parts))
        self._failure: LoadmasterError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._cancels: dict[int, Callable[[], None]] = {}
        self.waiting_chars = 0  # of text that was not taken yet

    def on_cancel(self, part: int, cancel: Callable[[], None]) -> None:
        """How a part is ended early."""
        self._cancels[part] = cancel

    def is_open(self, part: int) -> bool:
        """Whether somebody waits for more of this part."""
        return part in self._open

    def put(self, part: int, outcome: Outcome) -> None:
        """Take note of an event; whatever follows a part's terminal one is ignored."""
        if part not in self._open:
            return
        if isinstance(outcome, LoadmasterError):
            self._fail(part, outcome)
        elif isinstance(outcome, DoneEvent) and outcome.finish_reason == "failed":
            self._fail(part, failure_of(outcome))
        elif self.waiting_chars > WAITING_LIMIT_CHARS:
            self._failure = EngineError("the client reads its answer too slowly")
            self.cancel()
        else:
            self._keep(part, outcome)
        self._wake()

    def _keep(self, part: int, event: GenerateEvent) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(event, DoneEvent):
            self._open.discard(part)
        if isinstance(event, TextEvent):
            self.waiting_chars += len(event.text)
        if last is not None and last.part == part and (joined := _join(last.event, event)):
            self._events[-1] = PartEvent(part=part, event=joined)
        else:
            self._events.append(PartEvent(part=part, event=event))

    def _fail(self, part: int, error: LoadmasterError) -> None:
        """One part that fails ends the answer."""
        self._open.discard(part)
        self._failure = self._failure or error
        self.cancel()

    def cancel(self) -> None:
        """End every part that has not ended."""
        still_open, self._open = self._open, set()
        for part in sorted(still_open):
            self._cancels.get(part, _nothing)()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def first(self) -> None:
        """Wait until something has happened, and take none of it. Leaving early cancels.

        Raises:
            LoadmasterError: the first that happened is a failure.
        """
        try:
            while self._open and not self._events and self._failure is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._failure is not None and not self._events:
            raise self._failure

    async def events(self) -> AsyncGenerator[PartEvent, None]:
        """What happens, until every part has ended. Leaving early cancels.

        Raises:
            LoadmasterError: a part failed; text that came before has been yielded.
        """
        try:
            while True:
                while self._events:
                    item = self._events.popleft()
                    if isinstance(item.event, TextEvent):
                        self.waiting_chars -= len(item.event.text)
                    yield item
                if self._failure is not None:
                    raise self._failure
                if not self._open:
                    return
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            self.cancel()


def failure_of(done: DoneEvent) -> LoadmasterError:
    """Why a request failed: by its own schema, or because the engine did."""
    reason = done.error or "the engine failed"
    if not reason.startswith(SCHEMA_FAILED):
        return EngineCrashedError(reason)
    refusal = UsageError(
        f"after {done.n_generated} tokens {reason}",
        hint="fewer optional properties, alternatives and counts make a schema simpler",
        numbers={"n_generated": done.n_generated},
    )
    refusal.code = "schema_too_complex"
    return refusal


def _nothing() -> None:
    """There is nothing to cancel."""


def _join(last: GenerateEvent, event: GenerateEvent) -> GenerateEvent | None:
    """Two events of one part as one; None when both are to be told."""
    if isinstance(last, TextEvent) and isinstance(event, TextEvent):
        return TextEvent(
            request_id=event.request_id,
            text=last.text + event.text,
            n_tokens=event.n_tokens,
            logprobs=(*last.logprobs, *event.logprobs),
        )
    if isinstance(last, PrefillEvent) and isinstance(event, PrefillEvent):
        return event
    return None


class Mailbox:
    """Carries calls from any thread into the event loop, many with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run in the loop, in order; nothing happens once the loop has ended."""
        self._calls.append(call)
        if not self._scheduled:
            self._scheduled = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False  # first: what comes from now on schedules anew
        while self._calls:
            self._calls.popleft()()
