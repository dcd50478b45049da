"""Routes of files and batches in this process: forms, limits, owners, ids."""

import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from loadmaster.interfaces.http import guard
from loadmaster.interfaces.http.app import make_app
from loadmaster.interfaces.http.guard import Rules
from loadmaster.jobs.database import FILE_NAME
from loadmaster.jobs.store import JobStore
from loadmaster.plan.types import Knobs
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.offers import Offers
from loadmaster.tasks.serving.types import Offer, ServeOptions
from tests.checkpoint_parts import write_checkpoint
from tests.unit.test_http_app import NoOpener, nothing_open

ME, YOU = {"x-api-key": "mine"}, {"x-api-key": "yours"}
LINE = {
    "custom_id": "a", "method": "POST", "url": "/v1/completions",
    "body": {"model": "demo", "prompt": "Hello"},
}  # fmt: skip
ORDER = {"endpoint": "/v1/completions", "completion_window": "24h"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app = make_app(nothing_open, Rules(keys=("mine", "yours"), loopback=False), tmp_path)
    with TestClient(app, raise_server_exceptions=False) as one:
        yield one


def upload(client: TestClient, content: bytes, **fields: str) -> Any:
    return client.post(
        "/v1/files",
        files={"file": ("in.jsonl", content)},
        data={"purpose": "batch", **fields},
        headers=ME,
    )


def order(client: TestClient, card: Any) -> Any:
    fields = {**ORDER, "input_file_id": card["id"]}
    return client.post("/v1/batches", json=fields, headers=ME).json()


def left(tmp_path: Path) -> list[str]:
    folder = tmp_path / "files"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_a_file_goes_up_and_comes_back_and_goes(client: TestClient) -> None:
    content = bytes(range(256)) * 20_000  # five pieces, with all that could be taken for a boundary
    card = upload(client, content).json()
    assert (card["bytes"], card["filename"], card["purpose"]) == (len(content), "in.jsonl", "batch")
    place = f"/v1/files/{card['id']}"
    assert client.get(place, headers=ME).json() == card
    assert client.get(f"{place}/content", headers=ME).content == content
    assert client.get("/v1/files", headers=ME).json()["data"] == [card]
    assert client.delete(place, headers=ME).json()["deleted"] is True
    for method, path in (("GET", place), ("GET", f"{place}/content"), ("DELETE", place)):
        assert client.request(method, path, headers=ME).status_code == 404


def test_another_key_sees_nothing_of_it(client: TestClient) -> None:
    card = upload(client, b"secret").json()
    place = f"/v1/files/{card['id']}"
    for method, path in (("GET", place), ("GET", f"{place}/content"), ("DELETE", place)):
        answer = client.request(method, path, headers=YOU)
        assert answer.status_code == 404
        assert "secret" not in answer.text
    assert client.get("/v1/files", headers=YOU).json()["data"] == []
    fields = {**ORDER, "input_file_id": card["id"]}
    assert client.post("/v1/batches", json=fields, headers=YOU).status_code == 404
    batch = client.post("/v1/batches", json=fields, headers=ME).json()
    assert client.get(f"/v1/batches/{batch['id']}", headers=YOU).status_code == 404
    assert client.post(f"/v1/batches/{batch['id']}/cancel", headers=YOU).status_code == 404
    assert client.get("/v1/batches", headers=YOU).json()["data"] == []


def test_lists_come_in_pages(client: TestClient) -> None:
    ids = [upload(client, b"x").json()["id"] for _ in range(3)][::-1]
    first = client.get("/v1/files?limit=2", headers=ME).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = client.get(f"/v1/files?limit=2&after={first['last_id']}", headers=ME).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2:], False)
    upward = client.get("/v1/files?order=asc", headers=ME).json()
    assert [one["id"] for one in upward["data"]] == ids[::-1]
    assert client.get("/v1/files?purpose=batch_output", headers=ME).json()["data"] == []
    for query in ("limit=0", "limit=x", "limit=99999", "limit=" + "9" * 5000):
        assert client.get(f"/v1/files?{query}", headers=ME).status_code == 400
    assert client.get("/v1/files?after=file-1", headers=ME).status_code == 404
    fields = {**ORDER, "input_file_id": ids[0]}
    made = [client.post("/v1/batches", json=fields, headers=ME).json()["id"] for _ in range(3)]
    page = client.get("/v1/batches?limit=1", headers=ME).json()
    assert page["has_more"]
    rest = client.get(f"/v1/batches?after={page['first_id']}", headers=ME).json()
    assert sorted([page["first_id"], *(one["id"] for one in rest["data"])]) == sorted(made)


FORM = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nxyz\r\n'
END = b"--b--\r\n"
BAD_FORMS: list[tuple[str, bytes]] = [
    ("application/json", b"{}"),
    ("multipart/form-data", FILE + END),
    ("multipart/form-data; boundary=" + "b" * 300, FILE + END),
    (FORM, b""),
    (FORM, b"nonsense"),
    (FORM, PART % (b"purpose", b"batch") + FILE),  # no end
    (FORM, PART % (b"purpose", b"batch") + END),  # no file
    (FORM, FILE + END),  # no purpose
    (FORM, PART % (b"purpose", b"fine-tune") + FILE + END),
    (FORM, PART % (b"purpose", b"batch") + FILE + FILE + END),
    (FORM, PART % (b"purpose", b"x" * 5000) + FILE + END),
    (FORM, b"".join(PART % (b"f%d" % n, b"") for n in range(20)) + END),
    (FORM, PART % (b"purpose", b"\xff") + FILE + END),
    (FORM, b"--b\r\nX: y\r\n\r\nxyz\r\n" + END),  # a part without a name
    (FORM, b"--b\r\n" + b"h" * 9000 + b": x\r\n\r\n" + END),
    (FORM, PART % (b"expires_after[seconds]", b"1") + PART % (b"purpose", b"batch") + FILE + END),
    (FORM, PART % (b"expires_after[seconds]", b"-") + PART % (b"purpose", b"batch") + FILE + END),
]


@pytest.mark.parametrize(("kind", "body"), BAD_FORMS)
def test_a_bad_form_is_refused_and_leaves_nothing(
    client: TestClient, tmp_path: Path, kind: str, body: bytes
) -> None:
    answer = client.post("/v1/files", content=body, headers={**ME, "content-type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert left(tmp_path) == []


@pytest.mark.parametrize("chunked", [False, True])
def test_more_than_the_limit_is_refused_and_leaves_nothing(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    monkeypatch.setattr(guard, "FILE_LIMIT_BYTES", 1 << 20)
    body = PART % (b"purpose", b"batch") + FILE.replace(b"xyz", b"x" * (2 << 20)) + END
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    answer = client.post(
        "/v1/files",
        content=pieces if chunked else body,
        headers={**ME, "content-type": FORM},
    )
    assert answer.status_code == 413
    assert left(tmp_path) == []


def test_without_a_key_no_byte_is_kept(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/v1/files", files={"file": ("f", b"x")}, data={"purpose": "batch"})
    assert answer.status_code == 401
    assert left(tmp_path) == []


def test_a_full_disk_takes_no_file_and_no_batch(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = upload(client, b"x").json()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    answer = upload(client, b"y")
    assert answer.status_code == 507
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "insufficient_storage"
    fields = {**ORDER, "input_file_id": card["id"]}
    assert client.post("/v1/batches", json=fields, headers=ME).status_code == 507
    assert left(tmp_path) == [card["id"]]


def test_a_folder_that_cannot_be_written_is_told(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "files").write_text("in the way")
    answer = upload(client, b"x")
    assert answer.status_code >= 500
    assert answer.json()["error"]["code"] != "internal"


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e%2fjobs", "..%5c..", "file-%00", "file-" + "0" * 24, "%F0%9F%92%A5"]
)
def test_hostile_ids_are_404(client: TestClient, name: str) -> None:
    upload(client, b"x")
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
        assert client.get(path, headers=ME).status_code == 404
    assert client.post(f"/v1/batches/{name}/cancel", headers=ME).status_code == 404
    fields = {**ORDER, "input_file_id": f"../{name}"}
    assert client.post("/v1/batches", json=fields, headers=ME).status_code == 404
    assert len(client.get("/v1/files", headers=ME).json()["data"]) == 1


def wait_for(client: TestClient, batch_id: str) -> Any:
    deadline = time.monotonic() + 120
    while True:
        batch = client.get(f"/v1/batches/{batch_id}", headers=ME).json()
        if batch["status"] in ("failed", "completed", "cancelled", "expired"):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def test_bad_lines_fail_the_batch_by_their_numbers(client: TestClient) -> None:
    elsewhere = {**LINE, "custom_id": "b", "url": "/x"}
    another = {**LINE, "custom_id": "c", "body": {"model": "other", "prompt": "x"}}
    lines = [json.dumps(LINE), "{", *map(json.dumps, (LINE, elsewhere, another))]
    card = upload(client, "\n".join(lines).encode()).json()
    made = order(client, card)
    assert made["status"] == "validating"
    batch = wait_for(client, made["id"])
    assert batch["status"] == "failed"
    assert batch["failed_at"] is not None
    found = {error["line"]: error["message"] for error in batch["errors"]["data"]}
    assert sorted(found) == [2, 3, 4, 5]
    assert "custom_id `a`" in found[3]
    assert "/v1/completions" in found[4]
    assert "other" in found[5]
    again = client.post(f"/v1/batches/{made['id']}/cancel", headers=ME)
    assert again.status_code == 400


def test_many_bad_lines_are_counted(client: TestClient) -> None:
    card = upload(client, b"{\n" * 50).json()
    made = order(client, card)
    errors = wait_for(client, made["id"])["errors"]["data"]
    assert errors[-1]["line"] is None
    assert errors[-1]["message"].startswith("50 lines")


def test_what_does_not_fit_alone_fails_with_the_reason(client: TestClient) -> None:
    card = upload(client, json.dumps(LINE).encode()).json()
    made = order(client, card)
    batch = wait_for(client, made["id"])
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["code"] == "insufficient_memory"
    assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 0}


def test_a_batch_keeps_the_options_that_its_model_takes(tmp_path: Path) -> None:
    """`--quantize` is of another model: without a server the job is of a GGUF all the same."""
    plain = Offer(id="plain", model=str(write_checkpoint(tmp_path / "plain")))
    options = ServeOptions(plan=PlanOptions(knobs=Knobs(quantize="nf4")))

    @asynccontextmanager
    async def serving() -> AsyncIterator[Serving]:
        yield Serving(Offers([Offer(id="demo", model="demo"), plain]), options, NoOpener())

    app = make_app(serving, Rules(keys=("mine",), loopback=False), tmp_path)
    with TestClient(app, raise_server_exceptions=False) as one:
        made = order(one, upload(one, json.dumps(LINE).encode()).json())
        assert wait_for(one, made["id"])["errors"]["data"][0]["code"] == "insufficient_memory"
    (database,) = tmp_path.rglob(FILE_NAME)
    with closing(JobStore(database.parent, read_only=True)) as store:
        assert "nf4" not in store.job().settings


def test_an_empty_file_fails(client: TestClient) -> None:
    card = upload(client, b"\n\n").json()
    made = order(client, card)
    assert wait_for(client, made["id"])["errors"]["data"][0]["message"].endswith("no lines")


def test_a_server_without_a_folder_keeps_nothing() -> None:
    app = make_app(nothing_open, Rules(keys=("mine",), loopback=False))
    with TestClient(app, raise_server_exceptions=False) as one:
        assert one.get("/v1/files", headers=ME).status_code == 404
        assert one.get("/v1/batches", headers=ME).status_code == 404
