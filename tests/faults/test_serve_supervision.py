"""What a server makes of workers that die early, run out of memory or stop decoding, over HTTP."""

import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from loadmaster.interfaces.http import listen
from tests.serve_parts import Running, serving

CHAT = "/v1/chat/completions"


def body(text: str = "go on", **changes: Any) -> dict[str, Any]:
    fields = {"model": "demo", "messages": [{"role": "user", "content": text}], "temperature": 0}
    return {**fields, "stream": True, "max_tokens": 5, **changes}


def worker_of(server: Running) -> int:
    (worker,) = server.worker_pids()
    return worker


def test_a_stream_whose_prompt_was_still_read_goes_on_with_the_next_worker(tmp_path: Path) -> None:
    fault = {"fault": {"kind": "kill", "at_step": 5}}  # a step for each token of the first answer
    with serving("demo", "--probe", "0", home=tmp_path, fake=fault) as server:
        assert server.ask("POST", CHAT, body(stream=False, max_tokens=4))[0] == 200
        worker = worker_of(server)
        lines = [line for line in server.lines(CHAT, body("x" * 300, max_tokens=3)) if line]
        assert lines[-1] == "data: [DONE]"
        assert worker_of(server) != worker
        assert [event["kind"] for event in server.events_until("ready", 2)].count("crashed") == 1


def test_after_it_ran_out_of_memory_the_next_plan_is_smaller_and_says_so(tmp_path: Path) -> None:
    fake = {"fault": {"kind": "oom", "at_step": 3}}
    with serving("demo", home=tmp_path, fake=fake) as server:
        server.wait_until_idle("demo")
        before = planned(server)
        refused = server.ask("POST", CHAT, body(stream=False))
        assert refused[0] == 503
        assert "out of memory" in refused[1]["error"]["message"]
        server.wait_until_idle("demo")
        assert planned(server) < before
        assert any(
            "a tenth less memory for the engine, at most cpu" in event["text"]
            for event in server.events_until("ready", 2)
            if event["kind"] == "note"
        )


def planned(server: Running) -> int:
    rows = server.ask("GET", "/loadmaster/v1/models")[1]["models"]
    total: int = sum(rows[0]["planned_bytes"].values())
    return total


def test_an_idle_model_decodes_a_token_and_nobody_sees_it(tmp_path: Path) -> None:
    fault = {"fault": {"kind": "kill", "at_step": 3}}
    with serving("demo", "--probe", "0.2", home=tmp_path, fake=fault) as server:
        server.events_until("crashed")  # its third probe is the fault's third step
        answer = server.ask("GET", "/metrics")[1]
        assert 'requests_total{model="demo"' not in answer


def test_a_client_that_leaves_before_its_body_is_sent_is_no_defect(tmp_path: Path) -> None:
    with serving("demo", home=tmp_path, fake={}) as server:
        server.wait_until_idle("demo")
        half = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        half.sendall(head.encode() + b'{"model"')
        half.close()
        server.wait_until_idle("demo")
        server.ask("POST", "/models/unload", {"model": "demo"})
        found = server.events_until("unloaded")
        assert not [event for event in found if "defect" in event["text"]]


def test_a_shell_s_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: found.append(limits))
    listen._allow_connections()
    assert found == [(4096, 4096)]


def test_a_client_that_vanished_is_noticed_by_the_kernel() -> None:
    listener = listen.bind(listen.Listening(host="127.0.0.1", port=0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    with listener, client, server:
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        limit = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert limit == listen._TCP_LIMITS["TCP_USER_TIMEOUT"]
