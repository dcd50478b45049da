"""`ps` and `launch` as they print, without a server."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.interfaces.cli import launch, ps
from loadmaster.interfaces.cli.ps import cells, table
from loadmaster.interfaces.cli.server_options import read_server, server_options
from loadmaster.tasks.api.client_configs import Models, configuration
from loadmaster.tasks.serving.client import Server

ROW: dict[str, Any] = {
    "id": "demo", "state": "ready", "n_ctx": 2048, "n_parallel": 4, "n_running": 1,
    "n_waiting": 2, "planned_bytes": {"cpu": 1 << 30}, "idle_s": None, "expires_s": None,
    "reason": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, "in use"),
        ({"idle_s": 3.0}, "kept"),
        ({"idle_s": 3.0, "expires_s": 12.4}, "12 s from now"),
    ],
)
def test_a_model_is_one_line(changes: dict[str, Any], last: str) -> None:
    assert cells({**ROW, **changes}) == (
        "demo", "ready", "4 × 2048", "1", "2", "cpu 1.00 GiB", last
    )  # fmt: skip


def test_a_model_that_failed_says_why() -> None:
    row = {**ROW, "state": "failed", "reason": "it died", "n_ctx": None, "planned_bytes": {}}
    assert cells(row)[1:3] == ("failed: it died", "-")


def test_columns_are_as_wide_as_they_need_to_be() -> None:
    assert table([("A", "B"), ("long", "x")]) == "A     B\nlong  x"


def test_launch_prints_the_configuration_alone_on_stdout() -> None:
    asked = ["continue", "-m", "chat", "--autocomplete", "olmo", "--url", "http://127.0.0.1:9"]
    printed = CliRunner().invoke(launch.command, asked)
    assert printed.exit_code == 0
    assert printed.stdout.startswith("name: loadmaster\n")
    assert "~/.continue/config.yaml" in printed.stderr
    assert "note: Continue takes `olmo` for a chat model" in printed.stderr
    assert "note: no server listens at http://127.0.0.1:9" in printed.stderr
    as_json = CliRunner().invoke(launch.command, ["opencode", "--json", "--port", "9"])
    value = json.loads(as_json.stdout)
    assert value["schema_version"] == 1
    assert "http://127.0.0.1:9/v1" in value["text"]


LISTED = [
    {"id": "chat", "max_model_len": 8192, "capabilities": ["completion", "tools"]},
    {"id": "qwen-coder", "max_model_len": 4096, "capabilities": ["completion", "insert"]},
    {"id": "embed", "max_model_len": 2048, "capabilities": ["embedding"]},
]


def test_what_the_server_says_of_its_models_is_filled_in() -> None:
    models = Models.read(LISTED)
    asked: Any = {"url": "http://h:1", "models": models, "autocomplete": "qwen-coder"}
    shown = configuration("continue", **asked, embed="embed")
    assert shown.text.count("contextLength: 8192") == shown.text.count("contextLength: 4096") == 1
    assert shown.text.count("capabilities: [tool_use]") == 1
    assert shown.text.count("apiBase: http://h:1/v1/") == 3
    assert shown.notes == ()
    value = json.loads(configuration("opencode", url="http://h:1", models=models).text)
    model = value["provider"]["loadmaster"]["models"]["chat"]
    assert model["limit"] == {"context": 8192, "output": 2048}
    with pytest.raises(NotFoundError, match="no model `qwen`") as refused:
        configuration("continue", url="http://h:1", models=models, autocomplete="qwen")
    assert "`qwen-coder`" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("client", "named"),
    [
        ("continue", "apiKey: ${{ secrets.LOADMASTER_API_KEY }}"),
        ("opencode", '"apiKey": "{file:'),
        ("openwebui", 'RAG_EXTERNAL_RERANKER_API_KEY="$(cat '),
    ],
)
def test_a_key_is_named_and_not_printed(client: str, named: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    words = [client, "--port", "9", "--api-key-file", str(key), "--embed", "e", "--rerank", "r"]
    printed = CliRunner().invoke(launch.command, words)
    assert printed.exit_code == 0
    assert named in printed.stdout
    assert "s3cret" not in printed.output


@pytest.mark.parametrize(
    ("words", "url"),
    [
        ([], "http://127.0.0.1:8765"),
        (["--port", "9"], "http://127.0.0.1:9"),
        (["--host", "box"], "http://box:8765"),
        (["--host", "::1", "--port", "9"], "http://[::1]:9"),
        (["--url", "http://127.0.0.1:9/v1/"], "http://127.0.0.1:9"),
    ],
)
def test_a_server_is_named_by_its_address_or_its_parts(
    words: list[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOADMASTER_URL", raising=False)
    found: list[Server] = []

    @click.command()
    @server_options
    def asking(**given: Any) -> None:
        found.append(read_server(given))

    assert CliRunner().invoke(asking, words).exit_code == 0
    assert found[0].url == url
    both = CliRunner().invoke(asking, ["--url", "http://x", "--port", "9"])
    assert isinstance(both.exception, UsageError)


def test_a_server_that_is_not_there_is_named() -> None:
    failed = CliRunner().invoke(ps.command, ["--url", "http://127.0.0.1:1"])
    assert isinstance(failed.exception, NotFoundError)
    with pytest.raises(UsageError, match="no address"):
        Server(url="ftp://x").models()
