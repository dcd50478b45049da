"""Files and batches with OpenAI's own client, unmodified, against real servers."""

import io
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.openai_parts import openai_client
from tests.serve_parts import PATIENCE_S, Running, serving

ENDS = ("completed", "failed", "cancelled", "expired")
FAST = {"tok_s": 4000.0}


def chat(number: int, model: str = "demo", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {number}?"}]
    body = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0, **fields}
    return {
        "custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body
    }  # fmt: skip


def lines(items: Iterable[Any]) -> io.BytesIO:
    return io.BytesIO("".join(f"{json.dumps(item)}\n" for item in items).encode())


def start(client: OpenAI, items: Iterable[Any], **fields: Any) -> Batch:
    made = client.files.create(file=("in.jsonl", lines(items)), purpose="batch")
    order: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return client.batches.create(input_file_id=made.id, **{**order, **fields})


def until_end(client: OpenAI, batch_id: str) -> Batch:
    deadline = time.monotonic() + PATIENCE_S
    while (batch := client.batches.retrieve(batch_id)).status not in ENDS:
        assert time.monotonic() < deadline, (batch.status, batch.request_counts)
        time.sleep(0.05)
    return batch


def until_done(client: OpenAI, batch_id: str, n_done: int) -> int:
    """Until so many items are done; how many are."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        counts = client.batches.retrieve(batch_id).request_counts
        if counts and counts.completed >= n_done:
            return counts.completed
        assert time.monotonic() < deadline, counts
        time.sleep(0.02)


def answers(client: OpenAI, file_id: str | None) -> dict[str, Any]:
    """Lines of a file of a batch, by their ids; no id has two."""
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {line["custom_id"]: line for line in found}
    assert len(by_id) == len(found)
    return by_id


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    words = ("demo", "--embeddings", "vectors=demo", "--parallel", "4", "--ctx", "512")
    with serving(*words, home=home, fake=FAST) as running:
        yield running


def test_a_batch_from_upload_to_answers(client: OpenAI) -> None:
    made = client.files.create(file=("in.jsonl", lines(map(chat, range(12)))), purpose="batch")
    assert (made.filename, made.status, made.purpose) == ("in.jsonl", "processed", "batch")
    assert client.files.retrieve(made.id) == made
    assert made in list(client.files.list(purpose="batch"))
    batch = client.batches.create(
        input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h",
        metadata={"night": "first"},
    )  # fmt: skip
    assert (batch.status, batch.metadata) == ("validating", {"night": "first"})
    ended = until_end(client, batch.id)
    assert ended.status == "completed"
    assert ended.errors is None
    counts = ended.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (12, 12, 0)
    assert ended.usage is not None
    assert ended.usage.output_tokens == 12 * 6
    times = [ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at]
    assert times == sorted(times, key=lambda value: value or 0)
    found = answers(client, ended.output_file_id)
    assert sorted(found) == sorted(f"r{n}" for n in range(12))
    response = found["r3"]["response"]
    assert response["status_code"] == 200
    assert response["body"]["model"] == "demo"
    assert response["body"]["choices"][0]["message"]["content"]
    assert ended.error_file_id is None
    output = client.files.retrieve(ended.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert ended.id in [one.id for one in client.batches.list(limit=5)]
    assert client.files.delete(output.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(output.id)


def test_pages_of_batches_follow_one_another(client: OpenAI) -> None:
    made = [start(client, [chat(n)]).id for n in range(3)]
    seen = [one.id for one in client.batches.list(limit=1)]  # the client asks for the next pages
    assert set(made) <= set(seen)
    assert len(seen) == len(set(seen))
    for batch_id in made:
        until_end(client, batch_id)


def test_items_that_fail_are_in_a_file_of_their_own(client: OpenAI) -> None:
    long = chat(1)
    long["body"]["messages"][0]["content"] = "word " * 3000
    ended = until_end(client, start(client, [chat(0), long, chat(2)]).id)
    assert ended.status == "completed"
    counts = ended.request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (2, 1)
    assert sorted(answers(client, ended.output_file_id)) == ["r0", "r2"]
    failed = answers(client, ended.error_file_id)["r1"]
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_embeddings(client: OpenAI) -> None:
    items = [
        {
            "custom_id": f"e{n}", "method": "POST", "url": "/v1/embeddings",
            "body": {"model": "vectors", "input": ["one text", f"text {n}"]},
        }
        for n in range(20)
    ]  # fmt: skip
    ended = until_end(client, start(client, items, endpoint="/v1/embeddings").id)
    assert ended.status == "completed"
    found = answers(client, ended.output_file_id)
    assert len(found) == 20
    vectors = found["e7"]["response"]["body"]["data"]
    assert [one["index"] for one in vectors] == [0, 1]
    direct = client.embeddings.create(model="vectors", input="text 7").data[0].embedding
    assert vectors[1]["embedding"] == pytest.approx(direct)


def test_a_model_that_writes_gives_no_vectors(client: OpenAI) -> None:
    item = {
        "custom_id": "e", "method": "POST", "url": "/v1/embeddings",
        "body": {"model": "demo", "input": "text"},
    }  # fmt: skip
    ended = until_end(client, start(client, [item], endpoint="/v1/embeddings").id)
    failed = answers(client, ended.error_file_id)["e"]["response"]
    assert failed["status_code"] == 400
    assert "--embeddings" in failed["body"]["error"]["message"]


def test_bad_lines_and_bad_orders(client: OpenAI) -> None:
    ended = until_end(client, start(client, [chat(0), {"custom_id": "x"}]).id)
    assert ended.status == "failed"
    assert ended.errors is not None
    assert ended.errors.data is not None
    assert [error.line for error in ended.errors.data] == [2]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=("f", io.BytesIO(b"x")), purpose="fine-tune")
    assert refusal.value.param == "purpose"
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="file-none", endpoint="/v1/completions", completion_window="24h"
        )
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(ended.id)


def test_the_document_and_the_metrics_know_of_them(server: Running, client: OpenAI) -> None:
    until_end(client, start(client, [chat(0)]).id)
    paths = server.ask("GET", "/openapi.json")[1]["paths"]
    assert "multipart/form-data" in paths["/v1/files"]["post"]["requestBody"]["content"]
    assert set(paths["/v1/files/{file_id}"]) == {"get", "delete"}
    assert "post" in paths["/v1/batches/{batch_id}/cancel"]
    text = server.ask("GET", "/metrics")[1]
    assert 'loadmaster_batches{status="completed"}' in text
    assert 'loadmaster_batch_items_total{model="demo",outcome="done"}' in text


@pytest.mark.engine
def test_a_batch_on_the_packaged_model(tmp_path: Path) -> None:
    items = [chat(n, max_tokens=8) for n in range(8)]
    with serving("demo", "--ctx", "512", home=tmp_path) as server, openai_client(server) as client:
        ended = until_end(client, start(client, items).id)
        assert ended.status == "completed"
        found = answers(client, ended.output_file_id)
        assert len(found) == 8
        body = items[5]["body"]
        direct = client.chat.completions.create(**body)
        stored = found["r5"]["response"]["body"]["choices"][0]
        assert stored["message"]["content"] == direct.choices[0].message.content
