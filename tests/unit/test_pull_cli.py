"""`loadmaster pull`: the path on stdout, the rest on stderr; rates and times in words."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.hostile_server import HostileServer, hub_path, hub_routes, sha256_of
from loadmaster.interfaces.cli.main import run
from loadmaster.interfaces.cli.progress import duration
from loadmaster.interfaces.cli.pull import PullProgress, command, rate_text
from loadmaster.units import MIB
from tests import remote_parts as parts

CONTENT = parts.content()


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HostileServer]:
    parts.isolate(monkeypatch, tmp_path)
    files = {hub_path(parts.REPO, parts.NAME): CONTENT}
    routes = hub_routes(parts.REPO, {parts.NAME: CONTENT})
    with HostileServer(files, routes=routes) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_the_path_goes_to_stdout() -> None:
    result = CliRunner().invoke(command, [f"hf:{parts.REPO}", "--connections", "2"])
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()).read_bytes() == CONTENT
    assert "sha256 verified" in result.stderr
    again = CliRunner().invoke(command, [f"hf:{parts.REPO}"])
    assert "was here already" in again.stderr


def test_json(server: HostileServer) -> None:
    url = server.url + hub_path(parts.REPO, parts.NAME)
    result = CliRunner().invoke(command, [url, "--json"])
    document = json.loads(result.stdout)
    (file,) = document["files"]
    assert file["sha256"] == sha256_of(CONTENT)
    assert file["verified"] is False
    assert file["fetched_bytes"] == len(CONTENT)
    assert result.stderr == ""


def test_an_error_has_its_exit_code_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", f"hf:{parts.REPO}:Q8_0", "--json"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "not_found"
    assert "hint: it has Q4_K_M" in captured.err.replace("nearest: ", "it has ")


def test_a_bar_on_a_terminal_and_one_line_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        progress = PullProgress(stream=stream)
        progress.fetching("m.gguf", MIB, 4 * MIB)
        progress.verifying("m.gguf", 1, 2)
        progress.finish()
        assert ("25 %" in stream.getvalue()) is drawn
        assert "fetching m.gguf, 4.00 MiB\n" in stream.getvalue()


def test_rates_and_times() -> None:
    assert rate_text(((0.0, 0), (2.0, 20 * MIB)), 1020 * MIB) == "20.00 MiB  10.0 MiB/s  2 min left"
    assert rate_text(((0.0, 5),), None) == "5 B"
    assert [duration(s) for s in (7, 600, 36_000)] == ["7 s", "10 min", "10 h 00 min"]
