"""The requests that Continue sends, shape by shape, each with the file it was read from.

Files are those of continuedev/continue, at the commits named; `{apiBase}` is
`http://host:port/v1/`, or the bare address for the providers `ollama`, `llama.cpp` and `vllm`.

1. chat, edit, apply    packages/openai-adapters/src/apis/OpenAI.ts @ 5466c8a5
                        core/llm/openaiTypeConverters.ts @ 0228b897 (tools)
2. autocomplete         core/autocomplete/templating/AutocompleteTemplate.ts @ 3d08fc96
                        core/autocomplete/CompletionProvider.ts @ 3a156a86 (the temperature)
3. ollama               core/llm/llms/Ollama.ts @ 94a53516
4. llama.cpp            core/llm/llms/LlamaCpp.ts @ b9fbdb23
5. fill in the middle   packages/openai-adapters/src/apis/OpenAI.ts @ 5466c8a5,
                        core/llm/llms/OpenAI.ts @ 732eb248 (mistral, deepseek, siliconflow …)
6. vllm                 core/llm/llms/Vllm.ts @ 040f21cd
7. embeddings           core/llm/llms/OpenAI.ts @ 732eb248
8. rerank               packages/openai-adapters/src/apis/OpenAI.ts @ 5466c8a5, core/llm/index.ts
                        @ 1e39df36 (`data`), core/llm/llms/Vllm.ts @ 040f21cd (`results`)
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve_parts import TOOL_TEMPLATE, Running, changed_demo, serving

pytestmark = pytest.mark.engine
# packages/openai-adapters/src/apis/OpenAI.ts: an absent key is sent all the same
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "x-api-key": "",
    "Authorization": "Bearer undefined",
}
COLD = 0.01  # of autocomplete, where the user sets none; a chat has none then
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
    reason = chunks[-2]["choices"][0]["finish_reason"]
    n_tokens = chunks[-1]["usage"]["completion_tokens"]
    # No seed is sent: the model may end its answer before the eighth token.
    assert (reason, n_tokens) == ("length", 8) or (reason == "stop" and 0 < n_tokens <= 8)


def test_autocomplete_as_a_completion(server: Running) -> None:
    """core/autocomplete/templating/AutocompleteTemplate.ts, through completionStream"""
    stops = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
             "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>",
             "/src/", "#- coding: utf-8", "```"]  # fmt: skip
    prompt = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n<|fim_middle|>"
    chunks = data(
        server,
        "/v1/completions",
        {"model": "qwen-coder", "prompt": prompt, "stop": stops, "max_tokens": 8, "stream": True,
         "temperature": COLD},
    )  # fmt: skip
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
        "options": {"num_predict": 8, "stop": ["\n\n"], "num_ctx": 512, "temperature": COLD},
        "stream": True,
    }
    lines = [json.loads(line) for line in server.lines("/api/generate", body)]
    assert lines[-1]["done"]
    assert all("response" in line for line in lines)


def test_autocomplete_of_the_provider_ollama_in_one_prompt(server: Running) -> None:
    """core/llm/llms/Ollama.ts, _getGenerateOptions: `promptOnly` leaves no suffix"""
    body = {
        "model": "qwen-coder",
        "prompt": "<|repo_name|>r\n<|fim_prefix|>def add(<|fim_suffix|>):\n<|fim_middle|>",
        "raw": True,
        "options": {"num_predict": 8, "stop": ["<|endoftext|>"], "mirostat": None, "min_p": 0.1,
                    "temperature": COLD},
        "keep_alive": 1800,
        "stream": True,
    }  # fmt: skip
    lines = [json.loads(line) for line in server.lines("/api/generate", body)]
    assert lines[-1]["done"]
    assert "".join(line["response"] for line in lines)


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_autocomplete_of_the_provider_llama_cpp(server: Running, path: str) -> None:
    """core/llm/llms/LlamaCpp.ts, _streamComplete"""
    body = {"prompt": "def add(", "stream": True, "n_predict": 8, "stop": ["\n\n"], "top_k": 40,
            "temperature": COLD}  # fmt: skip
    chunks = data(server, path, body)
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
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)  # each has one


def test_the_context_of_the_provider_vllm(server: Running) -> None:
    """core/llm/llms/Vllm.ts, _setupCompletionOptions: the first model's `max_model_len`"""
    for path in ("/v1/models", "/models"):
        first = server.ask("GET", path, headers=HEADERS)[1]["data"][0]
        assert (first["id"], first["max_model_len"]) == ("qwen-coder", 512)


def test_embeddings(server: Running) -> None:
    """core/llm/llms/OpenAI.ts, _embed: up to 128 texts at a time"""
    body = {"model": "vectors", "input": [f"text {i}" for i in range(32)]}
    status, found, _ = server.ask("POST", "/v1/embeddings", body, HEADERS)
    assert status == 200
    assert [item["index"] for item in found["data"]] == list(range(32))
    texts = {"model": "vectors", "input": body["input"]}
    status, found, _ = server.ask("POST", "/api/embed", texts)  # core/llm/llms/Ollama.ts, _embed
    assert (status, len(found["embeddings"])) == (200, 32)


def test_rerank_says_what_the_model_is_for(server: Running) -> None:
    """packages/openai-adapters/src/apis/OpenAI.ts, rerank, of a model that has no ranks"""
    body = {"model": "vectors", "query": "q", "documents": ["a", "b"], "top_k": 1}
    status, refusal, _ = server.ask("POST", "/v1/rerank", body, HEADERS)
    assert status == 400
    assert "does not rank" in refusal["error"]["message"]


CALL = '{"name": "read_file", "arguments": {"path": "a.py"}}'
ANSWER = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """What the packaged model cannot do: a fake one that calls a tool, and one that ranks."""
    home = tmp_path_factory.mktemp("others")
    agent = changed_demo(home / "agent.gguf", {"tokenizer.chat_template": TOOL_TEMPLATE})
    ranker = changed_demo(home / "ranker.gguf", {"llama.pooling_type": 4})
    fake = {"answer": ANSWER, "eog_after": len(ANSWER)}
    words = (f"agent={agent}", f"ranker={ranker}", "--ctx", "1024")
    with serving(*words, home=home, fake=fake) as running:
        yield running


def test_an_agent_calls_a_tool_and_goes_on(others: Running) -> None:
    """core/llm/openaiTypeConverters.ts, toChatBody and fromChatCompletionChunk"""
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    function = {"name": "read_file", "description": "Reads.", "parameters": parameters}
    tool = {"type": "function", "function": {**function, "strict": False}}
    called = {"name": "read_file", "arguments": '{"path": "b.py"}'}
    body = {
        "model": "agent",
        "messages": [
            {"role": "system", "content": "You have tools."},
            {"role": "user", "content": "Read b.py, then a.py."},
            {"role": "assistant", "content": " ",
             "tool_calls": [{"id": "call_1", "type": "function", "function": called}]},
            {"role": "tool", "content": "import os", "tool_call_id": "call_1"},
        ],
        "tools": [tool], "parallel_tool_calls": False, "temperature": 0, "stream": True,
    }  # fmt: skip
    chunks = data(others, "/v1/chat/completions", body)
    calls = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", ())]
    assert all("function" in call for call in calls)  # it is read of every one, unseen
    assert calls[0]["function"]["name"] == "read_file"
    text = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(text) == {"path": "a.py"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_agent_of_the_provider_ollama(others: Running) -> None:
    """core/llm/llms/Ollama.ts, _streamChat: tools go without a stream"""
    shown = others.ask("POST", "/api/show", {"name": "agent"}, HEADERS)[1]
    assert "tools" in shown["capabilities"]
    function = {"name": "read_file", "description": "Reads.", "parameters": {"type": "object"}}
    body = {
        "model": "agent",
        "messages": [{"role": "user", "content": "Read a.py."}],
        "tools": [{"type": "function", "function": function}],
        "options": {"temperature": 0, "num_ctx": 1024},
        "keep_alive": 1800,
        "stream": False,
    }
    status, answer, _ = others.ask("POST", "/api/chat", body, HEADERS)
    assert status == 200
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "read_file", "arguments": {"path": "a.py"}}


def test_rerank_scores_every_document(others: Running) -> None:
    """core/llm/index.ts and core/llm/llms/Vllm.ts, rerank: `data` or `results`"""
    body = {"model": "ranker", "query": "abc", "documents": ["xyz", "abc", "ab"]}
    for path in ("/v1/rerank", "/rerank"):
        status, found, _ = others.ask("POST", path, body, HEADERS)
        assert status == 200
        for name in ("data", "results"):
            scores = sorted((item["index"], item["relevance_score"]) for item in found[name])
            assert [index for index, _ in scores] == [0, 1, 2]
            assert scores[1][1] > scores[2][1] > scores[0][1]


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
    assert 0 < answer["tokens_predicted"] <= 8
    assert answer["content"]
