"""A server whose workers die, whose clients leave, and which is told to end."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from loadmaster.engine import watch
from tests.serve_parts import PATIENCE_S, Running, serving

CHAT = "/v1/chat/completions"
SLOW = {"tok_s": 50.0}  # an answer takes half a minute, a step 20 ms


def body(stream: bool = True, **changes: Any) -> dict[str, Any]:
    fields = {"model": "demo", "messages": [{"role": "user", "content": "go on"}]}
    return {**fields, "temperature": 0, "stream": stream, "max_tokens": 1500, **changes}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two sequences at a time, and two requests may wait."""
    home = tmp_path_factory.mktemp("home")
    with serving("demo", "--parallel", "2", "--queue", "2", home=home, fake=SLOW) as running:
        running.wait_until_idle("demo")
        yield running


class Stream:
    """A stream whose first text has come."""

    def __init__(self, server: Running) -> None:
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        self._connection.request("POST", CHAT, json.dumps(body()))
        self._response = self._connection.getresponse()
        while b'"content":"T' not in self._response.readline():
            pass

    def next_line(self) -> bytes:
        return self._response.readline()

    def rest(self) -> list[bytes]:
        """The data of its last events."""
        lines = [line[6:].strip() for line in self._response if line.startswith(b"data: ")]
        self.close()
        return lines

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def ask_and_wait(server: Running) -> HTTPConnection:
    """A request whose answer is not waited for here."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    connection.request("POST", CHAT, json.dumps(body(stream=False)))
    return connection


def row(server: Running) -> dict[str, Any]:
    """What `ps` shows of the model."""
    rows: list[dict[str, Any]] = server.ask("GET", "/loadmaster/v1/models")[1]["models"]
    return rows[0]


def wait_for(server: Running, **figures: int) -> None:
    """Until the row has these figures."""
    deadline = time.monotonic() + PATIENCE_S
    while any((found := row(server))[key] != value for key, value in figures.items()):
        assert time.monotonic() < deadline, found


def test_a_client_that_leaves_frees_its_sequence(slow: Running) -> None:
    streams = [Stream(slow) for _ in range(2)]
    assert row(slow)["n_running"] == 2
    before = slow.n_ended("cancelled"), slow.n_ended("length")
    for stream in streams:
        stream.close()
    slow.wait_until_idle("demo")
    assert (slow.n_ended("cancelled"), slow.n_ended("length")) == (before[0] + 2, before[1])


def test_a_client_that_leaves_the_queue_is_forgotten(slow: Running) -> None:
    streams = [Stream(slow) for _ in range(2)]
    waiting = ask_and_wait(slow)
    wait_for(slow, n_waiting=1)
    waiting.close()
    wait_for(slow, n_waiting=0, n_running=2)
    for stream in streams:
        assert stream.next_line()  # nobody else noticed
        stream.close()
    slow.wait_until_idle("demo")


def test_more_than_the_queue_takes_get_429(slow: Running) -> None:
    streams = [Stream(slow) for _ in range(2)]
    waiting = [ask_and_wait(slow) for _ in range(2)]
    wait_for(slow, n_waiting=2)
    status, refusal, headers = slow.ask("POST", CHAT, body())
    assert status == 429
    assert int(headers["retry-after"]) > 0
    assert refusal["error"]["code"] == "busy"
    for stream in streams:
        stream.close()
    for connection in waiting:
        connection.close()
    slow.wait_until_idle("demo")


def test_a_dead_worker_ends_streams_with_an_error_and_the_queue_survives(slow: Running) -> None:
    answers: list[tuple[int, Any, dict[str, str]]] = []
    streams = [Stream(slow) for _ in range(2)]
    queued = threading.Thread(
        target=lambda: answers.append(slow.ask("POST", CHAT, body(stream=False, max_tokens=5)))
    )
    queued.start()
    wait_for(slow, n_waiting=1)
    (worker,) = slow.worker_pids()
    killed = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    for stream in streams:
        data = stream.rest()
        assert b"[DONE]" not in data
        assert json.loads(data[-1])["error"]["code"] == "engine_crashed"
    assert time.monotonic() - killed < watch.FROZEN_S / 2  # by its death, not by its silence
    queued.join(PATIENCE_S)
    ((status, answer, _),) = answers
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 5
    (replaced,) = slow.worker_pids()
    assert replaced != worker


def test_after_three_deaths_the_model_stays_down_until_stopped(tmp_path: Path) -> None:
    fault = {"fault": {"kind": "kill", "at_step": 1}}
    with serving("demo", home=tmp_path, fake=fault) as server:
        server.wait_until_idle("demo")
        status, refusal, headers = server.ask("POST", CHAT, body(stream=False))
        assert status == 503  # it was begun anew once, and two workers died of it
        assert refusal["error"]["code"] == "engine_crashed"
        assert "retry-after" in headers
        server.wait_until_idle("demo")
        assert server.ask("POST", CHAT, body(stream=False))[1]["error"]["code"] == "model_failed"
        status, refusal, headers = server.ask("POST", CHAT, body(stream=False))
        assert (status, refusal["error"]["code"]) == (503, "model_failed")
        assert headers["x-should-retry"] == "false"
        assert server.ask("POST", "/models/unload", {"model": "demo"})[0] == 200
        assert server.ask("POST", "/models/load", {"model": "demo"})[0] == 200


def test_sigterm_lets_a_stream_end_and_takes_no_more(tmp_path: Path) -> None:
    with serving("demo", home=tmp_path, fake={"tok_s": 200.0, "eog_after": 200}) as server:
        stream = Stream(server)
        (worker,) = server.worker_pids()
        server.process.send_signal(signal.SIGTERM)
        assert stream.rest()[-1] == b"[DONE]"
        assert server.process.wait(PATIENCE_S) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_a_stream_that_outlasts_the_drain_ends_with_an_error(tmp_path: Path) -> None:
    with serving("demo", "--drain", "0.5", home=tmp_path, fake={"tok_s": 20.0}) as server:
        stream = Stream(server)
        server.process.send_signal(signal.SIGTERM)
        assert json.loads(stream.rest()[-1])["error"]["code"] == "shutting_down"
        assert server.process.wait(PATIENCE_S) == 0


def test_a_slow_reader_does_not_hold_up_another(slow: Running) -> None:
    lazy = socket.create_connection(("127.0.0.1", slow.port))
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    payload = json.dumps(body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    lazy.sendall(head.encode() + payload)
    status, answer, _ = slow.ask("POST", CHAT, body(stream=False, max_tokens=20))
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 20
    lazy.close()
    slow.wait_until_idle("demo")


CANARY = "canary-7f3a"


def test_no_prompt_is_in_what_the_server_says(tmp_path: Path) -> None:
    fault = {"fault": {"kind": "abort", "at_step": 3}}
    with serving("demo", "--debug", home=tmp_path, fake=fault) as server:
        server.wait_until_idle("demo")
        asked = body(stream=False, messages=[{"role": "user", "content": CANARY}])
        assert server.ask("POST", CHAT, {**asked, "max_tokens": 1})[0] == 200
        assert server.ask("POST", CHAT, asked)[0] == 503
        assert server.ask("POST", CHAT, {**asked, "n": 99, "user": CANARY})[0] == 400
        assert server.ask("GET", f"/{CANARY}")[0] == 404
        for path in ("/metrics", "/loadmaster/v1/models", "/loadmaster/v1/memory"):
            assert CANARY not in str(server.ask("GET", path)[1])
        server.process.send_signal(signal.SIGTERM)
        said = server.process.communicate(timeout=PATIENCE_S)
    assert CANARY not in "".join(said)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or CANARY not in file.read_bytes().decode("latin-1")
