"""A load generator that hardly computes: raw sockets, one thread, everything is read afterwards.

It runs on the cores of the server that it asks. So it keeps what arrives and when, and nothing is
parsed before the last stream has ended.
"""

import json
import select
import socket
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.streaming.times import Stream

_HOST = "127.0.0.1"
_RECEIVE_BYTES = 1 << 16


class StreamError(Exception):
    """A server's answer is no whole stream."""


@dataclass(slots=True, kw_only=True)
class Received:
    """The bytes of one response, and when they came."""

    start_s: float
    raw: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)  # bytes after each read
    times: list[float] = field(default_factory=list)

    def add(self, chunk: bytes) -> None:
        self.raw += chunk
        self.ends.append(len(self.raw))
        self.times.append(time.perf_counter())

    def at(self, offset: int) -> float:
        """When the byte at an offset had come."""
        return self.times[bisect_right(self.ends, offset)]


def ask_all(
    port: int, path: str, bodies: Sequence[dict[str, Any]], delays_s: Sequence[float] = ()
) -> list[Received]:
    """Send the requests, each on a connection of its own, and read until the last stream ends.

    Request `i` is sent `delays_s[i]` after the first one, in order; without delays all at once.
    """
    payloads = [_request(port, path, body) for body in bodies]
    poller = select.epoll()
    open_ones: dict[int, tuple[socket.socket, Received]] = {}
    received: list[Received] = []
    start = time.perf_counter()
    while open_ones or len(received) < len(payloads):
        wait_s = -1.0
        if len(received) < len(payloads):
            due = start + delays_s[len(received)] if delays_s else start
            wait_s = max(0.0, due - time.perf_counter())
        if not wait_s:
            connection, one = _send(port, payloads[len(received)])
            received.append(one)
            open_ones[connection.fileno()] = connection, one
            poller.register(connection, select.EPOLLIN)
            continue
        for fd, _ in poller.poll(wait_s):
            connection, one = open_ones[fd]
            chunk = connection.recv(_RECEIVE_BYTES)
            if chunk:
                one.add(chunk)
                continue
            poller.unregister(fd)
            connection.close()
            del open_ones[fd]
    poller.close()
    return received


def _send(port: int, payload: bytes) -> tuple[socket.socket, Received]:
    one = Received(start_s=time.perf_counter())
    connection = socket.create_connection((_HOST, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(payload)
    return connection, one


def _request(port: int, path: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {_HOST}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


def stream_of(received: Received) -> Stream:
    """The stream in a response: text with its times, and the counts of the last chunks.

    Raises:
        StreamError: another status than 200, an error event, or no end.
    """
    head, body, places = _body(received)
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise StreamError(f"{head.decode(errors='replace')} {body[:500].decode(errors='replace')}")
    stream = Stream(start_s=received.start_s)
    end, last = 0, b""
    while (at := body.find(b"\n\n", end)) >= 0:
        block, end = body[end:at], at + 2
        if block.startswith(b"data: "):
            last = block[6:]
            if last != b"[DONE]":
                _take(stream, json.loads(last), received.at(places(at + 1)))
    if last != b"[DONE]":
        raise StreamError(f"a stream without an end: {bytes(body[-500:])!r}")
    return stream


def _take(stream: Stream, chunk: dict[str, Any], time_s: float) -> None:
    if "error" in chunk:
        raise StreamError(str(chunk["error"]))
    for choice in chunk["choices"]:
        text = choice.get("text") or choice.get("delta", {}).get("content")
        if text:
            stream.add(time_s, text)
    usage = chunk.get("usage")
    if usage:
        stream.n_prompt = usage["prompt_tokens"]
        stream.n_generated = usage["completion_tokens"]
        stream.n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if "timings" in chunk:  # llama-server counts apart what it computed
        stream.n_cached = stream.n_prompt - chunk["timings"]["prompt_n"]
    stream.end_s = max(stream.end_s, time_s)


def _body(received: Received) -> tuple[bytes, bytes, "_Places"]:
    """Head and body, and from a place in the body to the one in what was received."""
    raw = bytes(received.raw)
    head, _, rest = raw.partition(b"\r\n\r\n")
    start = len(head) + 4
    if b"transfer-encoding: chunked" not in head.lower():
        return head, rest, _Places(bodies=[0], raws=[start])
    parts: list[bytes] = []
    places, at, size = _Places(bodies=[], raws=[]), start, 0
    while True:
        line_end = raw.find(b"\r\n", at)
        length = int(raw[at:line_end] or b"0", 16) if line_end > at else 0
        if not length:
            return head, b"".join(parts), places
        places.bodies.append(size)
        places.raws.append(line_end + 2)
        parts.append(raw[line_end + 2 : line_end + 2 + length])
        size += length
        at = line_end + 2 + length + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where the chunks of a body begin, in the body and in what was received."""

    bodies: list[int]
    raws: list[int]

    def __call__(self, place: int) -> int:
        chunk = bisect_right(self.bodies, place) - 1
        return self.raws[chunk] + place - self.bodies[chunk]
