"""OpenAI's routes: models, chat, completions, embeddings."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster.errors import UsageError
from loadmaster.interfaces.http.bodies import read_json
from loadmaster.interfaces.http.generating import respond, serving_of
from loadmaster.interfaces.http.openai_writers import ChatWriter, CompletionWriter
from loadmaster.interfaces.http.responses_writer import ResponsesWriter
from loadmaster.interfaces.http.streams import while_connected
from loadmaster.interfaces.http.writing import json_response
from loadmaster.tasks.api import openai_answers
from loadmaster.tasks.api.chat_requests import ChatPrompt, parse_tool_chat
from loadmaster.tasks.api.openai_fields import BadFieldError, Fields
from loadmaster.tasks.api.openai_requests import (
    CompletionRequest,
    EmbeddingRequest,
    parse_completion,
    parse_embedding,
)
from loadmaster.tasks.api.responses_requests import as_openai as responses_as_chat
from loadmaster.tasks.serving.embedding import embed, rank
from loadmaster.tasks.serving.facts import capabilities, model_facts
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.requests import (
    Tokenize,
    infill_tokens,
    prompt_tokens,
)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    asked = parse_tool_chat(await read_json(request))
    prompt = ChatPrompt(asked)
    return await respond(
        request, asked, prompt.tokenize, ChatWriter(asked.generation, prompt.reader)
    )


async def responses(request: Request) -> Response:
    """POST /v1/responses, without memory of earlier ones"""
    body = await read_json(request)
    asked = parse_tool_chat(responses_as_chat(body))
    prompt = ChatPrompt(asked)
    return await respond(request, asked, prompt.tokenize, ResponsesWriter(prompt.reader, body))


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    asked = parse_completion(await read_json(request))
    return await respond(
        request,
        asked,
        _completion_tokens(asked),
        CompletionWriter(asked.generation, _echoed(asked)),
    )


def _completion_tokens(asked: CompletionRequest) -> Tokenize:
    if asked.suffix is None:
        return prompt_tokens(asked.prompts)
    prompt = asked.prompts[0]
    if len(asked.prompts) > 1 or not isinstance(prompt, str):
        raise BadFieldError("suffix", "`suffix` goes with one prompt that is a text")
    return infill_tokens(prompt, asked.suffix)


def _echoed(asked: CompletionRequest) -> tuple[str, ...]:
    if not asked.echo:
        return ()
    texts = tuple(prompt for prompt in asked.prompts if isinstance(prompt, str))
    if len(texts) < len(asked.prompts):
        raise BadFieldError("echo", "`echo` goes with prompts that are texts")
    if asked.generation.top_logprobs is not None:
        raise BadFieldError("echo", "`echo` with `logprobs` is not supported")
    return texts


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings"""
    asked = parse_embedding(await read_json(request))
    _refuse_tokens(asked)
    texts = [text for text in asked.inputs if isinstance(text, str)]
    found = await while_connected(request, embed(serving_of(request), asked.model, texts))
    return json_response(
        openai_answers.embeddings(
            model=found.model,
            vectors=found.vectors,
            n_tokens=found.n_tokens,
            encoding_format=asked.encoding_format,
            dimensions=asked.dimensions,
        )
    )


def _refuse_tokens(asked: EmbeddingRequest) -> None:
    """LangChain sends the tokens of OpenAI's own tokenizer unless it is told not to."""
    if not all(isinstance(text, str) for text in asked.inputs):
        raise BadFieldError(
            "input",
            "`input` has token ids, which are of another tokenizer than this model's",
            hint="send text; with LangChain, `OpenAIEmbeddings(check_embedding_ctx_length=False)`",
        )


async def rerank(request: Request) -> Response:
    """POST /v1/rerank"""
    fields = Fields(await read_json(request))
    query = fields.text("query") or ""
    documents = [_document(fields, item) for item in fields.items("documents")]
    if not query or not documents:
        raise fields.bad("documents" if query else "query", "missing, or empty")
    top_n = fields.integer("top_n", 1, 1 << 20) or fields.integer("top_k", 1, 1 << 20)
    work = rank(serving_of(request), fields.text("model"), query, documents)
    found = await while_connected(request, work)
    results = [{"index": index, "relevance_score": score} for index, score in found.best(top_n)]
    # Clients of Jina and Cohere read `results`, those of OpenAI's form `data`.
    return json_response(
        {"object": "list", "model": found.model, "results": results, "data": results}
    )


def _document(fields: Fields, item: Any) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise fields.bad("documents", "an item is no text")
    return text


async def models(request: Request) -> Response:
    """GET /v1/models"""
    serving = serving_of(request)
    entries = [await model_entry(serving, offer.id) for offer in serving.offers]
    return json_response({"object": "list", "data": entries})


async def one_model(request: Request) -> Response:
    """GET /v1/models/{id}"""
    serving = serving_of(request)
    model = serving.find(request.path_params["id"])
    return json_response(await model_entry(serving, model.id))


async def model_entry(serving: Serving, model_id: str) -> dict[str, Any]:
    """A model as OpenAI lists it, with what editors look for beside that."""
    model = serving.models[model_id]
    facts = await model_facts(serving, model)
    return {
        "id": model.id,
        "object": "model",
        "created": int(serving.started_s),
        "owned_by": "loadmaster",
        "max_model_len": facts.n_ctx,
        "context_length": facts.n_ctx,
        "capabilities": capabilities(model, facts),
        "meta": {
            "n_ctx_train": facts.n_ctx_train,
            "n_vocab": facts.n_vocab,
            "n_embd": facts.n_embd,
            "size": facts.file_bytes,
            "architecture": facts.architecture,
            "quantization": facts.quantization,
        },
        "status": {"value": "loaded" if model.state == "ready" else model.state},
    }


async def load_model(request: Request) -> Response:
    """POST /models/load"""
    serving = serving_of(request)
    model = serving.find(_named(await read_json(request)))
    await serving.ensure(model)
    return json_response({"success": True, "model": model.id})


async def unload_model(request: Request) -> Response:
    """POST /models/unload"""
    serving = serving_of(request)
    model = serving.find(_named(await read_json(request)))
    stopped = await serving.unload(model)
    return json_response({"success": True, "model": model.id, "was_loaded": stopped})


def _named(body: dict[str, Any]) -> str:
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise UsageError("`model` is missing")
    return name


ROUTES = [
    Route("/v1/models", models, methods=["GET"]),
    Route("/models", models, methods=["GET"]),
    Route("/models/load", load_model, methods=["POST"]),
    Route("/models/unload", unload_model, methods=["POST"]),
    Route("/v1/models/{id:path}", one_model, methods=["GET"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/rerank", rerank, methods=["POST"]),
    Route("/v1/reranking", rerank, methods=["POST"]),
    Route("/rerank", rerank, methods=["POST"]),
]
