"""Anthropic's messages in OpenAI's words, so that one parser checks both. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from loadmaster.tasks.api.openai_fields import Fields

_SAME = ("model", "temperature", "top_p", "top_k", "stream")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_openai(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same chat as OpenAI's clients would send it.

    Raises:
        BadFieldError: something is missing, malformed or not supported.
    """
    fields = Fields(body)
    fields.required("max_tokens")
    given = chat_of(body)
    for name in _SAME:
        if fields.get(name) is not None:
            given[name] = fields.get(name)
    given["max_tokens"] = fields.get("max_tokens")
    given["stop"] = fields.items("stop_sequences") or None
    return {**given, **_format(fields)}


def _format(fields: Fields) -> dict[str, Any]:
    """`output_config.format`: a JSON schema that the answer has to have."""
    config = fields.object("output_config")
    wanted = config.object("format") if config is not None else None
    if wanted is None:
        return {}
    wanted.choice("type", ("json_schema",))
    schema = {"schema": wanted.get("schema")}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def chat_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Messages and tools alone: what is counted."""
    fields = Fields(body)
    system = _text_of(fields, "system")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for index, item in enumerate(fields.items("messages")):
        messages += _turns(Fields(item, f"messages[{index}]"))
    return {"model": fields.get("model"), "messages": messages, **_tools(fields)}


def _text_of(fields: Fields, name: str) -> str:
    """A text, or blocks of text."""
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    blocks = [Fields(b, f"{fields.path(name)}[{i}]") for i, b in enumerate(fields.items(name))]
    return "".join(_plain(block) for block in blocks)


def _plain(block: Fields) -> str:
    if block.get("type") != "text":
        raise block.bad("type", f"`{block.get('type')}` is not supported here, only `text` is")
    return block.text("text") or ""


def _turns(fields: Fields) -> list[dict[str, Any]]:
    """One message of theirs as ours: results of tools are messages of their own."""
    role = fields.choice("role", ("user", "assistant"))
    content = fields.required("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    turns: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, item in enumerate(fields.items("content")):
        block = Fields(item, f"{fields.path('content')}[{index}]")
        match block.get("type"):
            case "tool_result":
                turns.append(_result(block))
            case "tool_use":
                calls.append(_call(block))
            case "thinking" | "redacted_thinking":
                pass  # templates leave earlier reasoning out
            case _:
                texts.append(_plain(block))
    if texts or calls:
        turn: dict[str, Any] = {"role": role, "content": "".join(texts)}
        turns.append({**turn, "tool_calls": calls} if calls else turn)
    return turns


def _result(block: Fields) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": block.text("tool_use_id") or "",
        "content": _text_of(block, "content"),
    }


def _call(block: Fields) -> dict[str, Any]:
    function = {"name": block.text("name") or "", "arguments": json.dumps(block.get("input") or {})}
    return {"id": block.text("id") or "", "type": "function", "function": function}


def _tools(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    items = [Fields(item, f"tools[{i}]") for i, item in enumerate(fields.items("tools"))]
    if items:
        found["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": item.get("name"),
                    "description": item.get("description"),
                    "parameters": item.get("input_schema"),
                },
            }
            for item in items
        ]
    choice = fields.object("tool_choice")
    if choice is not None:
        kind = choice.choice("type", ("auto", "any", "tool", "none")) or "auto"
        found["tool_choice"] = (
            {"function": {"name": choice.get("name")}} if kind == "tool" else _CHOICES[kind]
        )
    return found
