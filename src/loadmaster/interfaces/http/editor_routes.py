"""Routes that editors know from llama-server and Mistral: completion, infill, tokens, templates."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster.interfaces.http.bodies import read_json
from loadmaster.interfaces.http.editor_writer import EditorWriter
from loadmaster.interfaces.http.generating import respond, serving_of
from loadmaster.interfaces.http.openai_writers import FillWriter
from loadmaster.interfaces.http.writing import json_response
from loadmaster.tasks.api.answer_reading import AnswerReader
from loadmaster.tasks.api.chat_requests import parse_tool_chat
from loadmaster.tasks.api.openai_fields import Fields
from loadmaster.tasks.api.openai_requests import CompletionRequest, parse_completion
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.requests import (
    Tokenize,
    check_text,
    infill_tokens,
    prompt_tokens,
)

_EXTRA_PARTS = 64


async def completion(request: Request) -> Response:
    """POST /completion, llama-server's own"""
    body = await read_json(request)
    asked = parse_completion(as_openai(body))
    return await _answer(request, asked, prompt_tokens(asked.prompts))


async def infill(request: Request) -> Response:
    """POST /infill: what goes between `input_prefix` and `input_suffix`"""
    body = await read_json(request)
    fields = Fields(body)
    prefix = (fields.text("input_prefix") or "") + (fields.text("prompt") or "")
    asked = parse_completion(as_openai({**body, "prompt": prefix or " "}))
    tokenize = infill_tokens(prefix, fields.text("input_suffix") or "", _extra(fields))
    return await _answer(request, asked, tokenize)


def _extra(fields: Fields) -> str:
    """Pieces of other files, with their names as comments of no language in particular."""
    items = fields.items("input_extra")[:_EXTRA_PARTS]
    parts = [Fields(item, f"input_extra[{i}]") for i, item in enumerate(items)]
    return "".join(f"{p.text('filename') or ''}\n{p.text('text') or ''}\n\n" for p in parts)


async def _answer(request: Request, asked: CompletionRequest, tokenize: Tokenize) -> Response:
    return await respond(request, asked, tokenize, EditorWriter())


async def fim(request: Request) -> Response:
    """POST /v1/fim/completions, Mistral's: deltas as in chat"""
    body = await read_json(request)
    asked = parse_completion(body)
    prompt = asked.prompts[0]
    tokenize = (
        infill_tokens(prompt, asked.suffix or "")
        if isinstance(prompt, str)
        else prompt_tokens(asked.prompts)
    )
    return await respond(request, asked, tokenize, FillWriter(asked.generation, AnswerReader))


def as_openai(body: dict[str, Any]) -> dict[str, Any]:
    """llama-server's names as OpenAI's; a negative number there means `as much as there is`."""
    names = {"n_predict": "max_tokens", "n_probs": "logprobs"}
    given = {names.get(name, name): value for name, value in body.items()}
    for name in ("max_tokens", "seed"):
        if isinstance(given.get(name), int | float) and given[name] < 0:
            del given[name]
    if not given.get("logprobs"):
        given.pop("logprobs", None)
    if isinstance(given.get("json_schema"), dict):
        schema = given.pop("json_schema")
        given["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    if given.get("grammar"):
        raise Fields(body).bad(
            "grammar", "GBNF is not supported", hint="send a JSON schema as `json_schema`"
        )
    return given


# -- tokens and templates


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    fields = Fields(await read_json(request))
    text = fields.text("content") or ""
    special = fields.flag("add_special")
    parse = fields.get("parse_special") is not False
    serving = serving_of(request)

    def tokens_of(opened: Opened) -> list[int]:
        check_text(opened, text)
        return opened.session.engine.tokenize(text, special, parse)

    async with serving.use(fields.text("model")) as model:
        tokens = await serving.call(model, tokens_of)
    return json_response({"tokens": tokens})


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    fields = Fields(await read_json(request))
    tokens = fields.items("tokens")
    if not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise fields.bad("tokens", "not a list of token ids")
    serving = serving_of(request)
    async with serving.use(fields.text("model")) as model:
        text = await serving.call(model, lambda opened: opened.session.engine.detokenize(tokens))
    return json_response({"content": text})


async def apply_template(request: Request) -> Response:
    """POST /apply-template"""
    asked = parse_tool_chat(await read_json(request))
    serving = serving_of(request)
    async with serving.use(asked.model) as model:
        return json_response({"prompt": await serving.call(model, asked.render)})


ROUTES = [
    Route("/completion", completion, methods=["POST"]),
    Route("/completions", completion, methods=["POST"]),
    Route("/infill", infill, methods=["POST"]),
    Route("/v1/fim/completions", fim, methods=["POST"]),
    Route("/fim/completions", fim, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/apply-template", apply_template, methods=["POST"]),
]
