"""Chats with tools, of OpenAI's form and of those that are put into it."""

import json
from typing import Any

import pytest

from loadmaster.tasks.api import anthropic_requests, ollama_requests, responses_requests
from loadmaster.tasks.api.chat_requests import parse_tool_chat
from loadmaster.tasks.api.openai_fields import BadFieldError, Fields

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}


def test_messages_of_tools_reach_the_template_with_arguments_as_an_object() -> None:
    asked = parse_tool_chat(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "rain"},
            ],
            "tools": [TOOL],
        }
    )
    _, called, told = asked.messages
    assert called["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert told == {"role": "tool", "tool_call_id": "1", "content": "rain"}
    assert asked.tools.names == ("weather",)
    assert asked.generation.json_schema is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_has_to_be_made_is_a_schema(choice: object) -> None:
    asked = parse_tool_chat({"messages": [USER], "tools": [TOOL], "tool_choice": choice})
    assert asked.generation.json_schema is not None
    schema = json.loads(asked.generation.json_schema)
    assert schema["properties"]["name"] == {"const": "weather"}


def test_tools_that_may_not_be_called_are_left_out() -> None:
    asked = parse_tool_chat({"messages": [USER], "tools": [TOOL], "tool_choice": "none"})
    assert asked.tools.definitions == ()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
         "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": 1}]}, "messages[0].content"),
    ],
)  # fmt: skip
def test_malformed_tools_name_their_place(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadFieldError) as refusal:
        parse_tool_chat({"messages": [USER], **changes})
    assert refusal.value.param == param


def test_anthropics_blocks_become_messages() -> None:
    body = {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "t", "name": "weather", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": "rain"},
                {"type": "text", "text": "and?"}]},
        ],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"},
        "stop_sequences": ["x"],
    }  # fmt: skip
    asked = parse_tool_chat(anthropic_requests.as_openai(body))
    roles = [message["role"] for message in asked.messages]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    assert asked.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert asked.tools.choice == "required"
    assert asked.generation.stop == ("x",)
    assert asked.generation.max_tokens == 5


def test_anthropics_length_is_needed_and_images_are_refused() -> None:
    with pytest.raises(BadFieldError) as refusal:
        anthropic_requests.as_openai({"messages": [USER]})
    assert refusal.value.param == "max_tokens"
    image = {"role": "user", "content": [{"type": "image", "source": {}}]}
    with pytest.raises(BadFieldError, match="image"):
        anthropic_requests.as_openai({"max_tokens": 1, "messages": [image]})


def test_responses_items_become_messages() -> None:
    body = {
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "rain"},
        ],
        "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "max_output_tokens": 9,
    }
    asked = parse_tool_chat(responses_requests.as_openai(body))
    assert [m["role"] for m in asked.messages] == ["system", "user", "assistant", "tool"]
    assert asked.generation.max_tokens == 9
    assert asked.generation.json_schema == '{"type": "object"}'


def test_responses_that_need_memory_are_refused() -> None:
    with pytest.raises(BadFieldError) as refusal:
        responses_requests.as_openai({"input": "hi", "previous_response_id": "resp_1"})
    assert refusal.value.param == "previous_response_id"


def test_ollamas_options_are_openais_fields() -> None:
    body = {
        "model": "m",
        "messages": [USER],
        "options": {"num_predict": 7, "temperature": 0, "num_ctx": 4096, "seed": -1, "top_k": 3},
        "format": "json",
    }
    asked = parse_tool_chat(ollama_requests.as_openai(body))
    assert asked.generation.max_tokens == 7
    assert asked.generation.sampling.top_k == 3
    assert asked.generation.seed is None
    assert asked.generation.json_schema == '{"type": "object"}'
    assert asked.generation.stream


@pytest.mark.parametrize(
    ("value", "seconds"), [("5m", 300), (0, 0), ("90s", 90), (30, 30), ("1h", 3600)]
)
def test_keep_alive_is_a_time(value: object, seconds: float) -> None:
    assert ollama_requests.keep_alive_s(Fields({"keep_alive": value})) == seconds


def test_keep_alive_below_zero_is_for_good() -> None:
    assert ollama_requests.keep_alive_s(Fields({"keep_alive": -1})) == float("inf")
    with pytest.raises(BadFieldError):
        ollama_requests.keep_alive_s(Fields({"keep_alive": "soon"}))
