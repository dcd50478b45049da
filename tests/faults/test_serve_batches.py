"""Batches of a server that is killed, told to end, short of disk, or asked by people meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.e2e.test_serve_batches import answers, chat, start, until_done, until_end
from tests.openai_parts import openai_client
from tests.serve_parts import PATIENCE_S, Running, serving

SLOW = {"tok_s": 200.0}
FAST = {"tok_s": 4000.0}


def command(home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "loadmaster", "batch", *words],
        env={**os.environ, "LOADMASTER_HOME": str(home)},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def read_first_text(client: OpenAI) -> None:
    """What a person does: ask, and see an answer begin."""
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "go on"}], max_tokens=4, stream=True
    )
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in stream)
    stream.close()


def row(server: Running) -> Any:
    return server.ask("GET", "/loadmaster/v1/models")[1]["models"][0]


def until_items(server: Running, n_items: int) -> None:
    """Until so many items of jobs are in flight."""
    deadline = time.monotonic() + PATIENCE_S
    while row(server)["n_items"] < n_items:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_server_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    items = [chat(n, max_tokens=30) for n in range(60)]
    with serving("demo", home=tmp_path, fake=SLOW) as server, openai_client(server) as client:
        batch = start(client, items)
        until_done(client, batch.id, 4)
        assert client.files.delete(batch.input_file_id).deleted  # the job has its lines
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    seen = json.loads(command(tmp_path, "list", "--json").stdout)
    assert batch.id in json.dumps(seen)
    assert "interrupted" in json.dumps(seen)
    with serving("demo", home=tmp_path, fake=FAST) as server, openai_client(server) as client:
        again = client.batches.retrieve(batch.id)
        assert again.status in ("in_progress", "finalizing", "completed")  # without being asked
        assert again.request_counts is not None
        assert again.request_counts.completed >= 4
        ended = until_end(client, batch.id)
        assert ended.status == "completed"
        found = answers(client, ended.output_file_id)
        assert sorted(found) == sorted(item["custom_id"] for item in items)
    shown = command(tmp_path, "results", batch.id)
    assert len(shown.stdout.splitlines()) == len(items)


def test_a_server_that_is_told_to_end_leaves_the_job_to_the_command_line(tmp_path: Path) -> None:
    items = [chat(n, max_tokens=30) for n in range(40)]
    with serving("demo", home=tmp_path, fake=SLOW) as server, openai_client(server) as client:
        batch = start(client, items)
        until_done(client, batch.id, 2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
    status = json.loads(command(tmp_path, "status", batch.id, "--json").stdout)
    assert "stopped" in json.dumps(status)
    assert status["counts"]["left"] > 0  # it did not wait for all of them
    assert command(tmp_path, "resume", batch.id, "-q").returncode == 0
    with serving("demo", home=tmp_path, fake=FAST) as server, openai_client(server) as client:
        ended = until_end(client, batch.id)
        assert ended.status == "completed"
        assert len(answers(client, ended.output_file_id)) == len(items)


def test_people_go_first(tmp_path: Path) -> None:
    """All sequences are taken by items of 18 seconds; a person waits for a step, not for them."""
    items = [chat(n, max_tokens=900) for n in range(40)]
    words = ("demo", "--parallel", "2")
    fake = {"tok_s": 50.0}
    with serving(*words, home=tmp_path, fake=fake) as server, openai_client(server) as client:
        batch = start(client, items)
        until_items(server, 4)
        for _ in range(3):
            read_first_text(client)
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert counts.completed == 0
        until_items(server, 2)
        assert client.batches.cancel(batch.id).status == "cancelling"
        ended = until_end(client, batch.id)
        assert ended.status == "cancelled"
        assert ended.cancelling_at is not None
        counts = ended.request_counts
        assert counts is not None
        assert counts.total == 40
        assert counts.completed < 40
        if counts.completed:
            assert len(answers(client, ended.output_file_id)) == counts.completed


def test_a_worker_that_dies_costs_no_result_and_the_model_stays_up(tmp_path: Path) -> None:
    items = [chat(n, max_tokens=10) for n in range(120)]
    with serving("demo", home=tmp_path, fake=SLOW) as server, openai_client(server) as client:
        batch = start(client, items)
        n_done = 0
        for _ in range(3):  # far apart: a suspect that is alone at two deaths is guilty
            n_done = until_done(client, batch.id, n_done + 12)
            for pid in server.worker_pids():
                os.kill(pid, signal.SIGKILL)
        ended = until_end(client, batch.id)
        assert ended.status == "completed"
        assert sorted(answers(client, ended.output_file_id)) == sorted(
            i["custom_id"] for i in items
        )
        read_first_text(client)


def test_an_item_that_kills_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    items = [chat(n) for n in range(12)]
    items[7]["body"]["messages"][0]["content"] = "poison"
    fake = {**FAST, "poison": "poison"}
    with serving("demo", home=tmp_path, fake=fake) as server, openai_client(server) as client:
        ended = until_end(client, start(client, items).id)
        assert ended.status == "completed"
        assert len(answers(client, ended.output_file_id)) == 11
        failed = answers(client, ended.error_file_id)
        assert failed["r7"]["error"]["code"] == "engine_crashed"
        read_first_text(client)


def test_a_window_that_closes_expires_what_is_left(tmp_path: Path) -> None:
    items = [chat(n, max_tokens=60) for n in range(200)]
    with serving("demo", home=tmp_path, fake=SLOW) as server, openai_client(server) as client:
        batch = start(client, items, completion_window="3s")
        ended = until_end(client, batch.id)
        assert ended.status == "expired"
        assert ended.expired_at is not None
        late = answers(client, ended.error_file_id)
        assert {line["error"]["code"] for line in late.values()} == {"batch_expired"}
        done = answers(client, ended.output_file_id) if ended.output_file_id else {}
        assert len(done) + len(late) == 200
        assert not set(done) & set(late)


def test_a_job_is_worked_on_by_one_server_at_a_time(tmp_path: Path) -> None:
    items = [chat(n, max_tokens=20) for n in range(100)]
    first = serving("demo", home=tmp_path, fake=SLOW)
    second = serving("demo", home=tmp_path, fake=FAST)
    with first as one, second as two, openai_client(one) as client, openai_client(two) as other:
        batch = start(client, items)
        until_done(client, batch.id, 2)
        assert other.batches.retrieve(batch.id).status == "in_progress"
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        later = serving("demo", home=tmp_path, fake=FAST)
        with later as three, openai_client(three) as last:
            ended = until_end(last, batch.id)
            assert len(answers(last, ended.output_file_id)) == len(items)
            assert other.batches.retrieve(batch.id).status == "completed"
