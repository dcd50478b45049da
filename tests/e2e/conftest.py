"""Commands in this process with their standard input; OpenAI's client of a module's server."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.batch_parts import chat, demo, write
from tests.cli_parts import Capture, Run, said
from tests.openai_parts import openai_client
from tests.serve_parts import Running, collect_clients


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Run:
    """Run a command line with piped stdin: exit code, stdout, stderr."""

    def call(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        return said(capsys, *words)

    return call


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> Run:
    """Run `batch` with jobs of its own: exit code, stdout, stderr."""
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))

    def call(*words: str) -> tuple[int, str, str]:
        return said(capsys, "batch", *words)

    return call


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Twelve chats for the demo model, where `batch` looks."""
    return write(tmp_path / "in.jsonl", [demo(chat(f"c{i}", f"say {i}")) for i in range(12)])


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with openai_client(server) as one:
        yield one


@pytest.fixture(scope="module")
def collected() -> Iterator[None]:
    """For clients that leave their connections to the garbage collector."""
    yield
    collect_clients()
