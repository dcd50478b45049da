"""OpenAI's responses, stateless, in the words of its chat. Pure."""

from collections.abc import Mapping
from typing import Any

from loadmaster.tasks.api.openai_fields import Fields

_SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
_TEXTS = ("input_text", "output_text", "text")
# Each would need what is not kept here.
_STATE = {
    "previous_response_id": "nothing is kept here: send the whole conversation as `input`",
    "conversation": "nothing is kept here: send the whole conversation as `input`",
    "background": "every answer is made while the client waits; `/v1/batches` is for later ones",
}


def as_openai(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request as a chat.

    Raises:
        BadFieldError: something is missing, malformed or not supported.
    """
    fields = Fields(body)
    for name, reason in _STATE.items():
        if fields.get(name):
            raise fields.bad(name, reason)
    given = {name: fields.get(name) for name in _SAME if fields.get(name) is not None}
    given["max_tokens"] = fields.get("max_output_tokens")
    given["messages"] = _messages(fields)
    return {**given, **_format(fields), **_tools(fields)}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    instructions = fields.text("instructions")
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    asked = fields.required("input")
    if isinstance(asked, str):
        return [*messages, {"role": "user", "content": asked}]
    for index, item in enumerate(fields.items("input")):
        turn = _turn(Fields(item, f"input[{index}]"))
        if turn is not None:
            messages.append(turn)
    return messages


def _turn(item: Fields) -> dict[str, Any] | None:
    match item.get("type") or "message":
        case "message":
            return {"role": item.get("role"), "content": _content(item)}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _content(item, "output")
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
        case "reasoning":
            return None  # templates leave earlier reasoning out
        case kind:
            raise item.bad("type", f"`{kind}` is not supported")


def _content(item: Fields, name: str = "content") -> str:
    value = item.required(name)
    if isinstance(value, str):
        return value
    parts = [Fields(part, f"{item.path(name)}[{i}]") for i, part in enumerate(item.items(name))]
    for part in parts:
        if part.get("type") not in _TEXTS:
            raise part.bad("type", f"`{part.get('type')}` is not supported, only text is")
    return "".join(part.text("text") or "" for part in parts)


def _format(fields: Fields) -> dict[str, Any]:
    text = fields.object("text")
    wanted = text.object("format") if text is not None else None
    if wanted is None or wanted.get("type") == "text":
        return {}
    if wanted.get("type") == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema = {"name": wanted.get("name"), "schema": wanted.get("schema")}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _tools(fields: Fields) -> dict[str, Any]:
    tools = []
    for index, item in enumerate(fields.items("tools")):
        tool = Fields(item, f"tools[{index}]")
        if tool.get("type") != "function":
            raise tool.bad("type", f"`{tool.get('type')}` is not supported, only `function` is")
        names = ("name", "description", "parameters")
        function = {name: tool.get(name) for name in names if tool.get(name) is not None}
        tools.append({"type": "function", "function": function})
    choice = fields.get("tool_choice")
    found: dict[str, Any] = {"tools": tools} if tools else {}
    if choice is not None and (tools or choice != "auto"):
        found["tool_choice"] = choice
    return found
