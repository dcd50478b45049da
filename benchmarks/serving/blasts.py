"""Bombs on the real engine, beside streams that must go on: what each costs, and what it breaks."""

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.serving.bombs import MESSAGES, Bomb
from benchmarks.serving.raw import LIMIT_S
from loadmaster.tasks.planning import demo_model
from tests.serve_parts import Running, changed_demo, serving

CALM = "calm"  # a model that no bomb is sent to
TOKENS = 24
_TEMPLATE = "tokenizer.chat_template"


@dataclass(slots=True)
class Blasts:
    """What came of the bombs."""

    seconds: dict[str, float] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # 5xx, or a connection that broke
    hung: list[str] = field(default_factory=list)
    worker_deaths: int = 0
    broken_streams: int = 0
    gaps_s: dict[str, float] = field(default_factory=dict)
    worker_growth_bytes: int = 0
    server_peak_bytes: int = 0

    def figures(self) -> dict[str, object]:
        """For the summary."""
        return {
            "bombs": len(self.seconds),
            "bomb_statuses": {str(k): v for k, v in sorted(self.statuses.items())},
            "slowest_bomb_s": round(max(self.seconds.values(), default=0.0), 2),
            "worker_deaths": self.worker_deaths,
            "broken_streams": self.broken_streams,
            "stream_gap_ms": round(1e3 * self.gaps_s.get(CALM, 0.0)),
            "same_model_gap_ms": round(1e3 * self.gaps_s.get("demo", 0.0)),
            "worker_growth_mib": self.worker_growth_bytes >> 20,
            "server_peak_mib": self.server_peak_bytes >> 20,
        }


def blast(
    home: Path, deaths: list[str], bombs: Sequence[Bomb], *, fake: dict[str, Any] | None = None
) -> Blasts:
    """Send the bombs, one after the other."""
    models = _models(home, bombs)
    words = ["demo", f"{CALM}={demo_model()}"]
    words += [f"{name}={path}" for name, path in models.values()]
    found = Blasts()
    with serving(*words, "--keep-alive", "-1", "--probe", "0", home=home, fake=fake) as server:
        for name in ("demo", CALM):
            server.ask("POST", "/models/load", {"model": name})
        (worker, *_) = sorted(server.worker_pids())
        before = _rss_anon(worker)
        with _watched(server, "demo", found), _watched(server, CALM, found):
            for bomb in bombs:
                name = models[bomb.template][0] if bomb.template else "demo"
                _send(server, name, bomb, found)
        found.worker_growth_bytes = _rss_anon(worker) - before
        found.server_peak_bytes = _field(server.process.pid, "VmHWM")
        if server.process.poll() is not None:
            deaths.append("bombs")
    return found


def _models(home: Path, bombs: Sequence[Bomb]) -> dict[str | None, tuple[str, Path]]:
    """A model for each template."""
    texts = list(dict.fromkeys(bomb.template for bomb in bombs if bomb.template))
    return {
        text: (f"t{number}", changed_demo(home / f"t{number}.gguf", {_TEMPLATE: text}))
        for number, text in enumerate(texts)
    }


def _send(server: Running, model: str, bomb: Bomb, found: Blasts) -> None:
    if model != "demo":
        server.ask("POST", "/models/load", {"model": model})
    workers = set(server.worker_pids())
    usual: Mapping[str, Any] = {"messages": MESSAGES} if "chat" in bomb.path else {}
    body = {"model": model, "max_tokens": TOKENS, "temperature": 1, "seed": 1, **usual, **bomb.body}
    started = time.monotonic()
    status, told = _ask(server, bomb.path, body)
    found.seconds[bomb.name] = time.monotonic() - started
    found.statuses[status] = found.statuses.get(status, 0) + 1
    if told == "hung":
        found.hung.append(bomb.name)
    elif status == 0 or status >= 500:
        found.failed.append(f"{bomb.name}: {status} {told}")
    print(f"{found.seconds[bomb.name]:6.2f} s  {status}  {bomb.name}  {told[:140]}", flush=True)
    found.worker_deaths += len(workers - set(server.worker_pids()))


def _ask(server: Running, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
    """Status and text; 0 where there was no answer."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read()[:300].decode("utf-8", "replace")
    except TimeoutError:
        return 0, "hung"
    except (HTTPException, OSError) as error:
        return 0, repr(error)
    finally:
        connection.close()


@contextmanager
def _watched(server: Running, model: str, found: Blasts) -> Iterator[None]:
    """Streams of a model, one after another; the longest pause between two events is noted."""
    done = threading.Event()

    def follow() -> None:
        while not done.is_set():
            if not _follow(server, model, found, done):
                found.broken_streams += 1

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(server: Running, model: str, found: Blasts, done: threading.Event) -> bool:
    """One stream; whether it ended as it should."""
    body = {"model": model, "messages": MESSAGES, "max_tokens": 700, "stream": True}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "ignore_eos": True}))
        response = connection.getresponse()
        last = None
        for line in response:
            now = time.monotonic()
            if line.startswith(b"data: [DONE]"):
                return True
            if line.startswith(b"data: {"):
                if last is not None:
                    found.gaps_s[model] = max(found.gaps_s.get(model, 0.0), now - last)
                last = now
            if done.is_set():
                return True
    except (HTTPException, OSError):
        return False
    finally:
        connection.close()
    return False


def _rss_anon(pid: int) -> int:
    return _field(pid, "RssAnon")


def _field(pid: int, name: str) -> int:
    """Bytes, of a line in the process' status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
