"""A client's connection: how long the head of a request may take to come, and how many there are.

uvicorn ends a connection that is idle between two requests. One that sends nothing, or a byte now
and then, it would keep for ever.
"""

import asyncio
import resource
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from loadmaster.errors import BusyError, LoadmasterError, UsageError
from loadmaster.interfaces.http.errors import error_response
from loadmaster.interfaces.http.guard import BODY_PACE_BYTES

HEAD_WAIT_S = 30.0  # from the first byte of a request, or the connection, to the end of its head
MOST_CONNECTIONS = 4096
SPARE_FILES = 256  # descriptors for workers, stores and uploads
_LINGER_S = 1.0  # for the client to take the reason why it was refused


class _NoHeadError(UsageError):
    """A request that begins and does not go on."""

    http_status = 408
    code = "request_timeout"


class _CrowdedError(BusyError):
    """One connection more than there may be."""

    http_status = 503
    code = "too_many_connections"


def most_connections() -> int:
    """How many there may be at a time: each takes one of the descriptors of the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, soft - SPARE_FILES))


class Connection(H11Protocol):
    """uvicorn's connection, with an end for clients that send no whole request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None
        self._refused = False
        self._rest_until_s = 0.0  # for what is left of a body that nobody reads

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > most_connections():
            self._refuse()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._answering and self.conn.their_state is h11.SEND_BODY:
            self._expect_rest(len(data))
        elif not self._answering:
            self._expect_head()
        super().data_received(data)
        if self._answering:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._rest_until_s = self.loop.time() + HEAD_WAIT_S
        super().on_response_complete()
        if not self._answering and self.conn.their_state is h11.SEND_BODY:
            self._expect_head()  # what is left of a body that nobody reads comes before it

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_WAIT_S, self._give_up)

    def _expect_rest(self, n_bytes: int) -> None:
        """A body that nobody reads may go on while it keeps the pace of one that is read: closed
        amid it, the answer would be lost to a client that sends everything first."""
        self._rest_until_s += n_bytes / BODY_PACE_BYTES
        self._stop_waiting()
        until_s = min(self._rest_until_s, self.loop.time() + HEAD_WAIT_S)
        self._late = self.loop.call_at(until_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        """The reason goes to a client that has sent a part of a head; to others there is none."""
        self._late = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._say(_NoHeadError(f"the head of the request took longer than {HEAD_WAIT_S:g} s"))
        self.transport.close()

    def _refuse(self) -> None:
        """Say why and end soon: closed at once, with bytes unread, the reason would be lost."""
        self._refused = True
        self.connections.discard(self)  # it takes nobody's place while it ends
        n = len(self.connections)
        self._say(_CrowdedError(f"{n} connections are open, as many as may be"))
        self.transport.write_eof()
        self._late = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _say(self, error: LoadmasterError) -> None:
        response = error_response(error, path="")
        response.headers["connection"] = "close"
        for event in (
            h11.Response(status_code=error.http_status, headers=response.raw_headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
