"""A small remote model, ways to wait for it, and a machine without any other model."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gguf_writer as gw
from loadmaster.model.http import Patience
from loadmaster.tasks.connections import TransferRules
from loadmaster.tasks.pull import PullOptions

REPO = "toy/Tiny-GGUF"
NAME = "Tiny-Q4_K_M.gguf"

PATIENT = Patience(attempts=2, backoff_s=0)
HASTY = replace(PATIENT, answer_s=0.4, window_s=0.4, window_bytes=1024)
SLOW = ("slow_body", "slow_header", "silent")
SMALL = TransferRules(
    chunk_bytes=1 << 12, segment_bytes=1 << 16, sync_bytes=1 << 14, max_failures=2
)


def patience(behaviour: str) -> Patience:
    """A server that is too slow is found out soon; others may take as long as a busy machine."""
    return HASTY if behaviour in SLOW else PATIENT


def options(sha256: str | None = None, behaviour: str = "honest") -> PullOptions:
    """Small chunks, for a server that behaves so."""
    return PullOptions(sha256=sha256, rules=SMALL, patience=patience(behaviour))


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
