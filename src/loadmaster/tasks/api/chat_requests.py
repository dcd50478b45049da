"""A chat as a server takes it: OpenAI's body with tools, and what of it the template needs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.errors import UsageError
from loadmaster.tasks.api.answer_reading import THINK, AnswerReader
from loadmaster.tasks.api.generation import Generation
from loadmaster.tasks.api.openai_fields import BadFieldError, Fields
from loadmaster.tasks.api.openai_requests import parse_chat
from loadmaster.tasks.api.tool_requests import Tools, calls_for_template, read_tools
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.requests import Tokenize, Tokens, check_text

_TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_PLACEHOLDER = {"role": "user", "content": "-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChat:
    """A chat whose model may call tools."""

    model: str | None
    messages: tuple[Mapping[str, Any], ...]
    generation: Generation
    tools: Tools

    def render(self, opened: Opened) -> str:
        """The text of the prompt.

        Raises:
            UsageError: the template has no place for tools.
        """
        definitions = None
        if self.tools.definitions:
            if not opened.template.takes_tools:
                raise _no_tools()
            definitions = self.tools.definitions
        loaded = opened.session.loaded
        return opened.template.render(
            self.messages, bos_text=loaded.bos_text, eos_text=loaded.eos_text, tools=definitions
        )


def _no_tools() -> UsageError:
    return BadFieldError(
        "tools",
        "`tools`: this model's chat template has no place for tools",
        hint="ask a model that was taught to call them, or use `response_format` with a schema",
    )


def parse_tool_chat(body: Mapping[str, Any]) -> ToolChat:
    """OpenAI's body of a chat.

    Raises:
        BadFieldError: a field is missing, malformed or not supported.
    """
    fields = Fields(body)
    tools = read_tools(fields)
    items = fields.items("messages")
    ours = {i: _tool_turn(Fields(m, f"messages[{i}]")) for i, m in enumerate(items) if _special(m)}
    plain = {name: value for name, value in body.items() if name not in _TOOL_FIELDS}
    if ours:
        plain["messages"] = [_PLACEHOLDER if i in ours else m for i, m in enumerate(items)]
    asked = parse_chat(plain)
    generation = asked.generation
    if tools.forced_schema is not None:
        if generation.json_schema is not None:
            raise fields.bad("response_format", "does not go with a tool that has to be called")
        generation = replace(generation, json_schema=tools.forced_schema)
    return ToolChat(
        model=asked.model,
        messages=tuple(ours.get(i, message) for i, message in enumerate(asked.messages)),
        generation=generation,
        tools=tools,
    )


def _special(message: Any) -> bool:
    return isinstance(message, dict) and (
        message.get("role") == "tool" or bool(message.get("tool_calls"))
    )


def _tool_turn(fields: Fields) -> Mapping[str, Any]:
    """A message of a tool, or one that calls tools."""
    content = fields.get("content")
    if isinstance(content, list):
        parts = [Fields(part, fields.path(f"content[{i}]")) for i, part in enumerate(content)]
        content = "".join(part.text("text") or "" for part in parts)
    elif content is not None and not isinstance(content, str):
        raise fields.bad("content", "not a text")
    if fields.get("role") == "tool":
        name = fields.text("name")
        turn = {"role": "tool", "content": content or ""}
        turn["tool_call_id"] = fields.text("tool_call_id") or ""
        return {**turn, "name": name} if name else turn
    if fields.get("role") != "assistant":
        raise fields.bad("tool_calls", "only the assistant calls tools")
    calls = calls_for_template(fields)
    return {"role": "assistant", "content": content or "", "tool_calls": calls}


class ChatPrompt:
    """Makes a chat's prompt, and remembers how its answer is to be read."""

    def __init__(self, asked: ToolChat) -> None:
        self._asked = asked
        self._thinking = False

    @property
    def tokenize(self) -> Tokenize:
        """The prompt's tokens; blocking."""

        def tokens(opened: Opened) -> list[Tokens]:
            text = self._asked.render(opened)
            check_text(opened, text)
            self._thinking = text.rstrip().endswith(THINK[0])
            return [opened.session.tokens(text)]

        return tokens

    def reader(self, *, in_pieces: bool = False) -> AnswerReader:
        """For one choice, once the prompt is made."""
        schema = self._asked.generation.json_schema is not None
        # A schema shapes the text from its first token on: there is no reasoning before it.
        return AnswerReader(
            tools=self._asked.tools.texts,
            thinking=self._thinking and not schema,
            in_pieces=in_pieces,
        )
