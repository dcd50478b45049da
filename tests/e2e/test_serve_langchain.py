"""LangChain's clients of OpenAI's, Anthropic's and Ollama's routes, on the fake backend."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.serve_parts import CITY, TOOL_TEMPLATE, UNCLOSED, Running, changed_demo, serving
from tests.serve_parts import WEATHER_ANSWER as ANSWER

ASK = "Rain in Bonn?"

pytestmark = UNCLOSED


class Weather(BaseModel):
    """What is wanted of a structured answer."""

    city: str
    wet: bool


def _weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


weather = tool("weather")(_weather)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    model = changed_demo(home / "tools.gguf", {"tokenizer.chat_template": TOOL_TEMPLATE})
    words = (f"tools={model}", "--embeddings", "vectors=demo", "--ctx", "1024")
    fake = {"answer": ANSWER, "eog_after": len(ANSWER), "tok_s": 150}
    with serving(*words, home=home, fake=fake) as running:
        yield running


def chats(server: Running) -> dict[str, Any]:
    fields: Any = {"model": "tools", "temperature": 0}
    return {
        "openai": ChatOpenAI(base_url=f"{server.url}/v1", api_key="unused", seed=0, **fields),
        "responses": ChatOpenAI(
            base_url=f"{server.url}/v1", api_key="unused", use_responses_api=True, **fields
        ),
        "anthropic": ChatAnthropic(
            base_url=server.url, api_key="unused", max_tokens=200, max_retries=0, **fields
        ),
        "ollama": ChatOllama(base_url=server.url, seed=0, **fields),
    }


KINDS = ("openai", "responses", "anthropic", "ollama")


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_whole_and_streamed(server: Running, kind: str) -> None:
    chat = chats(server)[kind]
    whole = chat.invoke(ASK)
    assert isinstance(whole, AIMessage)
    assert whole.text == ANSWER  # no tools were given: all of it is text
    chunks = list(chat.stream(ASK))
    assert "".join(chunk.text for chunk in chunks) == ANSWER
    assert len([chunk for chunk in chunks if chunk.text]) > 3
    usage = whole.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == len(ANSWER) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_tools_are_called_and_their_results_taken(server: Running, kind: str) -> None:
    chat = chats(server)[kind].bind_tools([weather])
    answer = chat.invoke(ASK)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": CITY})
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content == f"rain in {CITY}"
    assert chat.invoke([HumanMessage(ASK), answer, result]).tool_calls


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_calls_grow(server: Running, kind: str) -> None:
    chat = chats(server)[kind].bind_tools([weather])
    chunks = [chunk for chunk in chat.stream(ASK) if isinstance(chunk, AIMessageChunk)]
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    (call,) = total.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": CITY})
    fragments = [part["args"] for chunk in chunks for part in chunk.tool_call_chunks]
    least = 1 if kind == "ollama" else 2  # Ollama's form has calls as objects
    assert len([text for text in fragments if text]) >= least


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic", "ollama"])
def test_a_structured_answer_has_the_schema(server: Running, kind: str) -> None:
    chat = chats(server)[kind].with_structured_output(Weather, method="json_schema")
    found = chat.invoke(ASK)
    assert isinstance(found, Weather)


def test_a_structured_answer_through_a_forced_call(server: Running) -> None:
    chat = chats(server)["openai"].with_structured_output(Weather, method="function_calling")
    assert isinstance(chat.invoke(ASK), Weather)


def test_embeddings(server: Running) -> None:
    """Without the switch, the client sends token ids of OpenAI's tokenizer, which it fetches."""
    by_openai = OpenAIEmbeddings(
        model="vectors", base_url=f"{server.url}/v1", api_key="unused",
        check_embedding_ctx_length=False,
    )  # fmt: skip
    by_ollama = OllamaEmbeddings(model="vectors", base_url=server.url)
    texts = ["one", "two"]
    vectors = by_openai.embed_documents(texts)
    assert len(vectors) == 2
    for one, other in zip(vectors, by_ollama.embed_documents(texts), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert by_openai.embed_query("one") == pytest.approx(vectors[0], abs=1e-6)


def test_choices_and_json_mode(server: Running) -> None:
    chat = ChatOpenAI(model="tools", base_url=f"{server.url}/v1", api_key="unused", n=2)
    assert len(chat.generate([[HumanMessage(ASK)]]).generations[0]) == 2
    found = chat.with_structured_output(None, method="json_mode").invoke("JSON, please")
    json.dumps(found)
