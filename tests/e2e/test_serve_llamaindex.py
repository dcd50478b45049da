"""LlamaIndex' clients of OpenAI's and Ollama's routes, unmodified, on the fake backend."""

from collections.abc import Iterator

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.lmstudio import LMStudio
from llama_index.llms.ollama import Ollama
from pydantic import BaseModel

from tests.serve_parts import CITY, TOOL_TEMPLATE, UNCLOSED, Running, changed_demo, serving
from tests.serve_parts import WEATHER_ANSWER as ANSWER

ASK = [ChatMessage(role="user", content="Rain in Bonn?")]

pytestmark = UNCLOSED


class Weather(BaseModel):
    """What is wanted of a structured answer."""

    city: str


def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    model = changed_demo(home / "tools.gguf", {"tokenizer.chat_template": TOOL_TEMPLATE})
    words = (f"tools={model}", "--embeddings", "vectors=demo", "--ctx", "1024")
    fake = {"answer": ANSWER, "eog_after": len(ANSWER), "tok_s": 150}
    with serving(*words, home=home, fake=fake) as running:
        yield running


@pytest.fixture
def ollama(server: Running) -> Ollama:
    return Ollama(model="tools", base_url=server.url, temperature=0, context_window=1024)


@pytest.fixture
def openai_like(server: Running) -> LMStudio:
    """LlamaIndex' generic client of `/v1/chat/completions`."""
    return LMStudio(model_name="tools", base_url=f"{server.url}/v1")


@pytest.fixture
def vectors(server: Running) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(
        model_name="vectors", api_base=f"{server.url}/v1", api_key="unused", max_retries=0
    )


def test_chat_whole_and_streamed(ollama: Ollama, openai_like: LMStudio) -> None:
    for chat, fields in ((ollama, {}), (openai_like, {"temperature": 0})):
        assert chat.chat(ASK, **fields).message.content == ANSWER
        parts = [part.delta for part in chat.stream_chat(ASK, **fields)]
        assert "".join(part or "" for part in parts) == ANSWER
        assert len(parts) > 3


def test_a_tool_is_called(ollama: Ollama) -> None:
    tools = [FunctionTool.from_defaults(weather)]
    answer = ollama.chat_with_tools(tools, user_msg="Rain in Bonn?")
    (call,) = ollama.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": CITY})
    assert ollama.predict_and_call(tools, "Rain in Bonn?").response == f"rain in {CITY}"


def test_a_structured_answer_has_the_schema(ollama: Ollama) -> None:
    found = ollama.as_structured_llm(Weather).chat(ASK)
    assert isinstance(found.raw, Weather)


def test_an_index_is_built_and_asked(ollama: Ollama, vectors: OpenAILikeEmbedding) -> None:
    documents = [Document(text=text) for text in ("aaaa", "bbbb")]
    index = VectorStoreIndex.from_documents(documents, embed_model=vectors)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("bbb")
    assert found.text == "bbbb"
    answer = index.as_query_engine(llm=ollama, similarity_top_k=1).query("bbb?")
    assert str(answer) == ANSWER
