"""`loadmaster engine`, on folders that look like builds."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from loadmaster import settings
from loadmaster.engine import build_engine, builds
from loadmaster.engine.build_progress import BuildProgress
from loadmaster.engine.native_sources import native_sha256
from loadmaster.engine.toolchain import Choice
from loadmaster.interfaces.cli.engine import Lines
from loadmaster.interfaces.cli.main import run

ID = "0.3.36-cpu"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.HOME.name, str(tmp_path))
    monkeypatch.delenv(settings.ENGINE.name, raising=False)
    return tmp_path


@pytest.fixture
def installed() -> Path:
    manifest = builds.Manifest(
        id=ID,
        target="cpu",
        version="0.3.36",
        sdist_sha256=None,
        native_sha256=native_sha256(),
        compiler="c++ 12",
        cmake_arguments=(),
        created="2026-01-01T00:00:00+00:00",
    )
    root = builds.engines_folder() / ID
    root.mkdir(parents=True)
    (root / "build.json").write_text(json.dumps(asdict(manifest)))
    return root


def test_list_without_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engine", "list"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "`loadmaster engine build`" in shown.err


def test_list_marks_the_one_in_use(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engine", "list"]) == 0
    assert capsys.readouterr().out.startswith(f"* {ID} ")
    assert run(["engine", "list", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["engines"]
    assert one["used"]
    assert one["current"]
    assert one["path"] == str(installed)


def test_an_outdated_build_is_marked(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((installed / "build.json").read_text())
    (installed / "build.json").write_text(json.dumps({**manifest, "native_sha256": "0"}))
    assert run(["engine", "list"]) == 0
    assert "outdated: `loadmaster engine build`" in capsys.readouterr().out


def test_use(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engine", "use", ID]) == 0
    assert builds.chosen_id() == ID
    assert run(["engine", "use", "other"]) == 4
    assert f"installed: `{ID}`" in capsys.readouterr().err


def test_test_of_a_broken_engine_fails(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engine", "test", "--json"]) == 7
    outcome = json.loads(capsys.readouterr().out)
    assert not outcome["passed"]
    assert outcome["checks"][0]["name"] == "loads"


def test_build_says_what_a_gpu_would_need(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = Choice(target="cpu", why="a GPU is here, but nvcc is missing", mend="apt-get …")
    monkeypatch.setattr(build_engine, "choose_target", lambda: choice)
    assert run(["engine", "build"]) == 0  # it is there and current
    shown = capsys.readouterr()
    assert shown.out.startswith(ID)
    assert "nvcc is missing; for the GPU type\n  apt-get …" in shown.err


def test_progress_without_a_terminal_is_a_line_for_every_tenth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Lines()
    report(BuildProgress(step="configure", done=0, total=1))
    report(BuildProgress(step="configure", done=1, total=1))
    for done in range(41):
        report(BuildProgress(step="compile", done=done, total=40))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["configuring", "compiling 0 %", "compiling 10 %"]
    assert len(lines) == 12
