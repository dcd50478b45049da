"""Streamed responses: pings, and clients that stop reading."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import Message

from loadmaster.interfaces.http.streams import PING, PieceStream


async def pieces(*items: bytes, then_wait: bool = False) -> AsyncGenerator[bytes, None]:
    for item in items:
        yield item
    if then_wait:
        await asyncio.Event().wait()


async def connected() -> Message:
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


class Client:
    """Takes so many writes, then nothing."""

    def __init__(self, takes: int) -> None:
        self.bodies: list[bytes] = []
        self._takes = takes

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            if len(self.bodies) == self._takes:
                await asyncio.Event().wait()
            self.bodies.append(message["body"])


def respond(stream: PieceStream, client: Client) -> None:
    async def run() -> None:
        await asyncio.wait_for(stream({"type": "http"}, connected, client.send), 10)

    asyncio.run(run())


def test_pieces_come_after_the_first_ping() -> None:
    client = Client(takes=100)
    respond(PieceStream(pieces(b"a", b"", b"b")), client)
    assert client.bodies == [PING, b"a", b"b", b""]


def test_who_takes_nothing_is_given_up() -> None:
    client, ended = Client(takes=2), list[bool]()
    stream = PieceStream(pieces(b"a", b"b", b"c"), stall_s=0.02, on_end=lambda: ended.append(True))
    respond(stream, client)
    assert client.bodies == [PING, b"a"]
    assert ended == [True]


def test_who_takes_no_ping_is_given_up() -> None:
    client = Client(takes=3)
    respond(PieceStream(pieces(b"a", then_wait=True), ping_s=0.01, stall_s=0.02), client)
    assert client.bodies == [PING, b"a", PING]
