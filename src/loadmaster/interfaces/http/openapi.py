"""The OpenAPI document: every route that is answered, and the fields of the usual bodies."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.routing import BaseRoute, Route

from loadmaster import __version__

Schema = Mapping[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_FLAG: Schema = {"type": "boolean"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_TEXT_OR_TEXTS: Schema = {"oneOf": [_TEXT, _TEXTS]}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": _TEXT, "content": {}},
        "required": ["role"],
    },
}
_SAMPLING: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "seed": {"type": "integer"},
    "max_tokens": _COUNT,
    "stop": _TEXT_OR_TEXTS,
    "stream": _FLAG,
    "n": {"type": "integer", "minimum": 1, "maximum": 8},
}


def _body(required: Iterable[str], **properties: Schema) -> Schema:
    named: dict[str, Schema] = {"model": _TEXT, **properties}
    return {"type": "object", "properties": named, "required": list(required)}


_BODIES: dict[str, Schema] = {
    "/v1/chat/completions": _body(
        ["messages"],
        messages=_MESSAGES,
        tools={"type": "array", "items": {"type": "object"}},
        response_format={"type": "object"},
        logprobs=_FLAG,
        top_logprobs={"type": "integer", "minimum": 0, "maximum": 20},
        **_SAMPLING,
    ),
    "/v1/completions": _body(
        ["prompt"], prompt={"oneOf": [_TEXT, _TEXTS, _TOKENS]}, suffix=_TEXT, **_SAMPLING
    ),
    "/v1/embeddings": _body(
        ["input"], input=_TEXT_OR_TEXTS, encoding_format={"enum": ["float", "base64"]}
    ),
    "/v1/responses": _body(["input"], input={}, instructions=_TEXT, stream=_FLAG),
    "/v1/messages": _body(
        ["messages", "max_tokens"], messages=_MESSAGES, max_tokens=_COUNT, stream=_FLAG
    ),
    "/v1/rerank": _body(["query", "documents"], query=_TEXT, documents=_TEXTS, top_n=_COUNT),
    "/tokenize": _body(["content"], content=_TEXT, add_special=_FLAG, parse_special=_FLAG),
    "/detokenize": _body(["tokens"], tokens=_TOKENS),
    "/models/load": _body(["model"]),
    "/models/unload": _body(["model"]),
}


def document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The document of these routes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route):
            path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
            for method in sorted((route.methods or set()) - {"HEAD"}):
                paths.setdefault(path, {})[method.lower()] = _operation(route, path, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loadmaster", "version": __version__},
        "paths": dict(sorted(paths.items())),
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: Route, path: str, method: str) -> dict[str, Any]:
    summary = (route.endpoint.__doc__ or "").partition("\n")[0].strip()
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "the answer"}, "default": {"description": "an error"}},
    }
    names = re.findall(r"\{(\w+)\}", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names
        ]
    if method == "POST":
        schema = _BODIES.get(path, {"type": "object"})
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    return operation
