"""From a name on the Hub to an answer: plan it, be told to pull it, pull it, run it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hostile_server import HostileServer, hub_path, hub_routes
from tests import remote_parts as parts
from tests.cli_parts import Run

FAKE = ("--backend", "fake")
MODEL = f"hf:{parts.REPO}:Q4_K_M"


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HostileServer]:
    parts.isolate(monkeypatch, tmp_path)
    local = parts.model_file(tmp_path)
    files = {hub_path(parts.REPO, local.name): local}
    with HostileServer(files, routes=hub_routes(parts.REPO, {local.name: local})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_from_a_name_to_an_answer(run: Run, server: HostileServer, tmp_path: Path) -> None:
    code, out, _ = run("plan", MODEL, "--json", *FAKE)
    planned = json.loads(out)
    assert (code, planned["fits"]) == (0, True)
    assert f"`loadmaster pull {MODEL}`" in planned["hints"][0]

    code, _, err = run("run", MODEL, "Hello", *FAKE)
    assert code == 4
    assert f"hint: `loadmaster pull {MODEL}`" in err

    (tmp_path / "plan.json").write_text(out)
    code, _, err = run("run", "--plan", str(tmp_path / "plan.json"), "Hello", "--backend", "fake")
    assert code == 4
    assert "weights are not on this machine" in err

    code, out, _ = run("pull", MODEL)
    assert code == 0
    path = Path(out.strip())
    server.reset_traffic()
    code, out, _ = run("run", MODEL, "Hello", "-n", "4", "--temp", "0", "-q", *FAKE)
    assert (code, out) == (0, "This\n")
    code, out, _ = run("plan", path.name, "--json", *FAKE)
    assert json.loads(out)["model"]["file_bytes"] == path.stat().st_size
    assert server.traffic.requests == []


def test_offline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run("plan", MODEL)
    assert code == 6
    assert "hint: unset `HF_HUB_OFFLINE`" in err
