"""Commands in this process with their standard input; OpenAI's client of a module's server."""

import io
import sys
from collections.abc import Iterator

import pytest
from openai import OpenAI

from loadmaster.interfaces.cli import main
from tests.cli_parts import Run
from tests.openai_parts import openai_client
from tests.serve_parts import Running, collect_clients


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line with piped stdin: exit code, stdout, stderr."""

    def call(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main.run(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with openai_client(server) as one:
        yield one


@pytest.fixture(scope="module")
def collected() -> Iterator[None]:
    """For clients that leave their connections to the garbage collector."""
    yield
    collect_clients()
