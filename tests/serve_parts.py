"""A real server process for tests, and the events it tells."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from loadmaster.tasks.planning import demo_model

PATIENCE_S = 240.0  # for what is sure to come: a busy machine may take its time

TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
# What a model says that asks for the weather. The name is long: what a server that is held up says
# in one piece is still not all of it.
CITY = "Bonn on the Rhine, where it may rain for a week or longer"
ARGUMENTS = f'{{"city": "{CITY}"}}'
WEATHER_CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
WEATHER_ANSWER = f"One moment.\n<tool_call>\n{WEATHER_CALL}\n</tool_call>"
# Of modules whose clients are not closed.
UNCLOSED = [
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def collect_clients() -> None:
    """Have clients that were not closed end their connections and loops, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if isinstance(found, asyncio.BaseEventLoop) and not found.is_running():
                found.close()
        gc.collect()


def changed_demo(path: Path, metadata: Mapping[str, str | int]) -> Path:
    """The packaged model with other values in its header."""
    reader = gguf.GGUFReader(demo_model())
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
    changes = {key: MetadataDetails(kinds[type(v)], v) for key, v in metadata.items()}
    copy_with_new_metadata(reader, writer, changes, [])
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that listens."""

    url: str
    process: "subprocess.Popen[str]"

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of one request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, headers or {})
        response = connection.getresponse()
        raw = response.read().decode()
        connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, json.loads(raw) if is_json and raw else raw, found

    def lines(self, path: str, body: Any) -> Iterator[str]:
        """Lines of a streamed response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        with suppress(ConnectionError):
            for line in response:
                yield line.decode().rstrip("\n")
        connection.close()

    def worker_pids(self) -> list[int]:
        """The worker processes of this server."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                words = (folder / "cmdline").read_text().split("\0")
                if int(stat[1]) == self.process.pid and "loadmaster.engine.worker" in words:
                    found.append(int(folder.name))
        return found

    def events_until(self, kind: str, n: int = 1) -> list[dict[str, Any]]:
        """What happened to models, from the first event to the n-th of a kind."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", "/loadmaster/v1/events")
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + PATIENCE_S
        for line in connection.getresponse():
            assert time.monotonic() < deadline, found
            if line.startswith(b"data: "):
                found.append(json.loads(line[6:]))
                if [event["kind"] for event in found].count(kind) == n:
                    break
        connection.close()
        return found

    def n_ended(self, finish_reason: str) -> int:
        """How many requests ended so."""
        lines = self.ask("GET", "/metrics")[1].splitlines()
        counts = [
            line.rpartition(" ")[2] for line in lines if f'finish_reason="{finish_reason}"' in line
        ]
        return sum(map(int, counts))

    def wait_until_idle(self, model: str) -> dict[str, Any]:
        """The row of a model once nothing runs or waits on it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            rows = self.ask("GET", "/loadmaster/v1/models")[1]["models"]
            row: dict[str, Any] = next(r for r in rows if r["id"] == model)
            if row["state"] == "ready" and row["n_running"] == row["n_waiting"] == 0:
                return row
            assert time.monotonic() < deadline, row
            time.sleep(0.02)


@contextmanager
def serving(*words: str, home: Path, fake: dict[str, Any] | None = None) -> Iterator[Running]:
    """`loadmaster serve` with these words, on a free port; with `fake`, on the fake backend."""
    backend = [] if fake is None else ["--backend", "fake", "--backend-options", json.dumps(fake)]
    command = [
        sys.executable, "-m", "loadmaster", "serve", *words, "--port", "0", "--json", *backend,
    ]  # fmt: skip
    environment = {**os.environ, "XDG_STATE_HOME": str(home / "state")}  # its jobs are no user's
    if fake is not None:
        environment["LOADMASTER_HOME"] = str(home)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        yield Running(url=json.loads(line)["url"], process=process)
    finally:
        process.send_signal(signal.SIGTERM)
        if process.stdout and not process.stdout.closed:  # the test has not read it all
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
