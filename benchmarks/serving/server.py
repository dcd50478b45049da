"""`loadmaster serve` as a process, its worker's process, and what it says of its models."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving.client import HOST

MODEL = "demo"
_LOAD_LIMIT_S = 90.0


@dataclass(slots=True, kw_only=True)
class Server:
    """A server that listens on loopback, in a process of its own."""

    port: int
    process: "subprocess.Popen[str]"
    _line: "tuple[asyncio.StreamReader, asyncio.StreamWriter] | None" = None
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON, over a connection that is kept for as long as the server keeps it."""
        async with self._one:
            if self._line is not None and self._line[0].at_eof():
                self._line[1].close()
                self._line = None
            if self._line is None:
                self._line = await asyncio.open_connection(HOST, self.port, limit=1 << 24)
            reader, writer = self._line
            payload = b"" if body is None else json.dumps(body).encode()
            head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(payload)}"
            writer.write(head.encode() + b"\r\n\r\n" + payload)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            fields = dict(line.split(": ", 1) for line in lines[1:] if line)
            raw = await reader.readexactly(int(fields["content-length"]))
            return int(lines[0].split()[1]), json.loads(raw) if raw else None

    async def row(self) -> dict[str, Any]:
        """What `ps` shows of the model."""
        rows = (await self.ask("GET", "/loadmaster/v1/models"))[1]["models"]
        found: dict[str, Any] = next((row for row in rows if row["id"] == MODEL), {})
        return found

    async def until(self, limit_s: float = _LOAD_LIMIT_S, **figures: Any) -> dict[str, Any]:
        """The row once it has these figures.

        Raises:
            TimeoutError: it does not come to that.
        """
        async with asyncio.timeout(limit_s):
            while True:
                row = await self.row()
                if all(row.get(key) == value for key, value in figures.items()):
                    return row
                await asyncio.sleep(0.002)

    async def until_idle(self) -> dict[str, Any]:
        """The row once the model is loaded and nobody uses it."""
        return await self.until(_LOAD_LIMIT_S, state="ready", n_running=0, n_waiting=0)

    async def reset(self) -> None:
        """Load the model, and if it is down, let it be loaded: the breaker counts anew."""
        if (await self.row()).get("state") == "failed":
            await self.ask("POST", "/models/unload", {"model": MODEL})
        await self.ask("POST", "/models/load", {"model": MODEL})
        await self.until_idle()

    async def events(self, kind: str) -> list[str]:
        """Texts of the events of a kind so far."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        head = f"GET /loadmaster/v1/events HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
        writer.write(head.encode())
        raw = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while piece := await reader.read(1 << 16):
                    raw += piece
        writer.close()
        lines = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
        return [event["text"] for event in map(json.loads, lines) if event["kind"] == kind]

    def worker(self) -> int | None:
        """The process id of its worker."""
        return next(iter(_workers(self.process.pid)), None)

    def own_mib(self) -> float:
        """The server's own memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        return 0.0

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def _workers(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_text().split("\0")
            if int(stat[1]) == parent and "loadmaster.engine.worker" in words and stat[0] != "Z":
                found.append(int(folder.name))
    return found


@dataclass(slots=True, kw_only=True)
class Ends:
    """How servers ended."""

    deaths: int = 0  # by themselves, or with a status that is none
    orphans: int = 0  # workers that outlived their server


@asynccontextmanager
async def serving(
    *words: str, ends: Ends, fake: Mapping[str, object] | None = None, model: str = "demo"
) -> AsyncGenerator[Server]:
    """A server with its model loaded; with `fake`, on the fake backend. Ended by SIGTERM."""
    with tempfile.TemporaryDirectory() as home:
        environment = dict(os.environ)
        backend: list[str] = []
        if fake is not None:
            backend = ["--backend", "fake", "--backend-options", json.dumps(fake)]
            environment["LOADMASTER_HOME"] = home
        process = subprocess.Popen(
            [sys.executable, "-m", "loadmaster", "serve", f"{MODEL}={model}", *words, "--port",
             "0", "--json", "--keep-alive", "-1", *backend],
            stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        try:
            server = await _listening(process)
            await server.reset()
            yield server
        finally:
            await asyncio.to_thread(_end, process, ends)


async def _listening(process: "subprocess.Popen[str]") -> Server:
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    if not line:
        raise RuntimeError("the server did not start")
    port = urlsplit(json.loads(line)["url"]).port
    assert port is not None
    return Server(port=port, process=process)


def _end(process: "subprocess.Popen[str]", ends: Ends) -> None:
    if process.poll() is not None:
        ends.deaths += process.returncode != 0
        return
    workers = _workers(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        ends.deaths += 1
        process.kill()
        process.wait()
    ends.deaths += process.returncode != 0
    time.sleep(0.1)
    ends.orphans += sum(Path(f"/proc/{pid}").exists() for pid in workers)
