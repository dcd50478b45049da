"""OpenAI's routes for files: uploads for batches, and the files that batches make."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import closing
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster.errors import NotFoundError
from loadmaster.interfaces.http.generating import scope_of
from loadmaster.interfaces.http.multipart import Form, boundary_of, read_form
from loadmaster.interfaces.http.streams import PieceStream
from loadmaster.interfaces.http.writing import json_response
from loadmaster.jobs.file_shelf import KeptFile, check_room
from loadmaster.tasks.api.batch_objects import deleted_object, file_object, page_object
from loadmaster.tasks.api.openai_fields import BadFieldError
from loadmaster.tasks.serving.desk import Desk

MOST_FILES_LISTED = 10_000
_FILENAME_CHARS = 255
_PIECE_BYTES = 256 << 10
_MOST_DIGITS = 18  # of a length
_EXPIRES_LOW_S, _EXPIRES_HIGH_S = 3600, 30 * 86_400


def desk_of(request: Request) -> Desk:
    """Where files and batches are kept.

    Raises:
        NotFoundError: this server keeps none.
    """
    desk: Desk | None = getattr(request.app.state, "desk", None)
    if desk is None:
        raise NotFoundError("this server keeps no files and no batches")
    return desk


async def upload(request: Request) -> Response:
    """POST /v1/files, as multipart/form-data with `purpose` and `file`"""
    desk = desk_of(request)
    boundary_of(request)
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and len(stated) <= _MOST_DIGITS:
        check_room(desk.files.folder, int(stated))
    with desk.uploading():
        incoming = await asyncio.to_thread(desk.files.incoming, "batch", scope_of(request))
        try:
            form = await read_form(request, incoming.write)
            filename, lasts_s = _checked(form)
            expires_s = None if lasts_s is None else time.time() + lasts_s
            card = await asyncio.to_thread(incoming.finish, filename, expires_s)
        finally:
            await asyncio.shield(asyncio.to_thread(incoming.close))
    return json_response(file_object(card))


def _checked(form: Form) -> tuple[str, int | None]:
    """The file's name, and for how long it is kept.

    Raises:
        BadFieldError: a field is missing or cannot be.
    """
    purpose = form.fields.get("purpose")
    if purpose != "batch":
        shown = "missing" if purpose is None else f"`{purpose[:40]}` is not `batch`"
        raise BadFieldError("purpose", f"`purpose`: {shown}")
    if form.filename is None:
        raise BadFieldError("file", "`file`: missing")
    return form.filename[-_FILENAME_CHARS:], _lasts_s(form)


def _lasts_s(form: Form) -> int | None:
    """Seconds, from `expires_after`."""
    seconds = form.fields.get("expires_after[seconds]")
    if seconds is None:
        return None
    if form.fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise BadFieldError("expires_after[anchor]", "`expires_after[anchor]` is not `created_at`")
    return _number("expires_after[seconds]", seconds, _EXPIRES_LOW_S, _EXPIRES_HIGH_S)


def _number(name: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or len(text) > _MOST_DIGITS or not low <= int(text) <= high:
        raise BadFieldError(name, f"`{name}` is not a number between {low} and {high}")
    return int(text)


async def files(request: Request) -> Response:
    """GET /v1/files, with `purpose`, `limit`, `after` and `order`"""
    desk, query = desk_of(request), request.query_params
    found = await asyncio.to_thread(desk.files.all, scope_of(request))
    if purpose := query.get("purpose"):
        found = [card for card in found if card.purpose == purpose]
    if query.get("order", "desc") == "asc":
        found.reverse()
    rest = _after(found, query.get("after"))
    limit = limit_of(request, MOST_FILES_LISTED, MOST_FILES_LISTED)
    page = [file_object(card) for card in rest[:limit]]
    return json_response(page_object(page, has_more=len(rest) > limit))


def _after(found: list[KeptFile], file_id: str | None) -> list[KeptFile]:
    ids = [card.file_id for card in found]
    if file_id is None:
        return found
    if file_id not in ids:
        raise NotFoundError(f"there is no file `{file_id[:80]}`")
    return found[ids.index(file_id) + 1 :]


def limit_of(request: Request, usual: int, most: int) -> int:
    """How many entries a page is to have.

    Raises:
        BadFieldError: it is no number, or out of range.
    """
    text = request.query_params.get("limit")
    return usual if text is None else _number("limit", text, 1, most)


async def one_file(request: Request) -> Response:
    """GET /v1/files/{file_id}"""
    file_id = request.path_params["file_id"]
    card = await asyncio.to_thread(desk_of(request).files.find, file_id, scope_of(request))
    return json_response(file_object(card))


async def content(request: Request) -> Response:
    """GET /v1/files/{file_id}/content"""
    file_id = request.path_params["file_id"]
    file = await asyncio.to_thread(desk_of(request).files.open, file_id, scope_of(request))
    return PieceStream(
        _pieces(file), media_type="application/octet-stream", ping=None, on_end=file.close
    )


async def _pieces(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    with closing(file):
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece


async def delete(request: Request) -> Response:
    """DELETE /v1/files/{file_id}"""
    file_id = request.path_params["file_id"]
    await asyncio.to_thread(desk_of(request).files.delete, file_id, scope_of(request))
    return json_response(deleted_object(file_id))


ROUTES = [
    Route("/v1/files", upload, methods=["POST"]),
    Route("/v1/files", files, methods=["GET"]),
    Route("/v1/files/{file_id}", one_file, methods=["GET"]),
    Route("/v1/files/{file_id}", delete, methods=["DELETE"]),
    Route("/v1/files/{file_id}/content", content, methods=["GET"]),
]
