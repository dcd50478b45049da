"""Connections that send no whole request, and more of them than there may be.

The loop's clock is put forward by the tests, so the limits are the real ones and nobody waits.
"""

import asyncio
import json
import resource
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from loadmaster.interfaces.http import connection
from loadmaster.interfaces.http.connection import HEAD_WAIT_S, Connection, most_connections

HEAD = b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\n"
PART = HEAD[:20]
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REAL_S = 10.0  # more than anything here takes


class _Loop(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


class _Server:
    """Nothing but the protocol around an application that reads bodies and answers."""

    def __init__(self, protocol: type[H11Protocol], reads_bodies: bool) -> None:
        self.begun = asyncio.Event()
        self._reads_bodies = reads_bodies
        self._protocol = protocol
        self._config = uvicorn.Config(
            self._app,
            log_config=None,
            lifespan="off",
            interface="asgi3",
            http=protocol,
            ws="none",
            timeout_keep_alive=75,
        )
        self._state = ServerState()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._new, "127.0.0.1", 0)

    def _new(self) -> H11Protocol:
        return self._protocol(config=self._config, server_state=self._state, app_state={})

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.set()
        while self._reads_bodies and (await receive()).get("more_body"):
            pass
        head = {"status": 200, "headers": [(b"content-length", b"2")]}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": b"ok"})

    async def connect(self) -> Client:
        port = self._listener.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self._writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        self._listener.close()
        for transport in [each.transport for each in self._state.connections]:
            transport.abort()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)


def run(
    work: Callable[[_Server], Awaitable[Any]],
    *,
    protocol: type[H11Protocol] = Connection,
    reads_bodies: bool = True,
) -> Any:
    """Have `work` ask a server."""

    async def asking() -> Any:
        server = _Server(protocol, reads_bodies)
        await server.start()
        try:
            return await work(server)
        finally:
            await server.close()

    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(asking())


async def later(seconds: float) -> None:
    """Have so much time pass, and everything happen that is due."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    for _ in range(20):  # what was sent before is there, and read
        await asyncio.sleep(0.001)
    loop.ahead_s += seconds
    await asyncio.sleep(0)


async def whole(client: Client) -> bytes:
    reader, writer = client
    writer.write(HEAD + b"abcdef")
    return await asyncio.wait_for(reader.readuntil(b"ok"), REAL_S)


async def end(client: Client) -> tuple[int, Any]:
    """Status and body of what comes before the server ends the connection; 0 for nothing."""
    raw = await asyncio.wait_for(client[0].read(), REAL_S)
    if not raw:
        return 0, None
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)


def test_a_head_that_does_not_end_is_given_up() -> None:
    async def work(server: _Server) -> tuple[int, Any]:
        client = await server.connect()
        client[1].write(PART)
        await later(HEAD_WAIT_S)
        return await end(client)

    status, body = run(work)
    assert (status, body["error"]["code"]) == (408, "request_timeout")


def test_without_it_such_a_head_is_waited_for() -> None:
    """The control: uvicorn's own protocol has the fault."""

    async def work(server: _Server) -> bytes:
        client = await server.connect()
        client[1].write(PART)
        await later(100 * HEAD_WAIT_S)
        client[1].write(HEAD[len(PART) :] + b"abcdef")
        return await asyncio.wait_for(client[0].readuntil(b"ok"), REAL_S)

    assert run(work, protocol=H11Protocol).startswith(b"HTTP/1.1 200")


def test_bytes_that_creep_do_not_make_a_head_last() -> None:
    async def work(server: _Server) -> tuple[int, Any]:
        client = await server.connect()
        for byte in PART[:3]:
            client[1].write(bytes([byte]))
            await later(HEAD_WAIT_S / 6)
        await later(HEAD_WAIT_S / 2)
        return await end(client)

    assert run(work)[0] == 408


def test_a_connection_that_says_nothing_ends_without_a_word() -> None:
    async def work(server: _Server) -> tuple[int, Any]:
        client = await server.connect()
        await later(HEAD_WAIT_S)
        return await end(client)

    assert run(work) == (0, None)


def test_a_body_may_take_longer_than_a_head() -> None:
    async def work(server: _Server) -> bytes:
        reader, writer = await server.connect()
        writer.write(HEAD)
        await asyncio.wait_for(server.begun.wait(), REAL_S)
        for byte in b"abcdef":
            await later(HEAD_WAIT_S)
            writer.write(bytes([byte]))
        return await asyncio.wait_for(reader.readuntil(b"ok"), REAL_S)

    assert run(work).startswith(b"HTTP/1.1 200")


def test_a_client_that_pauses_between_requests_is_kept() -> None:
    async def work(server: _Server) -> list[bytes]:
        client = await server.connect()
        answers = [await whole(client)]
        await later(2 * HEAD_WAIT_S)
        return [*answers, await whole(client)]

    assert all(answer.startswith(b"HTTP/1.1 200") for answer in run(work))


def test_a_second_head_that_does_not_end_is_given_up() -> None:
    async def work(server: _Server) -> tuple[int, Any]:
        client = await server.connect()
        await whole(client)
        client[1].write(PART)
        await later(HEAD_WAIT_S)
        return await end(client)

    assert run(work)[0] == 408


def test_a_body_that_nobody_reads_does_not_keep_the_connection() -> None:
    async def work(server: _Server) -> tuple[bytes, bytes]:
        reader, writer = await server.connect()
        writer.write(HEAD)
        answer = await asyncio.wait_for(reader.readuntil(b"ok"), REAL_S)
        for byte in b"abc":
            writer.write(bytes([byte]))
            await later(HEAD_WAIT_S / 6)
        await later(HEAD_WAIT_S / 2)
        return answer, await asyncio.wait_for(reader.read(), REAL_S)

    answer, rest = run(work, reads_bodies=False)
    assert answer.startswith(b"HTTP/1.1 200")
    assert rest == b""


def test_a_long_body_that_nobody_reads_may_be_sent_whole() -> None:
    n_pieces, piece = 8, b"x" * (1 << 14)  # 16 s of the least pace each
    head = HEAD.replace(b": 6", b": %d" % (n_pieces * len(piece)))

    async def work(server: _Server) -> bytes:
        client = await server.connect()
        client[1].write(head)
        await asyncio.wait_for(client[0].readuntil(b"ok"), REAL_S)
        for _ in range(n_pieces):
            client[1].write(piece)
            await later(HEAD_WAIT_S / 3)
        return await whole(client)

    assert run(work, reads_bodies=False).startswith(b"HTTP/1.1 200")


def test_one_connection_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 2)

    async def work(server: _Server) -> tuple[tuple[int, Any], bytes]:
        first, _, third = [await server.connect() for _ in range(3)]
        third[1].write(HEAD)
        return await end(third), await whole(first)

    (status, body), answer = run(work)
    assert (status, body["error"]["code"]) == (503, "too_many_connections")
    assert "2 connections are open" in body["error"]["message"]
    assert answer.startswith(b"HTTP/1.1 200")


def test_one_that_left_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 1)

    async def work(server: _Server) -> bytes:
        first, second = await server.connect(), await server.connect()
        assert (await end(second))[0] == 503
        first[1].close()
        await first[1].wait_closed()
        await later(HEAD_WAIT_S)  # the one that was refused is gone as well
        return await whole(await server.connect())

    assert run(work).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("soft", "most"), [(1024, 768), (100, 1), (resource.RLIM_INFINITY, 4096)])
def test_descriptors_limit_the_connections(
    soft: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert most_connections() == most
