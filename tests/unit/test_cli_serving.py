"""`ps` and `launch` as they print, without a server."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.interfaces.cli import launch, ps
from loadmaster.interfaces.cli.ps import cells, table
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
    as_json = CliRunner().invoke(launch.command, ["opencode", "--json"])
    value = json.loads(as_json.stdout)
    assert value["schema_version"] == 1
    assert "http://127.0.0.1:8765/v1" in value["text"]


def test_a_server_that_is_not_there_is_named() -> None:
    failed = CliRunner().invoke(ps.command, ["--url", "http://127.0.0.1:1"])
    assert isinstance(failed.exception, NotFoundError)
    with pytest.raises(UsageError, match="no address"):
        Server(url="ftp://x").models()
