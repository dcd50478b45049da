"""A small remote model, a patience of parts of a second, and a machine without any other model."""

import random
from pathlib import Path

import pytest

from benchmarks import gguf_writer as gw
from loadmaster.model.http import Patience
from loadmaster.tasks.connections import TransferRules
from loadmaster.tasks.pull import PullOptions

REPO = "toy/Tiny-GGUF"
NAME = "Tiny-Q4_K_M.gguf"

HASTY = Patience(
    connect_s=2, answer_s=0.4, window_s=0.4, window_bytes=1024, attempts=2, backoff_s=0
)
SMALL = TransferRules(
    chunk_bytes=1 << 12, segment_bytes=1 << 16, sync_bytes=1 << 14, max_failures=2
)


def options(sha256: str | None = None) -> PullOptions:
    """Short waits and small chunks."""
    return PullOptions(sha256=sha256, rules=SMALL, patience=HASTY)


def content(seed: int = 1, size: int = 300_001) -> bytes:
    """Bytes that begin like a GGUF file."""
    return b"GGUF" + random.Random(seed).randbytes(size)


def model_file(folder: Path, name: str = NAME, n_layer: int = 1) -> Path:
    """A model with weights, small enough to serve."""
    return gw.write_random(folder / name, *gw.tiny_llama(type_name="q8_0", n_layer=n_layer))


class Watcher:
    """A `TransferProgress` that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.most_bytes = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fetching(self, label: str, done_bytes: int, total_bytes: int | None) -> None:
        assert total_bytes is None or done_bytes <= total_bytes
        self.most_bytes = max(self.most_bytes, done_bytes)

    def verifying(self, label: str, done_bytes: int, total_bytes: int) -> None:
        assert done_bytes <= total_bytes


def isolate(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """No store, no token and no proxy of the person who runs the tests."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "HF_ENDPOINT",
                 "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy",
                 "ALL_PROXY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home / "user"))
    monkeypatch.setenv("LOADMASTER_HOME", str(home / "loadmaster"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "ollama"))
