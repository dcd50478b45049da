"""Bodies from an OpenAPI document: as it allows them, with one field wrong, and with many."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.conform import Schema

# Texts that mean something to a parser, a shell, a template, a tokenizer or a file system.
TEXTS = (
    "", "x", "go on", "demo", " ", "\n", "\x00", "\u202e", "\U0001f600", "é" * 300, "{{ 7 * 7 }}",
    "{% for a in range(9) %}", "<|im_start|>system", "</s>", "../../etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/", "data:text/plain,x", "true", "null", "NaN", "1e309", "-1", "0x10",
    "%s%n",
    "${HOME}", "$(id)", "' OR 1=1", "\ufffe", "\ufeff", "a" * 5000, "[" * 90, '{"a":1}', "<think>",
    "<tool_call>", "user", "system", "assistant", "tool", "function", "json_object", "json_schema",
)  # fmt: skip
WRONG: Sequence[Any] = (
    None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**400, "", "x",
    "\x00", "9" * 400, [], {}, [[]], [None], [{}], [1], ["x"], [True], [-1], [1.5], [2**70],
    {"": 1},
    {"a": {"b": [{}]}}, {"type": "x"}, {"type": None}, {"type": ["string"]}, [[1], "x"], ["", ""],
    {"name": 1}, {"role": "user"}, [{"role": 1}], [{"role": "user", "content": 1}],
    [{"role": "user", "content": [1]}], [{"role": "tool"}], [{"type": "function"}],
    [{"type": "function", "function": {"name": "f", "parameters": 1}}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
    [{"role": "assistant", "tool_calls": 1, "content": None}],
)  # fmt: skip
# Fields that the document does not name and that somebody's client sends.
OTHERS = (
    "functions", "audio", "modalities", "prediction", "parallel_tool_calls", "user", "metadata",
    "store", "service_tier", "best_of", "ignore_eos", "repetition_penalty", "repeat_last_n",
    "n_probs",
    "cache_prompt", "id_slot", "images", "context", "think", "truncate", "dimensions",
    "output_config",
    "thinking", "previous_response_id", "conversation", "reasoning", "include", "top_n", "top_k",
    "system",
    "input_extra", "max_output_tokens", "stream_options", "tool_choice", "text", "keep_alive",
    "options",
    "template", "documents", "query", "input", "prompt", "content", "tokens", "messages", "echo",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method of a path, as the document has it."""

    method: str
    path: str
    spec: Mapping[str, Any]

    @property
    def body(self) -> Schema | None:
        content = self.spec.get("requestBody", {}).get("content", {})
        schema: Schema | None = content.get("application/json", {}).get("schema")
        return schema

    @property
    def queries(self) -> list[str]:
        return [p["name"] for p in self.spec.get("parameters", ()) if p["in"] == "query"]

    @property
    def in_path(self) -> list[str]:
        return [p["name"] for p in self.spec.get("parameters", ()) if p["in"] == "path"]


def operations(document: Mapping[str, Any]) -> list[Operation]:
    """Every operation."""
    return [
        Operation(method=method.upper(), path=path, spec=spec)
        for path, methods in document["paths"].items()
        for method, spec in methods.items()
    ]


class Bodies:
    """A source of bodies for one schema; equal seeds give equal bodies."""

    def __init__(self, schema: Schema, dice: random.Random, models: Sequence[str]) -> None:
        self._schema = schema
        self._dice = dice
        self._models = models

    def right(self, *, all_fields: bool = False) -> dict[str, Any]:
        """As the document allows it, with its required fields and some of the others."""
        body = self._object(self._schema, 1.0 if all_fields else 0.3)
        if "model" in self._schema.get("properties", {}):
            body["model"] = self._dice.choice(self._models)
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
            if name in body:
                body[name] = self._dice.randrange(1, 9)
        return body

    def wrong(self) -> Iterator[dict[str, Any]]:
        """Each field, named in the document or not, with each wrong value, the rest right."""
        named = list(self._schema.get("properties", {}))
        for name in [*named, *OTHERS]:
            for value in WRONG:
                yield {**self.right(), name: value}

    def soup(self) -> dict[str, Any]:
        """Several fields wrong at once, some of them deep inside."""
        body = self.right(all_fields=self._dice.random() < 0.2)
        for _ in range(self._dice.randrange(1, 5)):
            names = [*body, *self._dice.sample(OTHERS, 3)]
            name = self._dice.choice(names)
            body[name] = self._mutated(body.get(name), depth=3)
        return body

    def _mutated(self, value: Any, depth: int) -> Any:
        if depth and isinstance(value, dict) and value and self._dice.random() < 0.7:
            key = self._dice.choice(list(value))
            return {**value, key: self._mutated(value[key], depth - 1)}
        if depth and isinstance(value, list) and value and self._dice.random() < 0.7:
            place = self._dice.randrange(len(value))
            return [*value[:place], self._mutated(value[place], depth - 1), *value[place + 1 :]]
        return self._dice.choice(WRONG)

    # -- values of a schema

    def _value(self, schema: Schema) -> Any:
        if "anyOf" in schema:
            return self._value(self._dice.choice(schema["anyOf"]))
        if "enum" in schema:
            return self._dice.choice(schema["enum"])
        match schema.get("type"):
            case "string":
                return self._dice.choice(TEXTS)
            case "integer":
                return self._dice.randrange(schema.get("minimum", -2), 9)
            case "number":
                low, high = schema.get("minimum", -2.0), schema.get("maximum", 2.0)
                return self._dice.choice([low, high, self._dice.uniform(low, high)])
            case "boolean":
                return self._dice.random() < 0.5
            case "array":
                n_items = max(schema.get("minItems", 0), self._dice.randrange(0, 4))
                return [self._value(schema.get("items", {})) for _ in range(n_items)]
            case "object":
                return self._object(schema, 0.5)
        return self._dice.choice(WRONG)

    def _object(self, schema: Schema, share: float) -> dict[str, Any]:
        required = schema.get("required", ())
        return {
            name: self._value(inner)
            for name, inner in schema.get("properties", {}).items()
            if name in required or self._dice.random() < share
        }
