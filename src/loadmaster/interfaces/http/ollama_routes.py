"""Ollama's routes for reading, chat, completion and embeddings."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster import __version__
from loadmaster.interfaces.http.bodies import read_json
from loadmaster.interfaces.http.generating import respond, serving_of
from loadmaster.interfaces.http.ollama_writer import OllamaWriter, stamp
from loadmaster.interfaces.http.streams import while_connected
from loadmaster.interfaces.http.writing import json_response
from loadmaster.tasks.api.chat_requests import ChatPrompt, parse_tool_chat
from loadmaster.tasks.api.ollama_requests import as_openai, keep_alive_s
from loadmaster.tasks.api.openai_fields import Fields
from loadmaster.tasks.api.openai_requests import parse_completion, parse_embedding
from loadmaster.tasks.serving.embedding import Vectors, embed
from loadmaster.tasks.serving.facts import ModelFacts, capabilities, model_facts
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.requests import (
    Tokenize,
    chat_tokens,
    infill_tokens,
    prompt_tokens,
)


async def version(request: Request) -> Response:
    """GET /api/version"""
    return json_response({"version": __version__})


async def tags(request: Request) -> Response:
    """GET /api/tags"""
    serving = serving_of(request)
    models = [await _tag(serving, offer.id) for offer in serving.offers]
    return json_response({"models": models})


async def _tag(serving: Serving, model_id: str) -> dict[str, Any]:
    facts = await model_facts(serving, serving.models[model_id])
    return {
        "name": model_id,
        "model": model_id,
        "modified_at": stamp(facts.mtime_s),
        "size": facts.file_bytes,
        "digest": facts.digest,
        "details": _details(facts),
    }


def _details(facts: ModelFacts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": facts.file_format,
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": "",
        "quantization_level": facts.quantization,
    }


async def ps(request: Request) -> Response:
    """GET /api/ps"""
    serving = serving_of(request)
    models = [await _open(serving, m) for m in serving.models.values() if m.opened is not None]
    return json_response({"models": models})


async def _open(serving: Serving, model: ServedModel) -> dict[str, Any]:
    row = model.row()
    left = timedelta(days=36500) if row.expires_s is None else timedelta(seconds=row.expires_s)
    on_gpus = sum(size for device, size in row.planned_bytes.items() if device != "cpu")
    return {
        **await _tag(serving, model.id),
        "size": sum(row.planned_bytes.values()),
        "size_vram": on_gpus,
        "expires_at": (datetime.now(UTC) + left).isoformat(),
        "context_length": row.n_ctx,
    }


async def show(request: Request) -> Response:
    """POST /api/show"""
    fields = Fields(await read_json(request))
    serving = serving_of(request)
    model = serving.find(fields.text("model") or fields.text("name"))
    facts = await model_facts(serving, model)
    kinds = capabilities(model, facts)
    architecture = facts.architecture
    return json_response(
        {
            "modelfile": f"FROM {model.id}",
            "parameters": f"num_ctx {facts.n_ctx}",
            # Editors look for `.Suffix` to learn whether a model fills in the middle.
            "template": "{{ .Prompt }}{{ .Suffix }}" if "insert" in kinds else "{{ .Prompt }}",
            "details": _details(facts),
            "model_info": {
                "general.architecture": architecture,
                "general.name": facts.name,
                f"{architecture}.context_length": facts.n_ctx_train,
                f"{architecture}.embedding_length": facts.n_embd,
                f"{architecture}.block_count": facts.n_layer,
            },
            "capabilities": kinds,
            "modified_at": stamp(facts.mtime_s),
        }
    )


async def chat(request: Request) -> Response:
    """POST /api/chat"""
    body = await read_json(request)
    if not body.get("messages"):
        return await _only_load(request, body, "message", {"role": "assistant", "content": ""})
    asked = parse_tool_chat(as_openai(body))
    _note_keep_alive(request, body)
    prompt = ChatPrompt(asked)
    return await respond(request, asked, prompt.tokenize, OllamaWriter(prompt.reader))


async def generate(request: Request) -> Response:
    """POST /api/generate"""
    body = await read_json(request)
    if not body.get("prompt"):
        return await _only_load(request, body, "response", "")
    asked = parse_completion(as_openai(body))
    _note_keep_alive(request, body)
    return await respond(request, asked, _generate_tokens(Fields(body)), OllamaWriter())


def _generate_tokens(fields: Fields) -> Tokenize:
    """A prompt is a message, unless it is raw or has a text that follows it."""
    prompt, suffix, system = (fields.text(name) or "" for name in ("prompt", "suffix", "system"))
    if suffix:
        return infill_tokens(prompt, suffix)
    if fields.flag("raw"):
        return prompt_tokens([prompt])
    messages = [{"role": "system", "content": system}] if system else []
    return chat_tokens([*messages, {"role": "user", "content": prompt}])


async def _only_load(request: Request, body: dict[str, Any], name: str, empty: object) -> Response:
    """An empty prompt loads a model, and with `keep_alive` 0 unloads it."""
    serving = serving_of(request)
    model = serving.find(Fields(body).text("model"))
    stays_s = keep_alive_s(Fields(body))
    if stays_s == 0:
        await serving.unload(model)
    else:
        await while_connected(request, serving.ensure(model))
        _note_keep_alive(request, body)
    reason = "unload" if stays_s == 0 else "load"
    return json_response(
        {
            "model": model.id,
            "created_at": stamp(time.time()),
            name: empty,
            "done": True,
            "done_reason": reason,
        }
    )


def _note_keep_alive(request: Request, body: dict[str, Any]) -> None:
    """How long the model is to stay after this; it counts until a request says otherwise."""
    seconds = keep_alive_s(Fields(body))
    if seconds is not None:
        serving_of(request).find(Fields(body).text("model")).keep_alive_s = seconds


async def embed_texts(request: Request) -> Response:
    """POST /api/embed"""
    started = time.monotonic()
    body = await read_json(request)
    found = await _vectors(request, body, "input")
    return json_response(
        {
            "model": found.model,
            "embeddings": found.vectors,
            "total_duration": int((time.monotonic() - started) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": found.n_tokens,
        }
    )


async def embed_prompt(request: Request) -> Response:
    """POST /api/embeddings, the older form"""
    found = await _vectors(request, await read_json(request), "prompt")
    return json_response({"embedding": found.vectors[0]})


async def _vectors(request: Request, body: dict[str, Any], name: str) -> Vectors:
    asked = parse_embedding({"model": body.get("model"), "input": body.get(name)})
    texts = [text for text in asked.inputs if isinstance(text, str)]
    if len(texts) < len(asked.inputs):
        raise Fields(body).bad(name, "token ids are of no use here: send text")
    return await while_connected(request, embed(serving_of(request), asked.model, texts))


async def not_here(request: Request) -> Response:
    """Routes that would fetch, make or remove models."""
    await asyncio.sleep(0)
    text = f"{request.url.path} is not served: `loadmaster pull` fetches models"
    return json_response({"error": text}, 404)


ROUTES = [
    Route("/api/version", version, methods=["GET"]),
    Route("/api/tags", tags, methods=["GET"]),
    Route("/api/ps", ps, methods=["GET"]),
    Route("/api/show", show, methods=["POST"]),
    Route("/api/chat", chat, methods=["POST"]),
    Route("/api/generate", generate, methods=["POST"]),
    Route("/api/embed", embed_texts, methods=["POST"]),
    Route("/api/embeddings", embed_prompt, methods=["POST"]),
    Route("/api/pull", not_here, methods=["POST"]),
    Route("/api/push", not_here, methods=["POST"]),
    Route("/api/create", not_here, methods=["POST"]),
    Route("/api/copy", not_here, methods=["POST"]),
    Route("/api/delete", not_here, methods=["DELETE"]),
]
