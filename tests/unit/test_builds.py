"""Which engine is found, chosen and refused; nothing is compiled here."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from loadmaster import settings
from loadmaster.engine import builds, toolchain
from loadmaster.engine.native_sources import native_sha256
from loadmaster.engine.toolchain import Target
from loadmaster.errors import EngineMissingError, NotFoundError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.HOME.name, str(tmp_path))
    monkeypatch.delenv(settings.ENGINE.name, raising=False)
    return tmp_path


def put(version: str, target: Target, *, native: str | None = None) -> str:
    manifest = builds.Manifest(
        id=f"{version}-{target}",
        target=target,
        version=version,
        sdist_sha256=None,
        native_sha256=native or native_sha256(),
        compiler="c++ 12",
        cmake_arguments=("-DGGML_NATIVE=ON",),
        created="2026-01-01T00:00:00+00:00",
    )
    root = builds.engines_folder() / manifest.id
    root.mkdir(parents=True)
    (root / "build.json").write_text(json.dumps(asdict(manifest)))
    return manifest.id


def test_nothing_installed() -> None:
    assert builds.list_builds() == ()
    with pytest.raises(EngineMissingError) as refused:
        builds.find_build()
    assert refused.value.hint == "`loadmaster engine build`"


def test_a_gpu_goes_before_the_cpu_and_a_newer_source_before_an_older() -> None:
    put("0.3.36", "cpu")
    put("0.3.9", "cuda")
    put("0.3.36", "cuda")
    put("0.4.0", "vulkan")
    assert builds.find_build().id == "0.3.36-cuda"
    assert [build.id for build in builds.list_builds()] == [
        "0.3.36-cpu", "0.3.36-cuda", "0.3.9-cuda", "0.4.0-vulkan",
    ]  # fmt: skip


def test_argument_then_environment_then_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    put("0.3.36", "cpu")
    put("0.3.36", "cuda")
    put("0.3.36", "vulkan")
    builds.use_build("0.3.36-vulkan")
    assert builds.find_build().id == "0.3.36-vulkan"
    monkeypatch.setenv(settings.ENGINE.name, "0.3.36-cpu")
    assert builds.find_build().id == "0.3.36-cpu"
    assert builds.find_build("0.3.36-cuda").id == "0.3.36-cuda"


def test_an_unknown_id_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    put("0.3.36", "cpu")
    with pytest.raises(NotFoundError, match=r"no engine `9`; installed: `0\.3\.36-cpu`"):
        builds.use_build("9")
    monkeypatch.setenv(settings.ENGINE.name, "9")
    with pytest.raises(EngineMissingError, match="no engine `9`"):
        builds.find_build()


def test_a_build_of_another_loadmaster_is_not_used() -> None:
    put("0.3.36", "cuda", native="0" * 64)
    with pytest.raises(EngineMissingError, match="another version of loadmaster") as refused:
        builds.find_build()
    assert "loadmaster engine build --cuda" in str(refused.value.hint)


def test_unfinished_and_foreign_folders_are_not_builds(home: Path) -> None:
    build_id = put("0.3.36", "cpu")
    (builds.engines_folder() / build_id).rename(builds.engines_folder() / ".0.3.36-cpu-17")
    (builds.engines_folder() / "notes").mkdir()
    assert builds.list_builds() == ()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"id": "x", "cmake_arguments": []}'])
def test_a_damaged_manifest_says_which_folder_to_remove(text: str) -> None:
    root = builds.engines_folder() / put("0.3.36", "cpu")
    (root / "build.json").write_text(text)
    with pytest.raises(EngineMissingError) as refused:
        builds.find_build()
    assert f"remove `{root}`" in str(refused.value.hint)


def test_gpu_hint_is_for_cpu_builds_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put("0.3.36", "cpu")
    put("0.3.36", "cuda")
    monkeypatch.setattr(toolchain, "present_gpus", lambda: {"cuda", "vulkan"})
    monkeypatch.setattr(toolchain, "find_tool", lambda target: Path("/bin/nvcc"))
    assert builds.gpu_hint(builds.find_build("0.3.36-cpu")) == "loadmaster engine build --cuda"
    assert builds.gpu_hint(builds.find_build("0.3.36-cuda")) is None
    monkeypatch.setattr(toolchain, "present_gpus", set)
    assert builds.gpu_hint(builds.find_build("0.3.36-cpu")) is None


def test_a_selftest_that_dies_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    build_id = put("0.3.36", "cpu")  # has no libraries
    outcome = builds.test_build(builds.find_build(build_id))
    assert not outcome.passed
    assert outcome.failure is not None
    assert outcome.failure.name == "loads"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failure = builds.test_build(builds.find_build(build_id)).failure
    assert failure is not None
    assert failure.detail == "ended with 1"
