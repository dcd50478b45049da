"""Responses that come in pieces: sent as they are made, pinged while nothing is, ended when the
client is gone or has stopped reading."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

PING = b": ping\n\n"
PING_S = 10.0
STALL_S = 60.0  # a client that takes nothing for so long is given up

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class PieceStream(Response):
    """A response whose body is an asynchronous iterator of bytes."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        media_type: str = EVENT_STREAM,
        ping: bytes | None = PING,
        ping_first: bool = True,
        ping_s: float = PING_S,
        stall_s: float = STALL_S,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`ping_first`: a ping at once, where the first piece may take its time; elsewhere none, as
        some clients take a comment for data. `on_end` is called however the response ends, even
        where no piece was asked for."""
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # a proxy that waits for more shows nothing
        self._pieces = pieces
        self._ping = ping
        self._ping_first = ping_first
        self._ping_s = ping_s
        self._stall_s = stall_s
        self._on_end = on_end
        self._sent_s = time.monotonic()
        self._sending = asyncio.Lock()
        self._began_s = math.inf  # when the write began that has not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        others = {asyncio.create_task(_gone(receive)), asyncio.create_task(self._pinging(send))}
        try:
            await asyncio.wait({pump, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, *others):
                task.cancel()
            results = await asyncio.gather(pump, *others, return_exceptions=True)
            self._on_end()
        if isinstance(results[0], Exception) and not isinstance(results[0], TimeoutError | OSError):
            raise results[0]

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._pieces):
            await self._start(send)
            async for piece in self._pieces:
                if piece:
                    await self._send(send, piece)
            await self._send(send, b"", more=False)

    async def _start(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start", "status": self.status_code, "headers": self.raw_headers
        }  # fmt: skip
        await send(start)
        if self._ping is not None and self._ping_first:
            await self._send(send, self._ping)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with self._sending:
            message: Message = {"type": "http.response.body", "body": body, "more_body": more}
            self._began_s = time.monotonic()
            await send(message)
            self._began_s, self._sent_s = math.inf, time.monotonic()

    async def _pinging(self, send: Send) -> None:
        """Ends when the client has taken nothing for too long. One timer watches all writes: a
        deadline for each would cost more than the write itself."""
        while True:
            if self._sending.locked():
                due_s = self._began_s + self._stall_s
                if due_s <= time.monotonic():
                    return
            else:
                due_s = self._sent_s + self._ping_s
                if due_s <= time.monotonic():
                    await asyncio.wait_for(self._send(send, self._ping or b""), self._stall_s)
                    continue
            await asyncio.sleep(min(due_s - time.monotonic(), self._stall_s))


async def _gone(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client is gone.

    Raises:
        ClientGoneError: it is.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(BaseException):
                await one


def sse(data: bytes, event: str | None = None) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one `data` line holds it."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + data + b"\n\n"
