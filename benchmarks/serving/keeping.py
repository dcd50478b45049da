"""Files and batches: what is kept of them lies in one folder, closed to others, and nowhere else.

The texts of a batch are on the disk on purpose, so they are not looked for like a prompt's: a copy
in the state folder is counted where only the owner can reach it, one anywhere else is a hit.
"""

import json
import time
from collections.abc import Iterable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Protocol

from benchmarks.serving.canary import in_files

CHAT = "/v1/chat/completions"
_BOUNDARY = "a-line-between-parts"
_OTHERS = 0o077
_LIMIT_S = 60.0
_ENDS = ("completed", "failed", "expired", "cancelled")


class Asked(Protocol):
    """A server that is asked with its key."""

    port: int
    key: str

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body."""


def use(server: Asked, text: str) -> int:
    """Files and batches that end well, badly, and not at all; how many requests that took.

    A last batch is still running when this returns.
    """
    good = _uploaded(server, text, [_line(text, n, max_tokens=4) for n in range(3)])
    batch = _ended(server, _ordered(server, good, text))
    assert batch["status"] == "completed", batch
    answers = server.ask("GET", f"/v1/files/{batch['output_file_id']}/content")
    assert answers[0] == 200
    for file_id in (good, batch["output_file_id"]):
        assert server.ask("DELETE", f"/v1/files/{file_id}")[0] == 200
    bad = [f"no JSON {text}", _line(text, 1, role=text), _line(text, 2, model=text)]
    batch = _ended(server, _ordered(server, _uploaded(server, text, bad), text))
    assert batch["status"] == "failed", batch
    server.ask("GET", f"/v1/files/file-{text}")
    server.ask("POST", "/v1/batches", {"input_file_id": text, "endpoint": text})
    _broken_upload(server, text)
    long = [_line(text, n, max_tokens=400) for n in range(8)]
    _ordered(server, _uploaded(server, text, long), text)
    return 15


def astray(text: str, folders: Iterable[Path], kept: Path) -> Iterator[str]:
    """Places with the text that are not closed files below `kept`."""
    for place in in_files(text, folders):
        path = Path(place)
        if not path.exists():
            yield place  # a name that has it
        elif kept not in path.parents:
            yield f"{place}: outside of {kept.name}"
        elif not _is_closed(path, kept):
            yield f"{place}: others can read it"


def count_kept(text: str, kept: Path) -> int:
    """Files below `kept` that have the text: none at all would mean that nothing was looked at."""
    return sum(1 for _ in in_files(text, [kept]))


def _is_closed(path: Path, kept: Path) -> bool:
    """Whether the file, or a folder on the way to it, is the owner's alone."""
    on_the_way = [path, *(folder for folder in path.parents if kept in (folder, *folder.parents))]
    return any(not one.stat().st_mode & _OTHERS for one in on_the_way)


def _line(
    text: str, number: int, *, role: str = "user", model: str = "demo", max_tokens: int = 4
) -> str:
    body = {
        "model": model,
        "messages": [{"role": role, "content": f"{text} {number}"}],
        "max_tokens": max_tokens,
    }
    line = {"custom_id": f"{text}-{number}", "method": "POST", "url": CHAT, "body": body}
    return json.dumps(line)


def _form(text: str, lines: Iterable[str]) -> bytes:
    parts = (
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch',
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="file"; '
        f'filename="{text}.jsonl"\r\n\r\n' + "\n".join(lines),
        f"--{_BOUNDARY}--\r\n",
    )
    return "\r\n".join(parts).encode()


def _uploaded(server: Asked, text: str, lines: Iterable[str]) -> str:
    connection = _connected(server)
    connection.request("POST", "/v1/files", _form(text, lines), _headers(server))
    made = json.loads(connection.getresponse().read())
    connection.close()
    file_id: str = made["id"]
    return file_id


def _broken_upload(server: Asked, text: str) -> None:
    """A client that leaves in the midst of a file."""
    form = _form(text, [text] * 1000)
    connection = _connected(server)
    connection.putrequest("POST", "/v1/files")
    for name, value in {**_headers(server), "content-length": str(len(form))}.items():
        connection.putheader(name, value)
    connection.endheaders(form[: len(form) // 2])
    connection.close()


def _connected(server: Asked) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", server.port, timeout=_LIMIT_S)


def _headers(server: Asked) -> dict[str, str]:
    return {
        "authorization": f"Bearer {server.key}",
        "content-type": f"multipart/form-data; boundary={_BOUNDARY}",
    }


def _ordered(server: Asked, file_id: str, text: str) -> str:
    order = {
        "input_file_id": file_id, "endpoint": CHAT, "completion_window": "1h",
        "metadata": {"note": text},
    }  # fmt: skip
    status, body = server.ask("POST", "/v1/batches", order)
    assert status == 200, body
    batch_id: str = json.loads(body)["id"]
    return batch_id


def _ended(server: Asked, batch_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        batch: dict[str, Any] = json.loads(server.ask("GET", f"/v1/batches/{batch_id}")[1])
        if batch["status"] in _ENDS:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
