"""What clients get wrong, over a socket: each is refused with what, how much and what to do."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli_parts import in_own_process
from tests.serve_parts import PATIENCE_S, Running, serving

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ASK = [{"role": "user", "content": "x"}]
N_CTX = 256
LONG = "word " * 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    words = ("demo", "--embeddings", "vectors=demo", "--ctx", str(N_CTX))
    with serving(*words, home=tmp_path_factory.mktemp("home"), fake={"eog_after": 8}) as running:
        yield running


def refused(server: Running, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    for _ in range(50):
        found, answer, _ = server.ask("POST", path, body)
        if found != 200:
            break
        assert body["stream"], answer  # on a busy machine it had to begin, and says the error then
        assert '{"error":' in answer
    assert found == status, answer
    error: dict[str, Any] = answer["error"]
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
        (CHAT, {"messages": [{"role": "user", "content": LONG}], "stream": True}),
        (COMPLETIONS, {"prompt": LONG}),
        (COMPLETIONS, {"prompt": [1] * 400}),
        ("/v1/responses", {"input": LONG}),
        ("/completion", {"prompt": LONG}),
    ],
)
def test_a_prompt_longer_than_the_context_names_both_numbers(
    server: Running, path: str, body: Any
) -> None:
    before = prefilled(server)
    error = refused(server, path, {"model": "demo", **body})
    assert error["code"] == "context_length_exceeded"
    assert error["numbers"]["n_ctx"] == N_CTX
    assert error["numbers"]["n_prompt"] > N_CTX
    assert str(N_CTX) in error["message"]
    assert prefilled(server) == before  # not a token of it was read


def prefilled(server: Running) -> list[str]:
    lines = server.ask("GET", "/metrics")[1].splitlines()
    return [line for line in lines if line.startswith("loadmaster_prompt_tokens_total")]


def test_the_same_in_the_forms_of_other_clients(server: Running) -> None:
    messages = [{"role": "user", "content": LONG}]
    status, answer, _ = server.ask("POST", "/api/chat", {"model": "demo", "messages": messages})
    assert (status, str(N_CTX) in answer["error"]) == (400, True)
    body = {"model": "demo", "messages": messages, "max_tokens": 4}
    status, answer, _ = server.ask("POST", "/v1/messages", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert str(N_CTX) in answer["error"]["message"]


def test_a_text_longer_than_an_embedder_takes(server: Running) -> None:
    error = refused(server, EMBEDDINGS, {"model": "vectors", "input": ["short", LONG]})
    assert error["code"] == "context_length_exceeded"
    assert error["numbers"]["n_prompt"] > error["numbers"]["n_ctx"]


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2, 3], [4]]])
def test_token_ids_for_embeddings_name_the_clients_switch(server: Running, tokens: Any) -> None:
    error = refused(server, EMBEDDINGS, {"model": "vectors", "input": tokens})
    assert error["param"] == "input"
    assert "check_embedding_ctx_length=False" in error["message"]


def test_an_unknown_field_is_ignored(server: Running) -> None:
    body = {"model": "demo", "messages": ASK, "user": "me", "safety_identifier": 1, "options": {}}
    assert server.ask("POST", CHAT, body)[0] == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "web_search_options", {"a": 1}),
        (CHAT, "prediction", {"type": "content", "content": "x"}),
        (CHAT, "temperature", 3),
        (CHAT, "max_tokens", "many"),
        (CHAT, "top_logprobs", 50),
        (CHAT, "n", 9),
        (CHAT, "n", 1000),
        ("/v1/responses", "previous_response_id", "resp_1"),
        ("/v1/responses", "background", True),
        ("/completion", "grammar", "root ::= [0-9]"),
    ],
)
def test_a_field_that_would_change_the_answer_is_named(
    server: Running, path: str, field: str, value: Any
) -> None:
    said: dict[str, Any] = {"messages": ASK, "input": "x", "prompt": "x"}
    error = refused(server, path, {"model": "demo", **said, field: value})
    assert error["param"] == field
    assert field in error["message"]


def test_an_image_is_named_by_its_place(server: Running) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    content = [{"type": "text", "text": "what is this?"}, image]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}]}
    error = refused(server, CHAT, body)
    assert error["param"] == "messages[0].content[1].type"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "string", "pattern": "("},
        {"$ref": "https://example.com/schema.json"},
    ],
)
def test_an_invalid_schema_is_the_clients_error(server: Running, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for stream in (False, True):
        body = {"model": "demo", "messages": ASK, "response_format": wanted, "stream": stream}
        error = refused(server, CHAT, body)
        assert "schema" in error["message"]
    assert server.ask("POST", CHAT, {"model": "demo", "messages": ASK})[0] == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, "/api/chat", "/v1/messages"])
@pytest.mark.parametrize(
    "body", [b'{"model": "demo", "prompt": "\xff\xfe"}', b"\xff", b'{"model": "demo"', b"", b"[]"]
)
def test_what_is_no_json_in_utf_8_is_the_clients_error(
    server: Running, path: str, body: bytes
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body)
        assert connection.makefile("rb").readline().split()[1] == b"400"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, "/v1/responses"])
def test_an_unknown_model_is_404_with_the_nearest_names(server: Running, path: str) -> None:
    said: dict[str, Any] = {"messages": ASK, "input": "x", "prompt": "x"}
    for stream in (False, True):
        error = refused(server, path, {"model": "dmo", "stream": stream, **said}, 404)
        assert error["code"] == "model_not_found"
        assert "`demo`" in error["message"]


def test_a_stream_of_a_model_that_loads_begins_with_pings(tmp_path: Path) -> None:
    """Headers and a ping come while it loads; a request that does not stream waits."""
    fake = {"load_s": 8.0, "eog_after": 8}  # pings begin after 3
    with serving("--ctx", "256", home=tmp_path, fake=fake) as server:
        whole: list[int] = []
        body = {"model": "demo", "messages": ASK}
        waiting = threading.Thread(
            target=lambda: whole.append(server.ask("POST", CHAT, body)[0])
        )  # fmt: skip
        waiting.start()
        lines = server.lines(CHAT, {**body, "stream": True})
        assert next(lines) == ": ping"
        rows = server.ask("GET", "/loadmaster/v1/models")[1]["models"]
        assert [row["state"] for row in rows] == ["loading"]
        data = [line for line in lines if line.startswith("data: ")]
        assert data[-1] == "data: [DONE]"
        waiting.join(PATIENCE_S)
        assert whole == [200]


def test_a_port_in_use_says_by_whom(server: Running) -> None:
    words = ("serve", "demo", "--port", str(server.port), "--backend", "fake", "--json")
    code, _, err = in_own_process(*words)
    assert code == 9
    assert f"port {server.port} is in use by" in err
    assert f"(pid {server.process.pid})" in err
    assert f"--port {server.port + 1}" in err


def test_nothing_of_this_was_an_error_of_the_server(server: Running) -> None:
    """Last in the file: the worker that took all of it is still the first one."""
    row = server.wait_until_idle("demo")
    assert row["state"] == "ready"
    deaths = server.ask("GET", "/metrics")[1].split("loadmaster_deaths_total{")[1]
    assert deaths.splitlines()[0].rpartition(" ")[2] == "0"
    assert json.dumps(row)
