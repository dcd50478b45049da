"""`llama-server` as the other side, with the same file, threads and cells."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.batching.llama_server import LlamaServer
from benchmarks.streaming.client import ask_all, stream_of
from benchmarks.streaming.cpu import cpu_s, own_cpu_s
from benchmarks.streaming.ours import COMPLETION, body_of
from benchmarks.streaming.times import Run
from benchmarks.streaming.work import Asked

SHAPES: dict[str, tuple[str, ...]] = {
    "-np 16": ("-np", "16"),
    "-np 16 -kvu": ("-np", "16", "-kvu"),
    "default -np": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A `llama-server` that listens."""

    port: int
    pid: int
    command: str

    def run(self, asked: Sequence[Asked]) -> Run:
        """All requests at once, streamed, with the cheapest of its samplers."""
        bodies = [_body(each) for each in asked]
        before = own_cpu_s(), cpu_s(self.pid)
        received = ask_all(self.port, COMPLETION, bodies)
        client, server = own_cpu_s() - before[0], cpu_s(self.pid) - before[1]
        streams = [stream_of(each) for each in received]
        return Run(streams=streams, client_cpu_s=client, parent_cpu_s=server)


def _body(asked: Asked) -> dict[str, Any]:
    return {**body_of(COMPLETION, asked), "top_k": 1, "samplers": ["top_k"], "cache_prompt": True}


@contextmanager
def peer(tool: Path, model: Path, name: str, n_cells: int, n_threads: int) -> Iterator[Peer]:
    """`llama-server` in one of its shapes, ended afterwards."""
    words = [
        "-c", str(n_cells), *SHAPES[name], "-t", str(n_threads), "-tb", str(n_threads), "-fa",
        "on", "-ub", "512", "-lm", "none", "--threads-http", "24",
    ]  # fmt: skip
    command = " ".join(["llama-server", "-m", model.name, *words])
    with LlamaServer(tool, model, words) as server:
        yield Peer(port=server.port, pid=server.pid, command=command)
