"""One request over a socket of its own, read to its end or left in the middle, and how it ended."""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"
LIMIT_S = 120.0  # a request without an end so long after it was sent hangs
_PIECE_BYTES = 1 << 16

# whole: the answer and its one end; error: text, then one error event and no [DONE]; refused: a
# status of 400 or more with an error object; left: we went away ourselves. Faults of the server:
# cut: the connection ended and nothing said why; double: something after the end; hung: no end.
Verdict = Literal["whole", "error", "refused", "left", "cut", "double", "hung"]
FAULTS = ("cut", "double", "hung")


@dataclass(slots=True, kw_only=True)
class Seen:
    """What came for one request."""

    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    tokens: list[bytes] = field(default_factory=list)  # where log-probabilities were asked for
    text_times: list[float] = field(default_factory=list)
    finish: str | None = None
    dones: int = 0
    errors: list[str] = field(default_factory=list)  # codes
    after_end: int = 0  # events that came after one that ends the answer
    left: bool = False
    timed_out: bool = False

    @property
    def ended(self) -> bool:
        return bool(self.dones or self.errors)

    def take(self, data: bytes) -> None:
        """One event of a stream."""
        self.after_end += self.ended
        if data == b"[DONE]":
            self.dones += 1
            return
        self.take_object(json.loads(data))

    def take_object(self, body: dict[str, Any]) -> None:
        """A chunk, a whole answer, or an error. Of several choices the first one is kept."""
        if "error" in body:
            self.errors.append(str(body["error"].get("code")))
            return
        for choice in body.get("choices", ()):
            if choice.get("index"):
                continue
            said = choice.get("delta") or choice.get("message") or {}
            if said.get("content"):
                self.text += said["content"]
                self.text_times.append(time.monotonic())
            self.finish = choice.get("finish_reason") or self.finish
            for token in (choice.get("logprobs") or {}).get("content") or ():
                self.tokens.append(bytes(token["bytes"]))


def verdict(seen: Seen) -> Verdict:
    """How a request ended."""
    if seen.left:
        return "left"
    if seen.timed_out:
        return "hung"
    if seen.after_end or seen.dones + len(seen.errors) > 1:
        return "double"
    if seen.status is None or not seen.ended:
        return "cut"
    if seen.status >= 400:
        return "refused"
    return "error" if seen.errors else "whole" if seen.finish else "cut"


def chat(text: str = "go on", *, stream: bool = True, **changes: Any) -> dict[str, Any]:
    """A greedy request."""
    messages = [{"role": "user", "content": text}]
    body = {"model": "demo", "messages": messages, "temperature": 0, "stream": stream}
    return {**body, "max_tokens": 100, "ignore_eos": True, **changes}


class Asking:
    """A request on its way."""

    def __init__(
        self, port: int, body: dict[str, Any], *, receive_bytes: int | None = None
    ) -> None:
        """`receive_bytes`: a small buffer in the kernel, for one who reads slowly."""
        self.seen = Seen()
        self._port = port
        self._receive_bytes = receive_bytes
        self._payload = json.dumps(body).encode()
        self._events: AsyncGenerator[None] | None = None

    async def send(self, share: float = 1.0) -> None:
        """Connect and send the head and this part of the body."""
        connection = socket.socket()
        if self._receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (HOST, self._port))
        limit = self._receive_bytes or _PIECE_BYTES
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=limit)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(self._payload)}\r\n"
        self._writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n")
        self._writer.write(self._payload[: int(len(self._payload) * share)])
        await self._writer.drain()

    async def send_slowly(self, pieces: int, every_s: float) -> None:
        """Connect and send the head, then the body in so many pieces, with a pause before each."""
        await self.send(0.0)
        size = -(-len(self._payload) // pieces)
        for start in range(0, len(self._payload), size):
            await asyncio.sleep(every_s)
            self._writer.write(self._payload[start : start + size])
            await self._writer.drain()

    async def until_text(self, n: int = 1) -> None:
        """Read until so many texts have come, or the end."""
        events = self._reading()
        while len(self.seen.text_times) < n and not self.seen.ended:
            if await anext(events, "end") == "end":
                return

    async def read_slowly(self, every_s: float, duration_s: float) -> None:
        """Take one event now and then."""
        events, until = self._reading(), time.monotonic() + duration_s
        while time.monotonic() < until and await anext(events, "end") != "end":
            await asyncio.sleep(every_s)

    async def finish(self, limit_s: float = LIMIT_S) -> Seen:
        """Read to the end."""
        try:
            async with asyncio.timeout(limit_s):
                async for _ in self._reading():
                    pass
        except TimeoutError:
            self.seen.timed_out = True
        except (OSError, EOFError, ValueError):
            pass  # the connection ended early: `verdict` sees what is missing
        self._close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        return self.seen

    def leave(self, *, reset: bool) -> float:
        """Go away, politely or not; when."""
        self.seen.left = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        self._close()
        return time.monotonic()

    def _close(self) -> None:
        self.seen.ended_s = time.monotonic()
        if self.seen.timed_out:
            self._writer.transport.abort()
        else:
            self._writer.close()

    def _reading(self) -> AsyncGenerator[None]:
        if self._events is None:
            self._events = self._read()
        return self._events

    async def _read(self) -> AsyncGenerator[None]:
        """Yields after everything that came."""
        await self._read_head()
        if self.seen.headers.get("transfer-encoding") != "chunked":
            length = int(self.seen.headers["content-length"])
            body = json.loads(await self._reader.readexactly(length))
            self.seen.take_object(body)
            self.seen.dones += self.seen.finish is not None
            yield
            return
        waiting = b""
        async for piece in self._chunks():
            *events, waiting = (waiting + piece).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    self.seen.take(event[6:])
            yield

    async def _read_head(self) -> None:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.seen.status = int(lines[0].split()[1])
        pairs = (line.partition(":") for line in lines[1:] if line)
        self.seen.headers = {name.lower(): value.strip() for name, _, value in pairs}

    async def _chunks(self) -> AsyncGenerator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]


async def ask(port: int, body: dict[str, Any], limit_s: float = LIMIT_S) -> Seen:
    """Send a request and read its answer to the end."""
    asking = Asking(port, body)
    try:
        await asking.send()
    except OSError:  # not even accepted
        asking.seen.ended_s = time.monotonic()
        return asking.seen
    return await asking.finish(limit_s)
