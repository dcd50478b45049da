"""`llama-server` as a contestant: started on loopback, given every request at once.

Its own counts are taken: `timings` of every answer. A run that is already slower than the best one
by far may be stopped; the requests that it answered until then are counted.
"""

import contextlib
import http.client
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.batching.jobs import Item, Job
from benchmarks.batching.outcome import Outcome
from benchmarks.quiet import Beside

READY_S = 120.0
_HOST = "127.0.0.1"
_POLL_S = 0.25
# With more slots a shared prefix is computed many times before the first answer, then no more:
# the first answers do not tell the rate.
_FEW_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What differs between the runs of one sweep."""

    n_parallel: int | None = None  # None: its default, 4 slots and a unified cache
    unified: bool = False

    @property
    def name(self) -> str:
        if self.n_parallel is None:
            return "default -np"
        return f"-np {self.n_parallel}{' -kvu' if self.unified else ''}"

    @property
    def n_slots(self) -> int:
        return self.n_parallel or 4

    @property
    def words(self) -> list[str]:
        if self.n_parallel is None:
            return []
        return ["-np", str(self.n_parallel), *(["-kvu"] if self.unified else [])]


def arguments(job: Job, options: Options, n_threads: int) -> list[str]:
    """The command line after model and port: cells, threads and ubatch as ours, the rest default.

    There are HTTP threads for all requests; by default some would wait outside.
    """
    return [
        "-c", str(job.n_ctx), *options.words, "-t", str(n_threads), "-tb", str(n_threads),
        "-fa", "on", "-ub", "512", "-lm", "none", "--threads-http", str(len(job.items) + 8),
    ]  # fmt: skip


class LlamaServer:
    """A running `llama-server`; a context manager that leaves nothing behind."""

    def __init__(self, tool: Path, model: Path, words: Sequence[str]) -> None:
        self.port = _free_port()
        where = ["--host", _HOST, "--port", str(self.port), "--no-webui", "-lv", "2"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [str(tool), "-m", str(model), *where, *words],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        deadline = time.monotonic() + READY_S
        while self._get("/health") != 200:
            if self._process.poll() is not None or time.monotonic() > deadline:
                message = f"llama-server did not come up:\n{self.log_tail()}"
                self.stop()
                raise RuntimeError(message)
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill it: requests that are open end with a broken connection."""
        self._process.kill()
        self._process.wait()

    def log_tail(self, n_bytes: int = 2000) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-n_bytes:]

    def complete(self, item: Item) -> tuple[int, dict[str, Any]]:
        """One greedy completion: HTTP status and body."""
        body = {
            "prompt": list(item.prompt), "n_predict": item.n_out, "ignore_eos": True,
            "temperature": 0, "top_k": 1, "samplers": ["top_k"], "cache_prompt": True,
        }  # fmt: skip
        connection = http.client.HTTPConnection(_HOST, self.port)
        try:
            connection.request(
                "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def _get(self, path: str) -> int | None:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection(_HOST, self.port, timeout=5)
            connection.request("GET", path)
            return connection.getresponse().status
        return None


def run_peer(
    tool: Path, model: Path, job: Job, options: Options, n_threads: int, limit_s: float | None
) -> Outcome:
    """The whole job, all requests at once; stopped after `limit_s`."""
    words = arguments(job, options, n_threads)
    with LlamaServer(tool, model, words) as server:
        start, beside = time.perf_counter(), Beside(server.pid)
        answers, cut, others = _all_at_once(server, job, options.n_slots, limit_s, beside)
        seconds = time.perf_counter() - start
    done = [body for status, body in answers if status == 200]
    failures = Counter(_reason(status, body) for status, body in answers if status != 200)
    return Outcome(
        name=options.name,
        command=" ".join(["llama-server", "-m", model.name, *words]),
        n_requests=len(job.items),
        seconds=seconds,
        completed=len(done),
        prefilled=sum(int(body["timings"]["prompt_n"]) for body in done),
        generated=sum(int(body["timings"]["predicted_n"]) for body in done),
        cut=cut,
        others=others,
        failures=failures,
    )


Answer = tuple[int, dict[str, Any]]


def _all_at_once(
    server: LlamaServer, job: Job, n_slots: int, limit_s: float | None, beside: Beside
) -> tuple[list[Answer], bool, float]:
    """The answers in the order of the requests, status 0 where the server was stopped; whether it
    was; what others had of the processors."""
    answers: list[Answer] = [(0, {})] * len(job.items)

    def ask(index: int, item: Item) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            answers[index] = server.complete(item)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(job.items)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    cut = False
    while limit_s is not None and not cut and (n_open := sum(t.is_alive() for t in threads)):
        time.sleep(_POLL_S)
        n_done = len(threads) - n_open
        steady = n_slots <= _FEW_SLOTS or not job.n_prefix
        reached = n_done + n_slots if steady else len(threads)
        cut = hopeless(time.monotonic() - start, reached, len(threads), limit_s)
    if not cut:
        for thread in threads:
            thread.join()
    others = beside.share()
    if cut:
        server.stop()
        for thread in threads:
            thread.join()
    return answers, cut, others


def hopeless(elapsed_s: float, n_reached: int, n_requests: int, limit_s: float) -> bool:
    """Past the limit, or, after a quarter of it, too slow for it with every slot's request counted
    as done."""
    if elapsed_s < limit_s / 4:
        return False
    return elapsed_s > limit_s or elapsed_s * n_requests / n_reached > limit_s


def _reason(status: int, body: dict[str, Any]) -> str:
    if status == 0:
        return "not answered"
    return f"HTTP {status} {body.get('error', {}).get('message', '')}".strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def sweep(job: Job, slots: Sequence[int]) -> Iterator[Options]:
    """A cache for each slot, as `-np` alone has it, where the longest request fits; else one."""
    yield Options()
    for n in slots:
        yield Options(n_parallel=n, unified=job.longest > job.n_ctx // n)
