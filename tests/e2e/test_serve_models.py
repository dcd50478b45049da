"""Many models under one budget, on the fake backend: who is loaded, who makes room."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli_parts import Run, in_own_process
from tests.serve_parts import PATIENCE_S, Running, serving

CHAT = "/v1/chat/completions"


def chat(server: Running, model: str) -> tuple[int, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    status, answer, _ = server.ask("POST", CHAT, body)
    return status, answer


def loaded(server: Running) -> list[str]:
    return [row["id"] for row in server.ask("GET", "/loadmaster/v1/models")[1]["models"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Room for two of three models: each takes about 110 MiB."""
    home = tmp_path_factory.mktemp("home")
    words = ("one=demo", "two=demo", "three=demo", "--ram", "256MiB", "--ctx", "256")
    with serving(*words, home=home, fake={}) as running:
        running.wait_until_idle("one")
        yield running


def test_what_does_not_fit_takes_the_place_of_the_least_recently_used(server: Running) -> None:
    assert loaded(server) == ["one"]
    for model in ("two", "one", "three"):
        assert chat(server, model)[0] == 200
    assert loaded(server) == ["one", "three"]
    assert len(server.worker_pids()) == 2
    assert chat(server, "two")[0] == 200
    assert loaded(server) == ["two", "three"]
    events = server.events_until("evicted", 2)
    assert [event["model"] for event in events if event["kind"] == "evicted"] == ["two", "one"]


def test_ps_and_stop_talk_to_the_server(run: Run, server: Running) -> None:
    chat(server, "one")
    code, out, err = run("ps", "--url", server.url)
    assert code == 0, err
    head, *rows = [line.split() for line in out.splitlines()]
    assert head[:2] == ["NAME", "STATE"]
    assert any(row[:2] == ["one", "ready"] and "×" in row and "256" in row for row in rows)
    _, out, _ = run("stop", "one", "--url", server.url, "--json")
    assert json.loads(out) == {"schema_version": 1, "model": "one", "was_loaded": True}
    assert "one" not in loaded(server)
    assert run("stop", "nine", "--url", server.url)[0] == 4


def test_launch_asks_the_server_for_its_models(run: Run, server: Running) -> None:
    words = ("--port", str(server.port), "--json")
    value = json.loads(run("launch", "continue", "--autocomplete", "two", *words)[1])
    assert value["text"].count("contextLength: 256") == 2
    assert f"apiBase: {server.url}/v1/" in value["text"]
    code, out, err = run("launch", "opencode", "-m", "tow", *words)
    assert code == 4
    assert "`two`" in out + err


def test_ps_without_a_server_says_how_to_start_one(run: Run) -> None:
    code, _, err = run("ps", "--url", "http://127.0.0.1:1")
    assert code == 4
    assert "loadmaster serve" in err


def test_a_model_that_does_not_fit_alone_is_refused_with_numbers(tmp_path: Path) -> None:
    with serving("small=demo", "--ram", "40MiB", home=tmp_path, fake={}) as server:
        assert server.process.wait(PATIENCE_S) == 3


def test_idle_models_are_unloaded(tmp_path: Path) -> None:
    words = ("demo", "--keep-alive", "1s", "--ctx", "256")
    with serving(*words, home=tmp_path, fake={}) as server:
        kinds = [event["kind"] for event in server.events_until("unloaded")]
        assert kinds.count("ready") == 1
        assert (loaded(server), server.worker_pids()) == ([], [])
        assert chat(server, "demo")[0] == 200


def test_another_bind_needs_a_key(tmp_path: Path) -> None:
    words: tuple[str, ...] = ("serve", "demo", "--host", "0.0.0.0", "--port", "0")
    code, _, err = in_own_process(*words, "--backend", "fake")
    assert code == 2
    assert "--api-key-file" in err
    key = tmp_path / "key"
    words = ("demo", "--host", "0.0.0.0", "--api-key-file", str(key), "--ctx", "256")
    with serving(*words, home=tmp_path, fake={}) as server:
        assert os.stat(key).st_mode & 0o777 == 0o600
        assert server.ask("GET", "/v1/models")[0] == 401
        header = {"authorization": f"Bearer {key.read_text().strip()}"}
        assert server.ask("GET", "/v1/models", headers=header)[0] == 200
        assert server.ask("GET", "/health")[0] == 200
