"""A server of safetensors models: text and vectors of a checkpoint, with room for one at a time."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hf_parts import write_base
from tests.serve_parts import Running, serving

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
TEXTS = ["def read(path):", "the cat sat", "x"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Running]:
    base = write_base(tmp_path_factory.mktemp("base"))
    words = (f"chat={checkpoint}", f"base={base}", "--embeddings", f"embed={checkpoint}",
             "--ram", "700MiB", "--ctx", "256", "-ub", "256", "--parallel", "2",
             "--kv", "q8_0")  # fmt: skip
    with serving(*words, home=tmp_path_factory.mktemp("home")) as running:
        running.wait_until_idle("chat")
        yield running


def test_an_unloaded_model_is_gone_before_the_next_one_comes(server: Running) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    status, answer, _ = server.ask("POST", CHAT, body)
    assert status == 200, answer
    first = server.worker_pids()
    status, answer, _ = server.ask("POST", EMBEDDINGS, {"model": "embed", "input": TEXTS})
    assert status == 200, answer
    vectors = [row["embedding"] for row in answer["data"]]
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * 3)
    assert len(server.worker_pids()) == 1
    assert server.worker_pids() != first
    kinds = [event["kind"] for event in server.events_until("ready", 2)]
    assert kinds.index("evicted") < len(kinds) - 1 == kinds.index("ready", kinds.index("ready") + 1)


def test_each_refuses_what_it_was_not_opened_for(server: Running) -> None:
    status, answer, _ = server.ask("POST", EMBEDDINGS, {"model": "chat", "input": "x"})
    assert status == 400, answer
    assert "served to write text" in answer["error"]["message"]


def test_a_model_saved_without_its_output_gives_vectors_and_writes_nothing(server: Running) -> None:
    status, answer, _ = server.ask("POST", EMBEDDINGS, {"model": "base", "input": TEXTS})
    assert status == 200, answer
    assert [math.hypot(*row["embedding"]) for row in answer["data"]] == pytest.approx([1.0] * 3)
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    status, answer, _ = server.ask("POST", CHAT, body)
    assert status == 400, answer
    assert "it writes no text" in answer["error"]["message"]
    status, shown, _ = server.ask("POST", "/api/show", {"model": "base"})
    assert (status, shown["capabilities"]) == (200, ["embedding"])


def test_it_is_not_called_a_gguf(server: Running) -> None:
    status, shown, _ = server.ask("POST", "/api/show", {"model": "chat"})
    assert (status, shown["details"]["format"]) == (200, "safetensors")
