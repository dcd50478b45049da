"""Listening: the socket, uvicorn around the application, signals, and the end."""

import asyncio
import errno
import resource
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from loadmaster import settings
from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.interfaces.http.app import make_app
from loadmaster.interfaces.http.connection import Connection
from loadmaster.interfaces.http.guard import LOOPBACK_NAMES, Rules
from loadmaster.interfaces.http.owner import owner_of_port
from loadmaster.model.reference import is_loopback
from loadmaster.tasks.serving.host import Serving

_BACKLOG = 1024
_MOST_FILES = 16_384
# Linux: seconds of silence before the first question whether a client is there, and between two;
# milliseconds for which what was sent may stay untaken.
_TCP_LIMITS = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_USER_TIMEOUT": 90_000}
_KEEP_ALIVE_S = 75  # of an idle connection; longer than clients' pools keep theirs for a next turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where to listen, and for whom."""

    host: str
    port: int
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    drain_s: float = 30.0

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK_NAMES or is_loopback(self.host)

    def rules(self) -> Rules:
        """What the guard lets pass.

        Raises:
            UsageError: anybody on the network could ask.
        """
        if not self.is_loopback and not self.keys:
            raise UsageError(
                f"`--host {self.host}` lets other machines ask, and there is no key",
                hint="`--api-key-file FILE` names a file with one; a new one is made if it is not "
                "there",
            )
        return Rules(
            keys=tuple(self.keys),
            loopback=self.is_loopback,
            hosts=frozenset({self.host.lower(), *(name.lower() for name in self.hosts)}),
            origins=frozenset(self.origins),
        )


def bind(listening: Listening) -> socket.socket:
    """The listening socket.

    Raises:
        UsageError: the port is taken, and by whom where that is to be seen; or the address is none.
    """
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _give_up_the_gone(listener)
    try:
        listener.bind((listening.host, listening.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(listening, error) from None
    return listener


def _give_up_the_gone(listener: socket.socket) -> None:
    """Connections inherit it: one whose client vanished, or takes nothing, is ended by the kernel.

    A response that was given up is not gone before that: its last bytes still wait to be taken.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_LIMITS.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _cannot_listen(listening: Listening, error: OSError) -> UsageError:
    place = f"{listening.host}:{listening.port}"
    if error.errno == errno.EADDRINUSE:
        owner = owner_of_port(listening.port)
        by = f" by {owner}" if owner else ""
        refused = UsageError(
            f"port {listening.port} is in use{by}",
            hint=f"`--port {listening.port + 1}` takes another",
        )
        refused.exit_code = 9
        return refused
    return UsageError(f"cannot listen on {place}: {error.strerror or error}")


class _Server(uvicorn.Server):
    """uvicorn, ended by signals in our way: the first drains, the second ends at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def run(
    listening: Listening,
    listener: socket.socket,
    make_serving: Callable[[], Serving],
    on_start: Callable[[Serving], Coroutine[None, None, None]],
) -> None:
    """Serve until a signal. Requests are taken while `on_start` runs; if it fails, all ends.

    Raises:
        LoadmasterError: `on_start` did.
    """
    failure: list[LoadmasterError] = []
    _allow_connections()

    @asynccontextmanager
    async def open_serving() -> AsyncIterator[Serving]:
        serving = make_serving()
        tasks = [
            asyncio.create_task(_starting(server, failure, on_start(serving))),
            asyncio.create_task(_draining(server, serving, listening.drain_s)),
        ]
        try:
            yield serving
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await serving.close()

    app = make_app(open_serving, listening.rules(), settings.state_folder())
    server = _Server(_config(app, listening))
    with listener:
        server.run(sockets=[listener])
    if failure:
        raise failure[0]


def _allow_connections() -> None:
    """Each client has a descriptor; shells give a program 1,024 of them and allow it far more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _starting(
    server: uvicorn.Server, failure: list[LoadmasterError], work: Coroutine[None, None, None]
) -> None:
    try:
        await work
    except LoadmasterError as error:
        failure.append(error)
        server.should_exit = True


async def _draining(server: uvicorn.Server, serving: Serving, drain_s: float) -> None:
    """Once the server is to end: no new requests, and an end for those that go on for too long."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    await serving.drain(drain_s)


def _config(app: object, listening: Listening) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,  # and nothing is logged: paths and errors can quote a prompt
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="on",
        loop="asyncio",
        http=Connection,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(listening.drain_s) + 2,
    )
