"""What a client sends is its own fault: requests from the OpenAPI document, a hand-made corpus,
bombs, and every style of Host, Origin and key on every route.

    python -m benchmarks.serving.fuzz [--seed 0] [--quick]

    server_errors      answers of 500 and above, or connections that broke
    undocumented       statuses and bodies that are not as the OpenAPI document says
    hung               requests without an answer within 30 s
    parent_deaths      servers that did not outlive all of it; worker_deaths: of the bombs' workers
    unguarded_routes   routes that answered a request that the guard has to refuse
    stream_gap_ms      the longest pause of a stream beside the bombs, by another model's worker
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving import corpus
from benchmarks.serving.blasts import Blasts, blast
from benchmarks.serving.bombs import all_bombs
from benchmarks.serving.guard_walk import host_styles, key_styles, walk
from benchmarks.serving.openapi_fuzz import Verdict, fuzz
from benchmarks.serving.raw import Reply, exchange
from tests.serve_parts import Running, serving

FAKE = {"eog_after": 6}
QUICK_WALK = 7  # each style skips routes in turn
_SHOWN = 12
_JSON_PATHS = (
    b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages",
    b"/v1/embeddings",
    b"/v1/rerank", b"/v1/batches", b"/completion", b"/infill", b"/tokenize", b"/detokenize",
    b"/apply-template", b"/api/chat", b"/api/generate", b"/api/show", b"/api/embed",
    b"/models/load", b"/loadmaster/v1/plan",
)  # fmt: skip


def run(*, seed: int = 0, quick: bool = False) -> dict[str, object]:
    """Everything; prints what went wrong and returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        deaths: list[str] = []
        with _server(home, deaths, "fuzz", "--embeddings", "embed=demo") as server:
            verdict = fuzz(server.port, seed, *((30, 10) if quick else (200, 60)))
            print(f"openapi: {verdict.asked} requests, {verdict.answered_200} answered with 200")
            _corpus(server, verdict, quick=quick)
            print(f"with the corpus: {verdict.asked} requests")
            walk_of_hosts = walk(server.port, host_styles(), every=QUICK_WALK if quick else 1)
        key_file = home / "key"
        words = ("--api-key-file", str(key_file), "--host", "0.0.0.0")
        with _server(home, deaths, "keys", *words) as server:
            key = key_file.read_text().strip()
            walk_of_keys = walk(server.port, key_styles(key), every=QUICK_WALK if quick else 1)
        bombs = blast(home, deaths, all_bombs()[:: 8 if quick else 1])
    return _figures(verdict, [walk_of_hosts, walk_of_keys], bombs, deaths)


@contextmanager
def _server(home: Path, deaths: list[str], name: str, *words: str) -> Iterator[Running]:
    """A server on the fake backend; its death is noted, and does not end the benchmark."""
    with serving("demo", *words, home=home / name, fake=FAKE) as server:
        yield server
        if server.process.poll() is not None or exchange(server.port, HEALTH).status != 200:
            deaths.append(name)


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def _corpus(server: Running, verdict: Verdict, *, quick: bool) -> None:
    paths = _JSON_PATHS[::5] if quick else _JSON_PATHS
    for name, body in corpus.bodies().items():
        for path in paths:
            reply = exchange(server.port, corpus.posted(path, body))
            _judge(verdict, f"{path.decode()}: {name}", reply, answered=True, statuses=())
    for case in corpus.http_cases():
        reply = exchange(
            server.port, *case.pieces, pause_s=case.pause_s, leave=case.leave, head_only=True
        )
        _judge(verdict, case.name, reply, answered=case.answered, statuses=case.statuses)
        health = exchange(server.port, HEALTH)
        _judge(verdict, f"health after {case.name}", health, answered=True, statuses=(200,))


def _judge(
    verdict: Verdict, name: str, reply: Reply, *, answered: bool, statuses: Sequence[int]
) -> None:
    verdict.asked += 1
    shown = f"{name}: {reply.shown}"
    if reply.hung:
        verdict.hung.append(shown)
    elif reply.status is None:
        if answered:
            verdict.server_errors.append(shown)
    elif reply.status >= 500:
        verdict.server_errors.append(shown)
    elif statuses and reply.status not in statuses:
        verdict.undocumented.append(shown)


def _figures(
    verdict: Verdict, walks: Sequence[Any], bombs: Blasts, deaths: list[str]
) -> dict[str, object]:
    server_errors = [*verdict.server_errors, *(f for w in walks for f in w.failed), *bombs.failed]
    unguarded = [u for w in walks for u in w.unguarded]
    refused = [r for w in walks for r in w.wrongly_refused]
    undocumented = [*verdict.undocumented, *verdict.nonconforming]
    hung = [*verdict.hung, *bombs.hung]
    for title, found in (
        ("server error", server_errors), ("undocumented", undocumented), ("hung", hung),
        ("unguarded", unguarded), ("wrongly refused", refused), ("death", deaths),
    ):  # fmt: skip
        for line in found[:_SHOWN]:
            print(f"{title}: {line}")
    return {
        "fuzz_requests": verdict.asked,
        "answered_200": verdict.answered_200,
        "server_errors": len(server_errors),
        "undocumented": len(undocumented),
        "fuzz_hung": len(hung),
        "parent_deaths": len(deaths),
        "guard_requests": sum(w.asked for w in walks),
        "guard_styles": len(host_styles()) + len(key_styles("k")),
        "unguarded_routes": len(unguarded),
        "wrongly_refused": len(refused),
        **bombs.figures(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    summary = run(seed=options.seed, quick=options.quick)
    print(json.dumps({**summary, "elapsed_s": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
