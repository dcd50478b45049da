"""The OpenAPI document: every route that is answered, with its statuses and fields."""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.routing import BaseRoute, Route

from loadmaster import __version__
from loadmaster.interfaces.http.guard import OPEN_PATHS
from loadmaster.interfaces.http.openapi_shapes import OBJECT, SHAPES, TEXT, Schema, Shape

_JSON, _FORM = ("application/json",), ("multipart/form-data",)
_ERRORS: Mapping[str, Schema] = {
    "error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]},
                    "code": TEXT, "numbers": OBJECT,
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
    "anthropic_error": {
        "type": "object",
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "properties": {"type": TEXT, "message": TEXT},
                "required": ["type", "message"],
            },
        },
        "required": ["type", "error"],
    },
    "ollama_error": {"type": "object", "properties": {"error": TEXT}, "required": ["error"]},
}  # fmt: skip


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
        "components": {
            "schemas": dict(_ERRORS),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, path: str, method: str) -> dict[str, Any]:
    shape = SHAPES[method, path]
    operation: dict[str, Any] = {
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0].strip(),
        "responses": _responses(path, shape),
    }
    parameters = [*_parameters(path), *_queries(shape)]
    if parameters:
        operation["parameters"] = parameters
    if shape.body is not None:
        operation["requestBody"] = _content(_JSON, shape.body)
    elif shape.form is not None:
        operation["requestBody"] = _content(_FORM, shape.form)
    if path not in OPEN_PATHS:
        operation["security"] = [{"key": []}, {}]  # a server on loopback may have no key
    return operation


def _responses(path: str, shape: Shape) -> dict[str, Any]:
    error = {"$ref": f"#/components/schemas/{_error_of(path)}"}
    answers = {
        str(status): {"description": HTTPStatus(status).phrase, **_content(_JSON, error)}
        for status in sorted(set(shape.statuses))
    }
    if 404 in shape.statuses and shape.answer == {} and shape.media == _JSON:
        return answers  # a route that only says that it is not served
    return {"200": {"description": "the answer", **_content(shape.media, shape.answer)}, **answers}


def _error_of(path: str) -> str:
    if path.startswith("/api/"):
        return "ollama_error"
    return "anthropic_error" if path.startswith("/v1/messages") else "error"


def _content(media: Iterable[str], schema: Schema) -> dict[str, Any]:
    """A stream's events have forms of their own: only JSON has the schema."""
    return {
        "content": {
            kind: {"schema": schema if kind in (*_JSON, *_FORM) else TEXT} for kind in media
        }
    }


def _parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": TEXT}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _queries(shape: Shape) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in shape.query.items()
    ]
