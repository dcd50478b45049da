"""The ASGI application: every route behind one guard, every error in its client's form."""

import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loadmaster.errors import LoadmasterError, NotFoundError, UsageError
from loadmaster.interfaces.http import (
    anthropic_routes,
    batch_routes,
    editor_routes,
    file_routes,
    native_routes,
    ollama_routes,
    openai_routes,
)
from loadmaster.interfaces.http.errors import as_ours, error_response
from loadmaster.interfaces.http.generating import serving_of
from loadmaster.interfaces.http.guard import Guard, Rules
from loadmaster.interfaces.http.openapi import document
from loadmaster.interfaces.http.streams import ClientGoneError
from loadmaster.interfaces.http.writing import json_response
from loadmaster.tasks.serving.desk import open_desk
from loadmaster.tasks.serving.host import Serving

OpenServing = Callable[[], AbstractAsyncContextManager[Serving]]
_CLIENT_CLOSED = 499  # nobody reads it; nginx's number for a client that is gone


def routes() -> list[BaseRoute]:
    """Everything that is answered."""
    return [
        *openai_routes.ROUTES,
        *file_routes.ROUTES,
        *batch_routes.ROUTES,
        *anthropic_routes.ROUTES,
        *editor_routes.ROUTES,
        *ollama_routes.ROUTES,
        *native_routes.ROUTES,
        Route("/openapi.json", _openapi, methods=["GET"]),
    ]


async def _openapi(request: Request) -> Response:
    """GET /openapi.json"""
    return json_response(document(routes()))


def make_app(open_serving: OpenServing, rules: Rules, folder: Path | None = None) -> Starlette:
    """The application; `open_serving` makes what it serves inside the event loop, and ends it.

    `folder` is where files and batches are kept; None: this server takes none.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.serving = await stack.enter_async_context(open_serving())
            if folder is not None:
                desk = open_desk(app.state.serving, folder)
                app.state.desk = await stack.enter_async_context(desk)
            yield

    return Starlette(
        routes=routes(),
        lifespan=lifespan,
        middleware=[Middleware(Guard, rules=rules)],
        exception_handlers={
            HTTPException: _http_error,
            LoadmasterError: _our_error,
            ClientGoneError: _gone,
            ClientDisconnect: _gone,  # while it still sent its body
            Exception: _defect,
        },
    )


async def _our_error(request: Request, error: Exception) -> Response:
    return error_response(as_ours(error), path=request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: a path or a method that is not there."""
    refused: LoadmasterError = NotFoundError(f"there is no route `{request.url.path[:200]}`")
    if isinstance(error, HTTPException) and error.status_code == 405:
        refused = UsageError(f"`{request.url.path}` does not take {request.method}")
        refused.http_status = 405
    return error_response(refused, path=request.url.path)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


async def _defect(request: Request, error: Exception) -> Response:
    """A defect of ours is logged by type and place: its text may quote a prompt."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
    serving_of(request).events.add("note", "", f"defect: {type(error).__name__} at {place}")
    return error_response(as_ours(error), path=request.url.path)
