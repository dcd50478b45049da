"""Our own routes, and the small ones that every server has: health, props, metrics."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster import __version__
from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.interfaces.http import metrics
from loadmaster.interfaces.http.bodies import read_json
from loadmaster.interfaces.http.front_page import front_page
from loadmaster.interfaces.http.generating import serving_of
from loadmaster.interfaces.http.streams import PieceStream, sse
from loadmaster.interfaces.http.writing import dumps, json_response
from loadmaster.plan.codec import plan_to_json
from loadmaster.schema import to_json
from loadmaster.tasks.doctor import diagnosis_json, examine
from loadmaster.tasks.measurement import MemoryRow, rows_to_json
from loadmaster.tasks.serving.desk import Desk
from loadmaster.tasks.serving.facts import model_facts
from loadmaster.tasks.serving.host import Serving

# The worker answers between two steps; a scrape waits no longer than this for a fresh figure.
MEMORY_WAIT_S = 1.0
SCHEMA_VERSION = 1
_ID_DIGITS = 18


async def health(request: Request) -> Response:
    """GET /health: the server answers; it says nothing of the models."""
    return json_response({"status": "ok"})


async def props(request: Request) -> Response:
    """GET /props, as llama-server has it, of the model in `?model=` or the only one."""
    serving = serving_of(request)
    model = serving.find(request.query_params.get("model"))
    facts = await model_facts(serving, model)
    return json_response(
        {
            "default_generation_settings": {"n_ctx": facts.n_ctx},
            "total_slots": model.n_parallel,
            "model_path": facts.path,
            "model_alias": model.id,
            "chat_template": facts.chat_template or "",
            "build_info": f"loadmaster {__version__}",
            "modalities": {"vision": False, "audio": False},
        }
    )


async def prometheus(request: Request) -> Response:
    """GET /metrics"""
    serving = serving_of(request)
    desk: Desk | None = getattr(request.app.state, "desk", None)
    statuses = await desk.statuses() if desk else {}
    items = desk.items if desk else {}
    text = metrics.render(serving, await _memory(serving), statuses=statuses, items=items)
    return Response(text, media_type=metrics.MEDIA_TYPE)


async def _memory(serving: Serving) -> dict[str, Sequence[MemoryRow]]:
    """The ledger of each open model, planned beside measured; the last one where it is busy."""
    found: dict[str, Sequence[MemoryRow]] = {}
    for model in serving.models.values():
        if model.state == "ready":
            with suppress(LoadmasterError, TimeoutError):
                await asyncio.wait_for(asyncio.shield(model.measure()), MEMORY_WAIT_S)
            found[model.id] = model.last_memory
    return found


async def memory(request: Request) -> Response:
    """GET /loadmaster/v1/memory"""
    found = await _memory(serving_of(request))
    models = [{"model": name, "memory": rows_to_json(tuple(rows))} for name, rows in found.items()]
    return json_response({"schema_version": SCHEMA_VERSION, "models": models})


async def plan(request: Request) -> Response:
    """GET /loadmaster/v1/plan: of open models; POST with a `model`: the plan it would get now."""
    serving = serving_of(request)
    if request.method == "GET":
        plans = {
            model.id: plan_to_json(model.opened.session.plan)
            for model in serving.models.values()
            if model.opened is not None
        }
        return json_response({"schema_version": SCHEMA_VERSION, "plans": plans})
    name = (await read_json(request)).get("model")
    if not isinstance(name, str):
        raise UsageError("`model` is missing")
    prepared = await serving.would_get(serving.find(name))
    return json_response(plan_to_json(prepared.plan))


async def models(request: Request) -> Response:
    """GET /loadmaster/v1/models: what `ps` shows."""
    serving = serving_of(request)
    rows = [to_json(row) for row in serving.rows()]
    return json_response({"schema_version": SCHEMA_VERSION, "models": rows})


async def doctor(request: Request) -> Response:
    """GET /loadmaster/v1/doctor"""
    diagnosis = await asyncio.to_thread(examine)
    return json_response(diagnosis_json(diagnosis))


async def events(request: Request) -> Response:
    """GET /loadmaster/v1/events: what happened to models, and then what happens."""
    last = request.headers.get("last-event-id") or request.query_params.get("since") or "0"
    if not (last.isdecimal() and len(last) <= _ID_DIGITS):
        raise UsageError("`since` is not the number of an event")
    return PieceStream(_events(serving_of(request), int(last)))


async def _events(serving: Serving, last_id: int) -> AsyncGenerator[bytes]:
    async with aclosing(serving.events.follow(last_id)) as following:
        async for event in following:
            yield f"id: {event.id}\n".encode() + sse(dumps(to_json(event)), event.kind)


async def root(request: Request) -> Response:
    """GET /: a word for whoever opens the address in a browser."""
    models = serving_of(request).models.values()
    return front_page(request, {model.id: model.state for model in models})


ROUTES = [
    Route("/", root, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/props", props, methods=["GET"]),
    Route("/metrics", prometheus, methods=["GET"]),
    Route("/loadmaster/v1/memory", memory, methods=["GET"]),
    Route("/loadmaster/v1/plan", plan, methods=["GET", "POST"]),
    Route("/loadmaster/v1/models", models, methods=["GET"]),
    Route("/loadmaster/v1/doctor", doctor, methods=["GET"]),
    Route("/loadmaster/v1/events", events, methods=["GET"]),
]
