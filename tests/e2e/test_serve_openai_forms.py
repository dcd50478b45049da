"""More of OpenAI's own client, unmodified: parsed answers, retries, calls that are written live."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.serve_parts import CITY, TOOL_TEMPLATE, WEATHER_CALL, Running, changed_demo, serving

ASK: Any = [{"role": "user", "content": "Rain in Bonn?"}]
ANSWER = f"I ask.\n<tool_call>\n{WEATHER_CALL.replace('weather', 'Weather')}\n</tool_call>"


class Weather(BaseModel):
    """The weather in a city."""

    city: str


class Steps(BaseModel):
    """A structured answer with a list in it."""

    steps: list[str]
    answer: int


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    model = changed_demo(home / "tools.gguf", {"tokenizer.chat_template": TOOL_TEMPLATE})
    fake = {"answer": ANSWER, "eog_after": len(ANSWER), "tok_s": 200}
    words = (f"tools={model}", "--ctx", "2048", "--parallel", "1", "--queue", "0")
    with serving(*words, home=home, fake=fake) as running:
        running.ask("POST", "/models/load", {"model": "tools"})
        yield running


def test_a_parsed_answer_has_its_class(client: OpenAI) -> None:
    fields: Any = {"model": "tools", "messages": ASK, "temperature": 0, "max_tokens": 400}
    answer = client.chat.completions.parse(**fields, response_format=Steps)
    assert isinstance(answer.choices[0].message.parsed, Steps)
    with client.chat.completions.stream(**fields, response_format=Steps) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Steps)
    response = client.responses.parse(
        model="tools", input="x", text_format=Steps, temperature=0, max_output_tokens=400
    )
    assert isinstance(response.output_parsed, Steps)


def test_the_arguments_of_a_call_are_parsed_and_told_as_they_come(client: OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    fields: Any = {"model": "tools", "messages": ASK, "tools": tools, "temperature": 0}
    answer = client.chat.completions.parse(**fields)
    assert answer.choices[0].message.tool_calls
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city=CITY)
    with client.chat.completions.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.choices[0].message.tool_calls
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city=CITY)


def test_a_busy_server_is_asked_again_when_it_says_so(server: Running, client: OpenAI) -> None:
    """429 with Retry-After: the client waits for as long, and then has its answer."""
    long: Any = {"model": "tools", "messages": ASK, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**long, max_tokens=1800, stream=True)
    next(iter(stream))
    refused = server.ask("POST", "/v1/chat/completions", {"model": "tools", "messages": ASK})
    assert refused[0] == 429
    assert 0 < float(refused[2]["retry-after"]) <= 5
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="tools", messages=ASK)
    statuses: list[int] = []

    def hear(response: httpx2.Response) -> None:
        statuses.append(response.status_code)
        stream.close()  # while the client waits, the server has time again

    started = time.monotonic()
    with httpx2.Client(event_hooks={"response": [hear]}) as heard:
        again = client.with_options(max_retries=2, http_client=heard)
        answer = again.chat.completions.create(model="tools", messages=ASK)
    assert answer.choices[0].message.content
    assert (statuses[0], statuses[-1]) == (429, 200)
    assert time.monotonic() - started >= float(refused[2]["retry-after"])


def test_what_would_fail_again_is_asked_once(tmp_path: Path) -> None:
    """`x-should-retry: false`: a model is not loaded twice more to fail twice more."""
    fake = {"fail_load": "a reason"}
    with (
        serving("--ctx", "256", home=tmp_path, fake=fake) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=2) as client,
    ):
        with pytest.raises(openai.APIStatusError) as refusal:
            client.chat.completions.create(model="demo", messages=ASK)
        assert refusal.value.status_code == 503
        assert refusal.value.response.headers["x-should-retry"] == "false"
        assert refusal.value.request.headers["x-stainless-retry-count"] == "0"


@pytest.mark.engine
def test_a_real_model_writes_the_arguments_of_a_forced_call_live(tmp_path: Path) -> None:
    """The packaged model under the schema of the call: what it writes is streamed, and is JSON."""
    model = changed_demo(tmp_path / "tools.gguf", {"tokenizer.chat_template": TOOL_TEMPLATE})
    north, south = ("a long name of a city in the north " * 5, "another in the south " * 8)
    kind = {"type": "string", "enum": [north, south]}
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {"city": kind},
            "required": ["city"], "additionalProperties": False}}  # fmt: skip
    fields: Any = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    with (
        serving(f"tools={model}", "--ctx", "2048", home=tmp_path) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        chunks = client.chat.completions.create(
            model="tools", messages=ASK, seed=1, stream=True, **fields
        )
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        texts = [call.function.arguments for call in calls if call.function]
        assert calls[0].function
        assert calls[0].function.name == "weather"
        assert len([text for text in texts if text]) > 1
        assert json.loads("".join(text or "" for text in texts))["city"] in kind["enum"]
        whole = client.chat.completions.create(model="tools", messages=ASK, seed=1, **fields)
        assert whole.choices[0].finish_reason == "tool_calls"
