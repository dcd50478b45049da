"""`tools` of a chat: checked, as templates take them, and as a schema where one must be called."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadmaster.tasks.api.openai_fields import Fields

Choice = Literal["auto", "none", "required"]
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_TOOLS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a model may call, and whether it has to."""

    definitions: tuple[Mapping[str, Any], ...] = ()
    choice: Choice = "auto"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.definitions)

    @property
    def texts(self) -> dict[str, frozenset[str]]:
        """For each tool, the parameters that are texts, whatever a model writes there."""
        return {tool["function"]["name"]: _texts(tool["function"]) for tool in self.definitions}

    @property
    def forced_schema(self) -> str | None:
        """The schema of a call, where the answer has to be one."""
        if self.choice != "required":
            return None
        calls = [_call_schema(n, tool["function"]) for n, tool in enumerate(self.definitions)]
        return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


NO_TOOLS = Tools()


def _texts(function: Mapping[str, Any]) -> frozenset[str]:
    properties = (function.get("parameters") or {}).get("properties")
    schemas = properties if isinstance(properties, dict) else {}
    found = (name for name, one in schemas.items() if isinstance(one, dict))
    return frozenset(name for name in found if schemas[name].get("type") == "string")


def _call_schema(number: int, function: Mapping[str, Any]) -> dict[str, Any]:
    """With a base of its own, so that `#/$defs/…` of the parameters are found where they are."""
    parameters = {"$id": f"tool:{number}", **(function.get("parameters") or {"type": "object"})}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def read_tools(fields: Fields) -> Tools:
    """`tools` and `tool_choice` of a body.

    Raises:
        BadFieldError: one is malformed, or a tool is chosen that is not there.
    """
    items = fields.items("tools")
    if len(items) > _MOST_TOOLS:
        raise fields.bad("tools", f"{len(items)} tools, {_MOST_TOOLS} at most")
    tools = [_definition(Fields(item, f"tools[{i}]")) for i, item in enumerate(items)]
    wanted = fields.get("tool_choice") or "auto"
    if isinstance(wanted, dict):
        name = (wanted.get("function") or wanted).get("name")
        chosen = [tool for tool in tools if tool["function"]["name"] == name]
        if not chosen:
            raise fields.bad("tool_choice", "names no tool of `tools`")
        return Tools(definitions=tuple(chosen), choice="required")
    choice = fields.choice("tool_choice", ("auto", "none", "required")) or "auto"
    if choice == "required" and not tools:
        raise fields.bad("tool_choice", "`required` without `tools`")
    if choice == "none" or not tools:
        return NO_TOOLS
    return Tools(definitions=tuple(tools), choice="required" if choice == "required" else "auto")


def _definition(fields: Fields) -> dict[str, Any]:
    kind = fields.get("type") or "function"
    if kind != "function":
        raise fields.bad("type", f"`{kind}` is not supported, only `function` is")
    inner = fields.object("function")
    if inner is None:
        raise fields.bad("function", "missing")
    name = inner.text("name") or ""
    if not _NAME.fullmatch(name):
        raise inner.bad("name", "not a name of 1 to 64 letters, digits, `_`, `-` or `.`")
    inner.object("parameters")
    function = {
        "name": name,
        "description": inner.text("description") or "",
        "parameters": inner.get("parameters") or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def calls_for_template(fields: Fields) -> Sequence[Mapping[str, Any]]:
    """`tool_calls` of an assistant's message, with arguments as templates take them: an object.

    Raises:
        BadFieldError: a call is malformed.
    """
    found = []
    for index, item in enumerate(fields.items("tool_calls")):
        call = Fields(item, f"{fields.path('tool_calls')}[{index}]")
        function = call.object("function")
        if function is None:
            raise call.bad("function", "missing")
        found.append(
            {
                "id": call.text("id") or "",
                "type": "function",
                "function": {
                    "name": function.text("name") or "",
                    "arguments": _arguments(function),
                },
            }
        )
    return found


def _arguments(function: Fields) -> Any:
    value = function.get("arguments")
    if not isinstance(value, str):
        return value or {}
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
