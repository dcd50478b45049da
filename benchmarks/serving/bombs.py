"""JSON schemas and chat templates that are small when they are sent, and grow in use."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]
MESSAGES = [{"role": "user", "content": "go on"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bomb:
    """A request to the model that it is for."""

    name: str
    body: Mapping[str, Any] = field(default_factory=dict)  # beside the usual fields of a chat
    template: str | None = None  # of a model of its own
    path: str = "/v1/chat/completions"


def all_bombs() -> list[Bomb]:
    """Every bomb: schemas as formats, schemas of tools, templates, and what goes into templates."""
    formats = [Bomb(name=f"schema: {name}", body=_format(s)) for name, s in schemas().items()]
    tools = [
        Bomb(name=f"tool: {name}", body=_tool(s), template=TAKES_TOOLS) for name, s in _tools()
    ]
    models = [Bomb(name=f"template: {name}", template=text) for name, text in templates().items()]
    return [*formats, *tools, *models, *_inputs()]


def _format(schema: Schema) -> Schema:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


def _tool(schema: Schema) -> Schema:
    function = {"name": "f", "parameters": schema}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def _tools() -> list[tuple[str, Schema]]:
    known = schemas()
    names = (
        "any of any, wide", "all of any, 10 times", "ref to itself", "10^9 items", "500 properties",
    )  # fmt: skip
    return [(name, known[name]) for name in names]


# -- schemas


def schemas() -> dict[str, Schema]:
    """What explodes in a compiler of schemas, or while the compiled one is followed."""
    text: Schema = {"type": "string"}
    return {
        "ref to itself": {"$ref": "#"},
        "ring of refs": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        },
        "any of itself": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        "any of any": _chain(30, 2),
        "any of any, wide": _chain(60, 8),
        "longest chain": _chain(150, 16),
        "objects of objects": _tree(20, 8),
        "more objects": _tree(60, 8),
        "all of any, 6 times": _all_of(6, 6),
        "all of any, 10 times": _all_of(10, 2),
        "all of any, 12 times": _all_of(12, 12),
        "all of any, 20 times": _all_of(20, 20),
        "nested all of": _nested(30),
        "6,500 words": {"enum": [f"v{i}" for i in range(6500)]},
        "one long word": {"enum": ["x" * 60_000]},
        "deep constant": {"const": [[[[1] * 5000]]]},
        "10^9 items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        "at most 10^9 items": {"type": "array", "items": text, "maxItems": 10**9},
        "10^9 characters": {"type": "string", "minLength": 10**9},
        "at most 10^9 characters": {"type": "string", "maxLength": 10**9},
        "10^9 properties": {"type": "object", "minProperties": 10**9},
        "500 properties": {"type": "object", "properties": {f"p{i}": text for i in range(500)}},
        "1,500 properties": {"type": "object", "properties": {f"p{i}": text for i in range(1500)}},
        "3,000 items in turn": {"type": "array", "prefixItems": [text] * 3000},
        "pattern of patterns": _pattern("^(a+)+$"),
        "pattern, counted": _pattern("((a|a)*){1000}b"),
        "pattern of 10^8": _pattern("((((a{100}){100}){100}){100})"),
        "pattern of 10^6": _pattern("a{1000000}"),
        "pattern of states": _pattern("(.*a.{200}){3}"),
        "pattern of letters": _pattern("[\\p{L}\\p{N}]{500}"),
        "pattern looks ahead": _pattern("(?=a)(?!b).*"),
        "pattern of choices": _pattern("|".join(f"w{i}.*x{i}" for i in range(2000))),
        "patterns at once": {
            "type": "string",
            "allOf": [{"pattern": f".*a.{{{i}}}"} for i in range(40)],
        },
        "names by pattern": {
            "type": "object",
            "patternProperties": {f"^a{i}.*b{i}": {} for i in range(500)},
        },
        "huge range": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
        "tiny step": {"type": "number", "multipleOf": 1e-300},
        "from the net": {"$ref": "http://127.0.0.1:1/x.json"},
        "64 KiB and a byte": {"enum": ["x" * 65_520]},
    }


def _pattern(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def _chain(depth: int, width: int) -> Schema:
    """Each level names the next one several times: width ** depth ways to the end."""
    levels: dict[str, Any] = {
        f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * width} for i in range(depth)
    }
    return {"$defs": {**levels, f"a{depth}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def _tree(depth: int, width: int) -> Schema:
    """Objects whose smallest value has width ** depth leaves."""
    names = [f"p{j}" for j in range(width)]
    levels: dict[str, Any] = {
        f"a{i}": {
            "type": "object",
            "properties": {name: {"$ref": f"#/$defs/a{i + 1}"} for name in names},
            "required": names,
            "additionalProperties": False,
        }
        for i in range(depth)
    }
    return {"$defs": {**levels, f"a{depth}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def _all_of(n: int, width: int) -> Schema:
    """A product of sums: width ** n when it is multiplied out."""
    return {
        "allOf": [
            {
                "anyOf": [
                    {"properties": {f"x{i}_{j}": {"const": j}}, "required": [f"x{i}_{j}"]}
                    for j in range(width)
                ],
                "type": "object",
            }
            for i in range(n)
        ]
    }


def _nested(depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"allOf": [schema, {"anyOf": [{"type": "integer"}, {"type": "string"}]}]}
    return schema


# -- templates

TAKES_TOOLS = "{{ messages[-1].content }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def templates() -> dict[str, str]:
    """A model's own template that takes time, memory or output without end."""
    return {
        "range in range": _LOOP,
        "long output": "{% set x = 'a' * 10**6 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "10^9 letters": "{{ 'a' * 10**9 }}",
        "10^9 items": "{{ ([0] * 10**9) | length }}",
        "doubling": "{% set n = namespace(s='a') %}{% for i in range(99) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "long number": "{{ 10**(10**8) }}",
        "calls itself": "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}"
        "{% endmacro %}{{ f() }}",
        "centred": "{{ 'a'.center(10**9) }}",
        "padded": "{{ ('%' ~ '999999999' ~ 'd') | format(1) }}",
        "replaced": "{{ 'ab' | replace('a', 'b' * 10**5) | replace('b', 'c' * 10**5) }}",
        "joined": "{{ (['x' * 1000] * 10**6) | join(',' * 1000) }}",
        "sorted": "{{ (range(99999) | list * 1000) | sort | length }}",
        "indented": "{{ ('a\\n' * 10**6) | indent(10**4) }}",
        "wrapped": "{{ ('a ' * 10**7) | wordwrap(1) | length }}",
        "refuses at length": "{{ raise_exception('x' * 10**7) }}",
        "nested lists": "{% set n = namespace(s=[]) %}{% for i in range(99999) %}"
        "{% set n.s = [n.s] %}{% endfor %}{{ n.s | tojson }}",
    }


# -- what goes into a template


def _inputs() -> list[Bomb]:
    """Chats that are large, or that a template multiplies."""
    part = {"type": "text", "text": "x"}
    quoting = (
        "{% for m in messages %}{% for k in messages %}{{ k.content }}{% endfor %}{% endfor %}"
    )
    many = [{"role": "user", "content": "x" * 100}] * 10_000
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 5000}}
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 60_000}}
    return [
        Bomb(name="chat: 10,000 messages", body={"messages": many}),
        Bomb(name="chat: squared by the template", body={"messages": many}, template=quoting),
        Bomb(
            name="chat: 16,384 parts",
            body={"messages": [{"role": "user", "content": [part] * 16_384}]},
        ),
        Bomb(name="chat: 7 MiB", body={"messages": [{"role": "user", "content": "é" * 3_500_000}]}),
        Bomb(
            name="chat: deep arguments",
            body={"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, *MESSAGES]},
            template=TAKES_TOOLS,
        ),
        Bomb(name="chat: 128 large tools", body={"tools": [tool] * 120}, template=TAKES_TOOLS),
        Bomb(
            name="chat: jinja in the text", body={"messages": [{"role": "user", "content": _LOOP}]}
        ),
        Bomb(name="prompt: 7 MiB", path="/v1/completions", body={"prompt": "ab " * 2_400_000}),
        Bomb(name="prompt: one letter", path="/v1/completions", body={"prompt": "a" * 7_000_000}),
        Bomb(
            name="prompt: special tokens",
            path="/v1/completions",
            body={"prompt": "<|im_end|>" * 400_000},
        ),
    ]


def size_bytes(bomb: Bomb) -> int:
    """What a client has to send for it."""
    return len(json.dumps(bomb.body))
