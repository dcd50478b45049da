"""What each route takes and answers, as JSON schemas: the tables behind the OpenAPI document.

Of an answer the document promises the fields that are always there; of a body it names the usual
ones. Other fields are ignored, unless they would change the answer: then they are refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 1}
FLAG: Schema = {"type": "boolean"}
LIST: Schema = {"type": "array"}
OBJECT: Schema = {"type": "object"}
TEXTS: Schema = {"type": "array", "items": TEXT}
TEXT_OR_TEXTS: Schema = {"anyOf": [TEXT, {**TEXTS, "minItems": 1}]}
TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}

# Statuses beside 200. The connection's and the guard's come before any route is looked at.
CONNECTION = (408, 503)
GUARD = (*CONNECTION, 401, 403, 413)
READS = (*GUARD, 500)
TAKES_JSON = (*GUARD, 400, 500)
NAMES_MODEL = (*TAKES_JSON, 404)
USES_MODEL = (*NAMES_MODEL, 429)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One method of a route."""

    statuses: tuple[int, ...]
    answer: Schema = field(default_factory=dict)  # of 200
    media: tuple[str, ...] = ("application/json",)
    body: Schema | None = None
    form: Schema | None = None  # of a multipart body
    query: Mapping[str, Schema] = field(default_factory=dict)


def _fields(**properties: Schema) -> Schema:
    """An object that always has these fields."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _body(required: Iterable[str], **properties: Schema) -> Schema:
    named: dict[str, Schema] = {"model": TEXT, **properties}
    return {"type": "object", "properties": named, "required": list(required)}


_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": TEXT, "content": {"anyOf": [TEXT, LIST]}},
        "required": ["role", "content"],
    },
}
_SAMPLING: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "typical_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repeat_penalty": {"type": "number", "minimum": 0.01, "maximum": 10},
    "logit_bias": OBJECT,
    "seed": WHOLE,
    "stop": TEXT_OR_TEXTS,
    "stream": FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": FLAG}},
    "n": {"type": "integer", "minimum": 1, "maximum": 8},
}
_MAX_TOKENS: dict[str, Schema] = {"max_tokens": COUNT}
_TOOLS: dict[str, Schema] = {
    "tools": {"type": "array", "items": OBJECT, "maxItems": 128},
    "tool_choice": {"anyOf": [TEXT, OBJECT]},
}
_FORMAT: Schema = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {"type": "object", "properties": {"name": TEXT, "schema": OBJECT}},
    },
    "required": ["type"],
}
_CHAT: dict[str, Schema] = {
    "messages": _MESSAGES,
    "max_completion_tokens": COUNT,
    "response_format": _FORMAT,
    "logprobs": FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    **_TOOLS,
    **_MAX_TOKENS,
    **_SAMPLING,
}
_EVENTS = ("application/json", "text/event-stream")
_LINES = ("application/json", "application/x-ndjson")
_VERSIONED = {"schema_version": COUNT}

# -- answers

_MODEL = _fields(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, meta=OBJECT)
_PAGE = _fields(object={"const": "list"}, data=LIST, has_more=FLAG)
_FILE = _fields(id=TEXT, object={"const": "file"}, bytes=WHOLE, filename=TEXT, purpose=TEXT)
_BATCH = _fields(id=TEXT, object={"const": "batch"}, endpoint=TEXT, status=TEXT)
_DELETED = _fields(id=TEXT, object={"const": "file"}, deleted=FLAG)
_CHOICES = {"id": TEXT, "created": WHOLE, "model": TEXT, "choices": LIST, "usage": OBJECT}
_CHAT_ANSWER = _fields(object={"const": "chat.completion"}, **_CHOICES)
_COMPLETION_ANSWER = _fields(object={"const": "text_completion"}, **_CHOICES)
_EDITOR_ANSWER: Schema = {
    "anyOf": [_fields(content=TEXT, stop=FLAG, model=TEXT, tokens_predicted=WHOLE), LIST]
}
_RESPONSE = _fields(
    id=TEXT, object={"const": "response"}, status=TEXT, model=TEXT, output=LIST, usage=OBJECT
)
_MESSAGE = _fields(
    id=TEXT, type={"const": "message"}, role={"const": "assistant"}, content=LIST, usage=OBJECT
)
_VECTORS = _fields(object={"const": "list"}, data=LIST, model=TEXT, usage=OBJECT)
_RANKS = _fields(object={"const": "list"}, model=TEXT, results=LIST, data=LIST)
_LOADED = _fields(success=FLAG, model=TEXT)
_OLLAMA_CHAT = _fields(model=TEXT, created_at=TEXT, message=OBJECT, done=FLAG)
_OLLAMA_TEXT = _fields(model=TEXT, created_at=TEXT, response=TEXT, done=FLAG)
_OLLAMA_MODELS = _fields(models=LIST)


def _reads(answer: Schema, *statuses: int, **changes: Any) -> Shape:
    return Shape(statuses=(*READS, *statuses), answer=answer, **changes)


def _asks(body: Schema, answer: Schema, media: tuple[str, ...] = ("application/json",)) -> Shape:
    return Shape(statuses=USES_MODEL, body=body, answer=answer, media=media)


_RERANK = _asks(_body(["query", "documents"], query=TEXT, documents=TEXTS, top_n=COUNT), _RANKS)
_COMPLETION = _asks(
    _body(
        ["prompt"], prompt=TEXT_OR_TEXTS, n_predict=WHOLE, grammar=TEXT, json_schema=OBJECT,
        **_SAMPLING,
    ),
    _EDITOR_ANSWER,
    _EVENTS,
)  # fmt: skip
_FIM = _asks(
    _body(["prompt"], prompt=TEXT, suffix=TEXT, **_MAX_TOKENS, **_SAMPLING), _CHAT_ANSWER, _EVENTS
)
_MODELS = _reads(_fields(object={"const": "list"}, data=LIST))
_NOT_HERE = Shape(statuses=(*GUARD, 404), body=OBJECT)
_FETCHED = ("application/octet-stream",)

SHAPES: Mapping[tuple[str, str], Shape] = {
    ("GET", "/"): _reads({}, media=("text/plain", "text/html")),
    ("GET", "/health"): Shape(
        statuses=(*CONNECTION, 403, 413), answer=_fields(status={"const": "ok"})),
    ("GET", "/openapi.json"): _reads(_fields(openapi=TEXT, info=OBJECT, paths=OBJECT)),
    ("GET", "/metrics"): _reads({}, media=("text/plain",)),
    ("GET", "/props"): _reads(
        _fields(total_slots=COUNT, model_path=TEXT, chat_template=TEXT),
        400, 404, query={"model": TEXT},
    ),
    # -- OpenAI's
    ("GET", "/v1/models"): _MODELS,
    ("GET", "/models"): _MODELS,
    ("GET", "/v1/models/{id}"): _reads(_MODEL, 404),
    ("POST", "/models/load"): _asks(_body(["model"]), _LOADED),
    ("POST", "/models/unload"): _asks(_body(["model"]), _LOADED),
    ("POST", "/v1/chat/completions"): _asks(_body(["messages"], **_CHAT), _CHAT_ANSWER, _EVENTS),
    ("POST", "/v1/completions"): _asks(
        _body(
            ["prompt"],
            prompt={"anyOf": [*TEXT_OR_TEXTS["anyOf"], {**TOKENS, "minItems": 1}]},
            suffix=TEXT, echo=FLAG, logprobs={"type": "integer", "minimum": 0, "maximum": 20},
            **_MAX_TOKENS, **_SAMPLING,
        ),
        _COMPLETION_ANSWER,
        _EVENTS,
    ),
    ("POST", "/v1/responses"): _asks(
        _body(
            ["input"], input={"anyOf": [TEXT, LIST]}, instructions=TEXT, max_output_tokens=COUNT,
            temperature=_SAMPLING["temperature"], top_p=_SAMPLING["top_p"], text=OBJECT,
            metadata=OBJECT, stream=FLAG, **_TOOLS,
        ),
        _RESPONSE,
        _EVENTS,
    ),
    ("POST", "/v1/embeddings"): _asks(
        _body(
            ["input"], input=TEXT_OR_TEXTS, encoding_format={"enum": ["float", "base64"]},
            dimensions=COUNT,
        ),
        _VECTORS,
    ),
    ("POST", "/v1/rerank"): _RERANK,
    ("POST", "/v1/reranking"): _RERANK,
    ("POST", "/rerank"): _RERANK,
    ("POST", "/v1/files"): Shape(
        statuses=(*TAKES_JSON, 404, 429, 507), answer=_FILE,
        form={
            "type": "object",
            "properties": {"purpose": {"enum": ["batch"]}, "file": {"type": "string"}},
            "required": ["purpose", "file"],
        },
    ),
    ("GET", "/v1/files"): _reads(
        _PAGE, 400, 404,
        query={"purpose": TEXT, "limit": COUNT, "after": TEXT, "order": {"enum": ["asc", "desc"]}},
    ),
    ("GET", "/v1/files/{file_id}"): _reads(_FILE, 404),
    ("DELETE", "/v1/files/{file_id}"): _reads(_DELETED, 400, 404, 429),
    ("GET", "/v1/files/{file_id}/content"): _reads({}, 404, media=_FETCHED),
    ("POST", "/v1/batches"): Shape(
        statuses=(*NAMES_MODEL, 429), answer=_BATCH,
        body=_body(
            ["input_file_id", "endpoint", "completion_window"], input_file_id=TEXT,
            endpoint={"enum": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]},
            completion_window=TEXT, metadata=OBJECT,
        ),
    ),
    ("GET", "/v1/batches"): _reads(_PAGE, 400, 404, query={"limit": COUNT, "after": TEXT}),
    ("GET", "/v1/batches/{batch_id}"): _reads(_BATCH, 404),
    ("POST", "/v1/batches/{batch_id}/cancel"): _reads(_BATCH, 400, 404),
    # -- Anthropic's
    ("POST", "/v1/messages"): _asks(
        _body(
            ["messages", "max_tokens"], messages=_MESSAGES, max_tokens=COUNT, stream=FLAG,
            system={"anyOf": [TEXT, LIST]}, stop_sequences=TEXTS, tools=_TOOLS["tools"],
            tool_choice=OBJECT, temperature=_SAMPLING["temperature"], top_p=_SAMPLING["top_p"],
            top_k=_SAMPLING["top_k"],
        ),
        _MESSAGE,
        _EVENTS,
    ),
    ("POST", "/v1/messages/count_tokens"): _asks(
        _body(["messages"], messages=_MESSAGES, system={"anyOf": [TEXT, LIST]}),
        _fields(input_tokens=WHOLE),
    ),
    # -- editors'
    ("POST", "/completion"): _COMPLETION,
    ("POST", "/completions"): _COMPLETION,
    ("POST", "/infill"): _asks(
        _body(
            [], input_prefix=TEXT, input_suffix=TEXT, prompt=TEXT, n_predict=WHOLE,
            input_extra={"type": "array", "items": OBJECT}, **_SAMPLING,
        ),
        _EDITOR_ANSWER,
        _EVENTS,
    ),
    ("POST", "/v1/fim/completions"): _FIM,
    ("POST", "/fim/completions"): _FIM,
    ("POST", "/tokenize"): _asks(
        _body(["content"], content=TEXT, add_special=FLAG, parse_special=FLAG),
        _fields(tokens=LIST),
    ),
    ("POST", "/detokenize"): _asks(_body(["tokens"], tokens=TOKENS), _fields(content=TEXT)),
    ("POST", "/apply-template"): _asks(
        _body(["messages"], messages=_MESSAGES, **_TOOLS), _fields(prompt=TEXT)
    ),
    # -- Ollama's
    ("GET", "/api/version"): _reads(_fields(version=TEXT)),
    ("GET", "/api/tags"): _reads(_OLLAMA_MODELS),
    ("GET", "/api/ps"): _reads(_OLLAMA_MODELS),
    ("POST", "/api/show"): _asks(
        _body(["model"], name=TEXT), _fields(details=OBJECT, model_info=OBJECT, capabilities=LIST)
    ),
    ("POST", "/api/chat"): _asks(
        _body(
            [], messages=_MESSAGES, stream=FLAG, options=OBJECT, format={"anyOf": [TEXT, OBJECT]},
            keep_alive={"anyOf": [TEXT, NUMBER]}, tools=_TOOLS["tools"],
        ),
        _OLLAMA_CHAT,
        _LINES,
    ),
    ("POST", "/api/generate"): _asks(
        _body(
            [], prompt=TEXT, suffix=TEXT, system=TEXT, raw=FLAG, stream=FLAG, options=OBJECT,
            format={"anyOf": [TEXT, OBJECT]}, keep_alive={"anyOf": [TEXT, NUMBER]},
        ),
        _OLLAMA_TEXT,
        _LINES,
    ),
    ("POST", "/api/embed"): _asks(
        _body(["input"], input=TEXT_OR_TEXTS), _fields(model=TEXT, embeddings=LIST)
    ),
    ("POST", "/api/embeddings"): _asks(_body(["prompt"], prompt=TEXT), _fields(embedding=LIST)),
    ("POST", "/api/pull"): _NOT_HERE,
    ("POST", "/api/push"): _NOT_HERE,
    ("POST", "/api/create"): _NOT_HERE,
    ("POST", "/api/copy"): _NOT_HERE,
    ("DELETE", "/api/delete"): _NOT_HERE,
    # -- ours
    ("GET", "/loadmaster/v1/memory"): _reads(_fields(models=LIST, **_VERSIONED)),
    ("GET", "/loadmaster/v1/models"): _reads(_fields(models=LIST, **_VERSIONED)),
    ("GET", "/loadmaster/v1/plan"): _reads(_fields(plans=OBJECT, **_VERSIONED)),
    ("POST", "/loadmaster/v1/plan"): _asks(
        _body(["model"]), _fields(fits=FLAG, model=OBJECT, **_VERSIONED)
    ),
    ("GET", "/loadmaster/v1/doctor"): _reads(
        _fields(machine=OBJECT, engines=LIST, advice=LIST, **_VERSIONED)
    ),
    ("GET", "/loadmaster/v1/events"): _reads(
        {}, 400, media=("text/event-stream",), query={"since": TEXT}
    ),
}  # fmt: skip
