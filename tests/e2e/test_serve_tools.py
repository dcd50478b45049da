"""Tools, reasoning and the other forms of a chat, with released clients on the fake backend."""

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.serve_parts import (
    ARGUMENTS,
    CITY,
    TOOL_TEMPLATE,
    WEATHER_CALL,
    Running,
    changed_demo,
    serving,
)

ANSWER = f"<think>\nI ask.\n</think>\n\nOne moment.\n<tool_call>\n{WEATHER_CALL}\n</tool_call>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
ASK: Any = [{"role": "user", "content": "Rain in Bonn?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    model = changed_demo(home / "tools.gguf", {"tokenizer.chat_template": TOOL_TEMPLATE})
    fake = {"answer": ANSWER, "eog_after": len(ANSWER), "tok_s": 200}
    ranker = changed_demo(home / "ranker.gguf", {"llama.pooling_type": 4})
    words = (f"tools={model}", "plain=demo", f"ranker={ranker}", "--ctx", "512")
    with serving(*words, home=home, fake=fake) as running:
        yield running


def test_a_call_is_a_call_and_reasoning_is_apart(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tools", messages=ASK, tools=TOOLS, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment.\n"
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    assert choice.message.model_extra == {"reasoning_content": "I ask."}


def test_a_streamed_call_has_its_name_once(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="tools", messages=ASK, tools=TOOLS, temperature=0, stream=True
    )
    names: list[str] = []
    arguments: list[str] = []
    reasons = []
    for chunk in chunks:
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            assert call.function
            names += [call.function.name] if call.function.name else []
            arguments += [call.function.arguments] if call.function.arguments else []
    assert names == ["weather"]
    assert "".join(arguments) == ARGUMENTS
    assert len(arguments) > 1  # as they were written, and not at the end
    assert reasons[-1] == "tool_calls"


def test_a_call_cut_by_max_tokens_is_text(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tools", messages=ASK, tools=TOOLS, temperature=0, max_tokens=len(ANSWER) - 30
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert "<tool_call>" in (choice.message.content or "")


def test_a_streamed_call_cut_by_max_tokens_says_so_in_every_form(
    client: OpenAI, claude: Anthropic
) -> None:
    """What was told of the call stays, and the end says that it is not whole."""
    cut: Any = {"temperature": 0, "stream": True}
    n = ANSWER.index(CITY) + 2
    chunks = list(
        client.chat.completions.create(
            model="tools", messages=ASK, tools=TOOLS, max_tokens=n, **cut
        )
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    told = "".join((call.function.arguments or "") if call.function else "" for call in calls)
    assert told == '{"city": "Bo'
    assert chunks[-1].choices[0].finish_reason == "length"
    tools: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS}]
    *_, last = client.responses.create(
        model="tools", input="Rain in Bonn?", tools=tools, max_output_tokens=n, **cut
    )
    assert last.type == "response.incomplete"
    call = last.response.output[-1]
    assert call.type == "function_call"
    assert (call.arguments, call.status) == ('{"city": "Bo', "incomplete")
    fields: Any = {"tools": [{"name": "weather", "input_schema": PARAMETERS}], "messages": ASK}
    with claude.messages.stream(
        model="tools", max_tokens=n, extra_body={"temperature": 0}, **fields
    ) as stream:
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_a_template_without_tools_refuses_them(client: OpenAI) -> None:
    with pytest.raises(Exception, match="no place for tools"):
        client.chat.completions.create(model="plain", messages=ASK, tools=TOOLS)


def test_responses_whole_and_streamed(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS}]
    whole = client.responses.create(
        model="tools", input="Rain in Bonn?", tools=tools, temperature=0
    )
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text == "One moment.\n"
    events = list(
        client.responses.create(
            model="tools", input="Rain in Bonn?", tools=tools, temperature=0, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == "One moment.\n"
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.type for item in last.response.output] == [item.type for item in whole.output]


@pytest.fixture
def claude(server: Running) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="unused", max_retries=0) as one:
        yield one


def test_anthropics_client_gets_blocks(claude: Anthropic) -> None:
    fields: Any = {
        "model": "tools",
        "max_tokens": 400,
        "messages": ASK,
        "tools": [{"name": "weather", "input_schema": PARAMETERS}],
        "extra_body": {"temperature": 0},
    }
    whole = claude.messages.create(**fields)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.stop_reason == "tool_use"
    with claude.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["thinking", "text", "tool_use"]
    called = final.content[2]
    assert called.type == "tool_use"
    assert called.input == {"city": CITY}
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model="tools", messages=ASK, tools=fields["tools"])
    assert counted.input_tokens == whole.usage.input_tokens


def test_rerank_answers_in_both_forms(server: Running, client: OpenAI) -> None:
    documents = ["one", {"text": "two, which is longer"}, "three"]
    body = {"model": "ranker", "query": "q", "documents": documents}
    status, found, _ = server.ask("POST", "/v1/rerank", body)
    assert status == 200
    assert found["results"] == found["data"]
    scores = [item["relevance_score"] for item in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(item["index"] for item in found["results"]) == [0, 1, 2]
    first = server.ask("POST", "/rerank", {**body, "top_n": 1})[1]["results"]
    assert first == found["results"][:1]


def test_a_tool_that_has_to_be_called_is_called(client: OpenAI) -> None:
    """Its schema goes to the engine; this one ignores it, and says a call by itself."""
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model="tools", messages=ASK, tools=TOOLS, tool_choice=choice, temperature=0
    )
    assert answer.choices[0].finish_reason == "tool_calls"
