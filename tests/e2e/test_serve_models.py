"""Many models under one budget, on the fake backend: who is loaded, who makes room."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve_parts import Running, serving

CHAT = "/v1/chat/completions"


def chat(server: Running, model: str) -> tuple[int, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    status, answer, _ = server.ask("POST", CHAT, body)
    return status, answer


def loaded(server: Running) -> list[str]:
    return [row["id"] for row in server.ask("GET", "/loadmaster/v1/models")[1]["models"]]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "loadmaster", *words], capture_output=True, text=True, timeout=60
    )


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
    events = [
        json.loads(line[6:])
        for line in _head(server, "/loadmaster/v1/events", 400)
        if line.startswith("data: ")
    ]
    evicted = [event["model"] for event in events if event["kind"] == "evicted"]
    assert evicted == ["two", "one"]


def _head(server: Running, path: str, n_lines: int) -> list[str]:
    import socket

    with socket.create_connection(("127.0.0.1", server.port), timeout=1) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with connection.makefile("r") as lines:
            found: list[str] = []
            try:
                while len(found) < n_lines:
                    found.append(lines.readline().rstrip("\n"))
            except TimeoutError:
                pass
            return found


def test_ps_and_stop_talk_to_the_server(server: Running) -> None:
    chat(server, "one")
    shown = run("ps", "--url", server.url)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].split()[:2] == ["NAME", "STATE"]
    assert any(
        line.split()[:2] == ["one", "ready"] and "× 256 " in line
        for line in shown.stdout.splitlines()
    )
    stopped = run("stop", "one", "--url", server.url, "--json")
    assert json.loads(stopped.stdout) == {"schema_version": 1, "model": "one", "was_loaded": True}
    assert "one" not in loaded(server)
    assert run("stop", "nine", "--url", server.url).returncode == 4


def test_launch_asks_the_server_for_its_models(server: Running) -> None:
    words = ("--port", str(server.port), "--json")
    value = json.loads(run("launch", "continue", "--autocomplete", "two", *words).stdout)
    assert value["text"].count("contextLength: 256") == 2
    assert f"apiBase: {server.url}/v1/" in value["text"]
    refused = run("launch", "opencode", "-m", "tow", *words)
    assert refused.returncode == 4
    assert "`two`" in refused.stderr + refused.stdout


def test_ps_without_a_server_says_how_to_start_one() -> None:
    asked = run("ps", "--url", "http://127.0.0.1:1")
    assert asked.returncode == 4
    assert "loadmaster serve" in asked.stderr


def test_a_model_that_does_not_fit_alone_is_refused_with_numbers(tmp_path: Path) -> None:
    with serving("small=demo", "--ram", "40MiB", home=tmp_path, fake={}) as server:
        assert server.process.wait(30) == 3


def test_idle_models_are_unloaded(tmp_path: Path) -> None:
    words = ("demo", "--keep-alive", "1s", "--ctx", "256")
    with serving(*words, home=tmp_path, fake={}) as server:
        server.wait_until_idle("demo")
        (worker,) = server.worker_pids()
        deadline = time.monotonic() + 10
        while loaded(server) or Path(f"/proc/{worker}").exists():
            assert time.monotonic() < deadline
        assert chat(server, "demo")[0] == 200


def test_a_port_in_use_says_by_whom(server: Running) -> None:
    second = run("serve", "demo", "--port", str(server.port), "--backend", "fake")
    assert second.returncode == 9
    assert f"(pid {server.process.pid})" in second.stderr


def test_another_bind_needs_a_key(tmp_path: Path) -> None:
    refused = run("serve", "demo", "--host", "0.0.0.0", "--port", "0", "--backend", "fake")
    assert refused.returncode == 2
    assert "--api-key-file" in refused.stderr
    key = tmp_path / "key"
    words = ("demo", "--host", "0.0.0.0", "--api-key-file", str(key), "--ctx", "256")
    with serving(*words, home=tmp_path, fake={}) as server:
        assert os.stat(key).st_mode & 0o777 == 0o600
        assert server.ask("GET", "/v1/models")[0] == 401
        header = {"authorization": f"Bearer {key.read_text().strip()}"}
        assert server.ask("GET", "/v1/models", headers=header)[0] == 200
        assert server.ask("GET", "/health")[0] == 200
