"""The requests that Continue sends, shape by shape, each with the file it was read from.

Files are those of continuedev/continue; `{apiBase}` is `http://host:port/v1/`, or the bare address
for the providers `ollama` and `llama.cpp`.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve_parts import Running, changed_demo, serving

pytestmark = pytest.mark.engine
# packages/openai-adapters/src/apis/OpenAI.ts, getHeaders: an absent key is sent all the same
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "x-api-key": "",
    "Authorization": "Bearer undefined",
}
FILL = {
    f"tokenizer.ggml.fim_{name}_token_id": 3 + i for i, name in enumerate(("pre", "suf", "mid"))
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    coder = changed_demo(home / "coder.gguf", FILL)
    words = (f"qwen-coder={coder}", "--embeddings", "vectors=demo", "--ctx", "512")
    with serving(*words, home=home) as running:
        running.ask("POST", "/models/load", {"model": "qwen-coder"})
        yield running


def data(server: Running, path: str, body: Any) -> list[Any]:
    """The objects of a stream of events."""
    lines = server.lines(path, body)
    texts = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(text) for text in texts if text != "[DONE]"]


def test_chat(server: Running) -> None:
    """packages/openai-adapters/src/apis/OpenAI.ts, modifyChatBody"""
    chunks = data(
        server,
        "/v1/chat/completions",
        {
            "model": "qwen-coder",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "A list?"}]}],
            "max_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_autocomplete_as_a_completion(server: Running) -> None:
    """core/autocomplete/templating/AutocompleteTemplate.ts, through completionStream"""
    stops = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
             "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>",
             "/src/", "#- coding: utf-8", "```"]  # fmt: skip
    prompt = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n<|fim_middle|>"
    chunks = data(
        server,
        "/v1/completions",
        {"model": "qwen-coder", "prompt": prompt, "stop": stops, "max_tokens": 8, "stream": True},
    )
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert all(isinstance(chunk["choices"][0]["text"], str) for chunk in chunks)


def test_autocomplete_of_the_provider_ollama(server: Running) -> None:
    """core/llm/llms/Ollama.ts: `template` of /api/show has to have `.Suffix`"""
    shown = server.ask("POST", "/api/show", {"name": "qwen-coder"}, HEADERS)[1]
    assert ".Suffix" in shown["template"]
    assert "num_ctx 512" in shown["parameters"]
    body = {
        "model": "qwen-coder",
        "prompt": "def add(a, b):\n",
        "suffix": "\n",
        "raw": False,
        "options": {"num_predict": 8, "stop": ["\n\n"], "num_ctx": 512},
        "stream": True,
    }
    lines = [json.loads(line) for line in server.lines("/api/generate", body)]
    assert lines[-1]["done"]
    assert all("response" in line for line in lines)


def test_autocomplete_of_the_provider_llama_cpp(server: Running) -> None:
    """core/llm/llms/LlamaCpp.ts, _streamComplete"""
    body = {"prompt": "def add(", "stream": True, "n_predict": 8, "stop": ["\n\n"], "top_k": 40}
    chunks = data(server, "/completion", body)
    assert "".join(chunk["content"] for chunk in chunks)
    assert chunks[-1]["stop"] is True


def test_autocomplete_through_fim(server: Running) -> None:
    """packages/openai-adapters/src/apis/OpenAI.ts, fimStream"""
    chunks = data(
        server,
        "/v1/fim/completions",
        {"model": "qwen-coder", "prompt": "def add(", "suffix": "):\n", "max_tokens": 8,
         "temperature": 0, "stop": ["\n\n"], "stream": True},
    )  # fmt: skip
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_the_context_of_the_provider_vllm(server: Running) -> None:
    """core/llm/llms/Vllm.ts: the first model's `max_model_len`"""
    first = server.ask("GET", "/v1/models", headers=HEADERS)[1]["data"][0]
    assert (first["id"], first["max_model_len"]) == ("qwen-coder", 512)


def test_embeddings(server: Running) -> None:
    """core/llm/llms/OpenAI.ts, _embed: up to 128 texts at a time"""
    body = {"model": "vectors", "input": [f"text {i}" for i in range(32)]}
    status, found, _ = server.ask("POST", "/v1/embeddings", body, HEADERS)
    assert status == 200
    assert [item["index"] for item in found["data"]] == list(range(32))


def test_rerank_says_what_the_model_is_for(server: Running) -> None:
    """packages/openai-adapters/src/apis/OpenAI.ts, rerank"""
    body = {"model": "vectors", "query": "q", "documents": ["a", "b"], "top_k": 1}
    status, refusal, _ = server.ask("POST", "/v1/rerank", body, HEADERS)
    assert status == 400
    assert "does not rank" in refusal["error"]["message"]


def test_infill_takes_pieces_of_other_files(server: Running) -> None:
    """llama.vscode and llama.vim send this to llama-server's /infill"""
    body = {
        "input_prefix": "def add(",
        "input_suffix": "):\n",
        "input_extra": [{"filename": "other.py", "text": "import os\n"}],
        "prompt": "a",
        "n_predict": 8,
        "temperature": 0,
    }
    status, answer, _ = server.ask("POST", "/infill", body)
    assert status == 200
    assert answer["tokens_predicted"] == 8
    assert answer["content"]
