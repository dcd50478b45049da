"""OpenAI's routes for batches: a file of requests, run when nobody else asks."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster.interfaces.http.bodies import read_json
from loadmaster.interfaces.http.file_routes import desk_of, limit_of
from loadmaster.interfaces.http.generating import scope_of
from loadmaster.interfaces.http.writing import json_response
from loadmaster.tasks.api.batch_objects import page_object, parse_batch

USUAL_LISTED, MOST_LISTED = 20, 100


async def create(request: Request) -> Response:
    """POST /v1/batches"""
    new = parse_batch(await read_json(request))
    return json_response(await desk_of(request).order(new, scope_of(request)))


async def batches(request: Request) -> Response:
    """GET /v1/batches, with `limit` and `after`"""
    limit = limit_of(request, USUAL_LISTED, MOST_LISTED)
    after = request.query_params.get("after")
    page, has_more = await desk_of(request).batches(scope_of(request), after, limit)
    return json_response(page_object(page, has_more=has_more))


async def one_batch(request: Request) -> Response:
    """GET /v1/batches/{batch_id}"""
    batch_id = request.path_params["batch_id"]
    return json_response(await desk_of(request).batch(batch_id, scope_of(request)))


async def cancel(request: Request) -> Response:
    """POST /v1/batches/{batch_id}/cancel"""
    batch_id = request.path_params["batch_id"]
    return json_response(await desk_of(request).cancel(batch_id, scope_of(request)))


ROUTES = [
    Route("/v1/batches", create, methods=["POST"]),
    Route("/v1/batches", batches, methods=["GET"]),
    Route("/v1/batches/{batch_id}", one_batch, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", cancel, methods=["POST"]),
]
