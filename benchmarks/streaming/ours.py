"""Our side: `loadmaster serve` as a process, and the same engine driven without HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.streaming.client import ask_all, stream_of
from benchmarks.streaming.cpu import cpu_s, own_cpu_s
from benchmarks.streaming.times import Run, Stream
from benchmarks.streaming.work import Asked
from loadmaster.engine.types import (
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    SamplingParams,
    TextEvent,
)
from loadmaster.errors import LoadmasterError
from loadmaster.plan.types import Knobs, Workload
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.progress import Silent
from loadmaster.tasks.serving.opening import Opener, Share
from loadmaster.tasks.serving.types import Offer

MODEL = "model"
LIMIT_S = 300.0
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model and how it is opened, for the server and without it."""

    path: Path
    n_parallel: int
    n_ctx: int  # of each sequence
    n_threads: int
    fake: Mapping[str, object] | None = field(default=None)  # the fake backend's options

    @property
    def words(self) -> list[str]:
        """The server's command line."""
        words = [
            f"{MODEL}={self.path}", "--parallel", str(self.n_parallel), "--ctx", str(self.n_ctx),
            "--threads", str(self.n_threads), "--keep-alive", "-1",
        ]  # fmt: skip
        if self.fake is not None:
            words += ["--backend", "fake", "--backend-options", json.dumps(self.fake)]
        return words

    def options(self) -> PlanOptions:
        """The same for a caller of the library."""
        return PlanOptions(
            backend="llamacpp" if self.fake is None else "fake",
            workload=Workload(n_ctx=self.n_ctx),
            knobs=Knobs(n_threads=self.n_threads),
            backend_options=self.fake or {},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server that listens, with its model loaded."""

    port: int
    pid: int
    worker_pid: int | None
    command: str

    def run(self, path: str, asked: Sequence[Asked], delays_s: Sequence[float] = ()) -> Run:
        """All requests at once, or each after its delay; streamed."""
        bodies = [body_of(path, each) for each in asked]
        before = own_cpu_s(), cpu_s(self.pid), cpu_s(self.worker_pid)
        received = ask_all(self.port, path, bodies, delays_s)
        spent = own_cpu_s(), cpu_s(self.pid), cpu_s(self.worker_pid)
        client, parent, worker = (b - a for a, b in zip(before, spent, strict=True))
        return Run(
            streams=[stream_of(each) for each in received],
            client_cpu_s=client,
            parent_cpu_s=parent,
            worker_cpu_s=worker,
        )


def body_of(path: str, asked: Asked) -> dict[str, Any]:
    """A greedy request for exactly so many tokens, as every OpenAI client would send it."""
    body: dict[str, Any] = {
        "model": MODEL, "max_tokens": asked.n_out, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if path == CHAT:
        return {**body, "messages": [{"role": "user", "content": asked.text}]}
    return {**body, "prompt": asked.text}


@contextmanager
def serving(setting: Setting) -> Iterator[Serving]:
    """`loadmaster serve`, ended afterwards."""
    words = ["serve", *setting.words, "--port", "0", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadmaster", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start")
        port = urlsplit(json.loads(line)["url"]).port
        assert port is not None
        _load(port)
        yield Serving(
            port=port,
            pid=process.pid,
            worker_pid=_worker_of(process.pid),
            command="loadmaster " + " ".join(words).replace(str(setting.path), setting.path.name),
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _load(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    connection.request("POST", "/models/load", json.dumps({"model": MODEL}))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(text.decode(errors="replace"))


def _worker_of(pid: int) -> int | None:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if int(parent) == pid and "loadmaster.engine.worker" in words:
            return int(folder.name)
    return None


@contextmanager
def bare(setting: Setting) -> Iterator[Opened]:
    """The engine as the server opens it, by the same plan, in this process."""
    opener = Opener(setting.options(), setting.n_parallel)
    prepared = opener.prepare(Offer(id=MODEL, model=str(setting.path)), Share())
    with prepared.open(Silent()) as opened:
        yield opened


def run_bare(
    opened: Opened, path: str, asked: Sequence[Asked], delays_s: Sequence[float] = ()
) -> Run:
    """The same without HTTP. Text becomes tokens within the measured time, as in a server."""
    gathered = [_Gathered(index) for index in range(len(asked))]
    worker = opened.session.engine
    before, start = own_cpu_s(), time.perf_counter()
    for index, (each, one) in enumerate(zip(asked, gathered, strict=True)):
        if delays_s:
            time.sleep(max(0.0, start + delays_s[index] - time.perf_counter()))
        one.stream.start_s = time.perf_counter()
        prompt = opened.session.tokens(_prompt(opened, path, each))
        worker.start_request(_request(prompt, each.n_out), one.take)
    deadline = time.monotonic() + LIMIT_S
    for one in gathered:
        one.wait(deadline)
    return Run(streams=[one.stream for one in gathered], client_cpu_s=own_cpu_s() - before)


def _prompt(opened: Opened, path: str, asked: Asked) -> str:
    if path != CHAT:
        return asked.text
    loaded = opened.session.loaded
    return opened.template.render(
        [{"role": "user", "content": asked.text}],
        bos_text=loaded.bos_text,
        eos_text=loaded.eos_text,
    )


def _request(prompt: tuple[int, ...], n_out: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"bare-{os.urandom(8).hex()}",
        prompt=prompt,
        max_tokens=n_out,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
    )


class _Gathered:
    """The events of one request, on the watcher's thread."""

    def __init__(self, index: int) -> None:
        self.stream = Stream(start_s=0.0)
        self._ended = threading.Event()
        self._failure: str | None = f"request {index} did not end in {LIMIT_S:.0f} s"

    def take(self, request_id: str, event: GenerateEvent | LoadmasterError) -> None:
        now, stream = time.perf_counter(), self.stream
        if isinstance(event, TextEvent):
            stream.add(now, event.text)
        elif isinstance(event, DoneEvent):
            stream.end_s, stream.n_generated = now, event.n_generated
            stream.n_prompt, stream.n_cached = event.n_prompt, event.n_cached
            self._failure = event.error
            self._ended.set()
        elif isinstance(event, LoadmasterError):
            self._failure = event.message
            self._ended.set()

    def wait(self, deadline: float) -> None:
        self._ended.wait(max(0.0, deadline - time.monotonic()))
        if self._failure is not None:
            raise RuntimeError(self._failure)
