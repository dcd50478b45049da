"""A repository without a quantization: every complete model in it is planned from its header."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hostile_server import HostileServer, hub_path, hub_routes
from loadmaster.interfaces.cli.main import run
from loadmaster.tasks.comparison import expand
from tests import remote_parts as parts

NAMES = ("Tiny-Q8_0.gguf", "Tiny-Q4_K_M.gguf", "mmproj-Tiny.gguf")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HostileServer]:
    parts.isolate(monkeypatch, tmp_path)
    served = {name: parts.model_file(tmp_path, name, n_layer=2) for name in NAMES}
    files = {hub_path(parts.REPO, name): path for name, path in served.items()}
    with HostileServer(files, routes=hub_routes(parts.REPO, served)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_its_files_are_the_candidates(server: HostileServer) -> None:
    assert set(expand([f"hf:{parts.REPO}"])) == {
        f"hf:{parts.REPO}/{name}" for name in NAMES if "mmproj" not in name
    }


def test_they_are_compared_without_a_download(
    server: HostileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--compare", f"hf:{parts.REPO}", "--machine", "cpu-64g", "-q", "--json"]
    assert run(words) == 0
    content = json.loads(capsys.readouterr().out)
    references = {row["reference"] for row in content["candidates"]}
    assert references == {f"hf:{parts.REPO}/{name}" for name in NAMES[:2]}
    assert all(row["fits"] for row in content["candidates"])
