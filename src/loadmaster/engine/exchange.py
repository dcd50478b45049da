"""Who waits for what from a worker: open calls and open requests, and the frames for them.

Every call gets one answer or one error; every request gets its events and one terminal, whatever
happens to the worker.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadmaster.engine.remote_errors import remote_error
from loadmaster.engine.types import (
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    PrefillEvent,
    TextEvent,
)
from loadmaster.engine.wire import Frame, WireError
from loadmaster.errors import EngineError, LoadmasterError, UsageError
from loadmaster.schema import SchemaError, from_json

Stream = queue.SimpleQueue[GenerateEvent | LoadmasterError]
# Gets a request's id with each of its events, on the watcher's thread: it must neither wait nor
# raise. The last one is a DoneEvent, or the error with which the request was refused.
Sink = Callable[[str, GenerateEvent | LoadmasterError], None]
_EVENTS: dict[str, Any] = {"text": TextEvent, "prefill": PrefillEvent, "done": DoneEvent}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The result of a call."""

    result: object
    payload: bytes = b""


@dataclass(slots=True, kw_only=True)
class Call:
    """A call that waits for its answer; floats on the way are progress."""

    call_id: int
    doing: str
    inbox: "queue.SimpleQueue[Answer | LoadmasterError | float]" = field(
        default_factory=queue.SimpleQueue
    )


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request that has had no terminal event yet."""

    request: GenerateRequest
    sink: Sink
    n_tokens: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def put(self, event: GenerateEvent | LoadmasterError) -> None:
        self.sink(self.request.request_id, event)


class Exchange:
    """Open calls and requests of one worker, safe from any thread."""

    def __init__(self) -> None:
        self.failure: LoadmasterError | None = None  # set once, when the worker is no more
        self._closed = False
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._requests: dict[str, _Open] = {}

    def begin_call(self, doing: str) -> Call:
        """Register a call. Raises why the worker is no more."""
        with self._lock:
            self._check()
            call = Call(call_id=next(self._ids), doing=doing)
            self._calls[call.call_id] = call
        return call

    def begin_request(self, request: GenerateRequest, sink: Sink) -> None:
        """Register a request. Raises why the worker is no more."""
        entry = _Open(request=request, sink=sink)
        with self._lock:
            self._check()
            if request.request_id in self._requests:
                raise UsageError(f"request `{request.request_id}` is running already")
            self._requests[request.request_id] = entry

    def check_alive(self) -> None:
        """Raises why the worker is no more, if it is no more."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._closed:
            raise EngineError("the engine is closed")

    def close(self) -> None:
        """From now on, the end of the worker is no failure."""
        with self._lock:
            self._closed = True

    def doing(self) -> str:
        """What the worker is at, as its parent sees it: `while …`."""
        with self._lock:
            for call in self._calls.values():
                return call.doing
            return "generating" if self._requests else "idle"

    def oldest_request_s(self) -> float:
        """How long the oldest open request has been with the worker; 0 when there is none."""
        with self._lock:
            oldest = next(iter(self._requests.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.began_s

    # -- from the worker

    def route(self, frame: Frame) -> None:
        """Pass a frame to whoever waits for it.

        Raises:
            WireError: it is none that a worker sends.
        """
        body = frame.body
        match frame.kind:
            case "event":
                self._event(body)
            case "reply" | "error" | "progress":
                self._answer(frame)
            case "refused":
                self._end(body.get("request_id"), remote_error(body.get("error")))
            case kind:
                raise WireError(f"unknown kind {kind!r}")

    def _answer(self, frame: Frame) -> None:
        call_id, kind = frame.body.get("id", 0), frame.kind
        if not isinstance(call_id, int):
            raise WireError(f"an answer to call {call_id!r}")
        with self._lock:
            call = self._calls.get(call_id)
            if call is None:
                return
            if kind != "progress":
                del self._calls[call_id]
        value = frame.body.get("value")
        if kind == "reply":
            call.inbox.put(Answer(result=frame.body.get("result"), payload=frame.payload))
        elif kind == "error":
            call.inbox.put(remote_error(frame.body.get("error")))
        elif isinstance(value, int | float):
            call.inbox.put(float(value))

    def _event(self, body: Mapping[str, Any]) -> None:
        try:
            event: GenerateEvent = from_json(_EVENTS[str(body.get("event"))], body.get("body"))
        except (SchemaError, KeyError) as error:
            raise WireError(f"an event with {error}") from None
        if isinstance(event, DoneEvent):
            self._end(event.request_id, event)
            return
        with self._lock:
            entry = self._requests.get(event.request_id)
        if entry is not None:
            if isinstance(event, TextEvent):
                entry.n_tokens = event.n_tokens
            entry.put(event)

    def _end(self, request_id: object, terminal: DoneEvent | LoadmasterError) -> None:
        with self._lock:
            entry = self._requests.pop(str(request_id), None)
        if entry is not None:
            entry.put(terminal)

    def fail_all(self, failure: LoadmasterError) -> None:
        """The worker is no more: every call raises `failure`, every request ends with it."""
        with self._lock:
            if self._closed:
                failure = EngineError("the engine was closed")
            else:
                self.failure = failure
            calls, self._calls = self._calls, {}
            requests, self._requests = self._requests, {}
        for call in calls.values():
            call.inbox.put(failure)
        for entry in requests.values():
            entry.put(_failed(entry, failure))


def _failed(entry: _Open, failure: LoadmasterError) -> DoneEvent:
    return DoneEvent(
        request_id=entry.request.request_id,
        finish_reason="failed",
        n_prompt=len(entry.request.prompt),
        n_cached=0,
        n_generated=entry.n_tokens,
        prefill_s=0.0,
        decode_s=0.0,
        error=failure.message,
    )
