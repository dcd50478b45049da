"""Ollama's own client, unmodified, against a server on the fake backend."""

from collections.abc import Iterator

import ollama
import pytest

from tests.serve_parts import Running, serving

ASK = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    words = ("demo", "--embeddings", "vectors=demo", "--ctx", "256")
    with serving(*words, home=home, fake={"eog_after": 24}) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[ollama.Client]:
    one = ollama.Client(host=server.url)
    yield one
    one._client.close()


def test_models_are_listed_and_shown(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == ["demo", "vectors"]
    shown = client.show("demo")
    assert shown.details is not None
    assert shown.details.format == "gguf"
    assert shown.capabilities == ["completion"]
    assert client.show("vectors").capabilities == ["embedding"]


def test_chat_is_the_same_whole_and_streamed(client: ollama.Client) -> None:
    options = {"temperature": 0, "num_ctx": 4096}
    whole = client.chat("demo", ASK, options=options)
    assert whole.message.content
    assert whole.done_reason == "stop"
    assert whole.eval_count == 25
    lines = list(client.chat("demo", ASK, options=options, stream=True))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]


def test_generate_takes_a_prompt_raw_or_as_a_message(client: ollama.Client) -> None:
    options = {"num_predict": 5}
    message = client.generate("demo", "Say something.", options=options)
    raw = client.generate("demo", "Say something.", options=options, raw=True)
    assert message.done_reason == raw.done_reason == "length"
    assert raw.prompt_eval_count == len("Say something.")
    assert (message.prompt_eval_count or 0) > len("Say something.")


def test_embed_gives_a_vector_for_each_text(client: ollama.Client) -> None:
    found = client.embed("vectors", ["one", "two"])
    assert len(found.embeddings) == 2
    assert found.prompt_eval_count == 6


def test_an_empty_prompt_loads_and_keep_alive_0_unloads(client: ollama.Client) -> None:
    assert client.generate("demo").done_reason == "load"
    assert [model.model for model in client.ps().models if model.model == "demo"] == ["demo"]
    assert client.generate("demo", keep_alive=0).done_reason == "unload"
    assert [model.model for model in client.ps().models if model.model == "demo"] == []


def test_errors_are_texts(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="there is `demo`") as refusal:
        client.chat("dmo", ASK)
    assert refusal.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="n_ctx is 256"):
        client.generate("demo", "x" * 400, raw=True)
