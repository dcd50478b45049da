"""The way of every answer: hold the model, make the prompt, submit, write what comes.

What can be refused at once is refused with a status; a stream whose model has to be loaded first
begins with pings, and an error after that is an event of the stream.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from loadmaster.engine.types import DoneEvent
from loadmaster.interfaces.http.errors import as_ours
from loadmaster.interfaces.http.guard import SCOPE_KEY
from loadmaster.interfaces.http.streams import PieceStream, while_connected
from loadmaster.interfaces.http.writing import Start, Writer, dumps
from loadmaster.tasks.api.chat_requests import ToolChat
from loadmaster.tasks.api.openai_answers import Gathering
from loadmaster.tasks.api.openai_requests import CompletionRequest
from loadmaster.tasks.serving.answer import Answer
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.requests import (
    Job,
    Tokenize,
    check_choices,
    check_writes,
    engine_requests,
)

# How long a stream may be without headers, so that a refusal can have a status of its own.
GRACE_S = 0.25
GRACE_TO_PLAN_S = 3.0  # of a model that is not open: its plan may be refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """An answer on its way, and what is held for it."""

    start: Start
    answer: Answer
    held: AsyncExitStack


def serving_of(request: Request) -> Serving:
    """The server's models."""
    serving: Serving = request.app.state.serving
    return serving


def scope_of(request: Request) -> str:
    """The scope in which this client's prompts may share cells."""
    scope: str = request.scope.get(SCOPE_KEY, "")
    return scope


async def begin(serving: Serving, job: Job) -> Begun:
    """Load the model if need be, make the prompts, submit.

    Raises:
        LoadmasterError: it is refused; nothing was generated.
    """
    check_choices(job.generation.n)
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(serving.use(job.model))
        check_writes(model.id, await serving.live(model))
        if job.generation.json_schema is not None:
            await serving.check_schema(job.generation.json_schema)
        prompts = await serving.call(model, job.tokenize)
        opened = await serving.live(model)
        requests = engine_requests(opened, prompts, job, model.new_request_id)
        start = Start(
            model=model.id, n_parts=len(requests), n_prompt=sum(len(tokens) for tokens in prompts)
        )
        answer = serving.submit(model, requests)
        if job.generation.json_schema is not None:
            await answer.first()  # a schema that cannot be used is a refusal, not an event
        return Begun(start=start, answer=answer, held=stack.pop_all())


async def respond(
    request: Request, asked: ToolChat | CompletionRequest, tokenize: Tokenize, writer: Writer
) -> Response:
    """The response to a request for text, whole or streamed."""
    serving = serving_of(request)
    job = Job(
        model=asked.model,
        tokenize=tokenize,
        generation=asked.generation,
        prefix_scope=scope_of(request),
    )
    if not job.generation.stream:
        body = await while_connected(request, _whole(serving, job, writer))
        return Response(dumps(body), media_type="application/json")
    serving.find(job.model)  # an unknown name needs no wait
    beginning = asyncio.create_task(begin(serving, job))
    ready = serving.find(job.model).state == "ready"
    # A schema is tried out first, which takes a moment, and may be refused.
    grace_s = GRACE_S if ready and job.generation.json_schema is None else GRACE_TO_PLAN_S
    try:
        await asyncio.wait({beginning}, timeout=grace_s)
    except asyncio.CancelledError:
        _abandon(beginning)
        raise
    if beginning.done() and beginning.exception() is not None:
        beginning.result()
    return PieceStream(
        _pieces(beginning, writer),
        media_type=writer.media_type,
        ping=writer.ping,
        ping_first=not ready,
        on_end=partial(_abandon, beginning),
    )


async def _whole(serving: Serving, job: Job, writer: Writer) -> object:
    begun = await begin(serving, job)
    logprobs = job.generation.top_logprobs is not None
    parts = [Gathering(index, logprobs=logprobs) for index in range(begun.start.n_parts)]
    async with begun.held, aclosing(begun.answer.events()) as events:
        async for item in events:
            parts[item.part].take(item.event)
        dones = [part.done for part in parts if part.done is not None]
        return writer.whole(begun.start.model, parts, dones)


async def _pieces(beginning: "asyncio.Task[Begun]", writer: Writer) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream; the last ones tell of an error, if there was one."""
    dones: dict[int, DoneEvent] = {}
    try:
        begun = await asyncio.shield(beginning)
        async with begun.held, aclosing(begun.answer.events()) as events:
            yield writer.begin(begun.start)
            async for item in events:
                if isinstance(item.event, DoneEvent):
                    dones[item.part] = item.event
                yield writer.part(item)
            yield writer.end([dones[part] for part in sorted(dones)])
    except Exception as error:
        yield writer.failed(as_ours(error))


def _abandon(beginning: "asyncio.Task[Begun]") -> None:
    """Nobody reads any more: what has not ended by itself ends now. Harmless when it has."""
    beginning.cancel()
    beginning.add_done_callback(_let_go)  # at once, where it is done


def _let_go(beginning: "asyncio.Task[Begun]") -> None:
    if beginning.cancelled() or beginning.exception() is not None:
        return
    begun = beginning.result()
    begun.answer.cancel()
    asyncio.get_running_loop().create_task(begun.held.aclose())
