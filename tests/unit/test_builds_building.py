"""A build comes into its place whole and tested, or not at all. CMake is a script here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadmaster import settings
from loadmaster.engine import build_engine as building
from loadmaster.engine import builds, toolchain
from loadmaster.engine.build_progress import BuildProgress
from loadmaster.engine.build_source import PINNED_VERSION
from loadmaster.engine.build_steps import Tools, last_lines, parse_progress
from loadmaster.engine.native_sources import NATIVE_FOLDER, native_sha256
from loadmaster.errors import BusyError, EngineMissingError, LoadmasterError

CMAKE = """#!/bin/sh
case "$1" in
    -G) echo configured ;;
    --build) echo "[1/2] one"; echo noise; echo "[2/2] two" ;;
    --install) mkdir -p "$4/lib"; echo library > "$4/lib/libllama.so" ;;
esac
"""
BROKEN = """#!/bin/sh
[ "$1" = --build ] || exit 0
echo "[1/9] one"
echo "x.cpp:7:1: error: no such thing"
exit 2
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.HOME.name, str(tmp_path / "home"))
    monkeypatch.setattr(building, "test_build", outcome(passed=True))
    monkeypatch.setattr(toolchain, "require", lambda target: None)
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    bindings = tmp_path / "tree" / "llama_cpp"
    bindings.mkdir(parents=True)
    (bindings / "__init__.py").write_text('import numpy\n__version__ = "9.9.1"\n')
    for name in ("llama_cpp", "_ctypes_extensions", "llama_cpp_ext"):
        (bindings / f"{name}.py").write_text("")
    llama = tmp_path / "tree" / "vendor" / "llama.cpp"
    llama.mkdir(parents=True)
    (llama / "CMakeLists.txt").write_text("")
    (llama / "LICENSE").write_text("MIT")
    return tmp_path / "tree"


def use_cmake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    cmake = tmp_path / "cmake"
    cmake.write_text(script)
    cmake.chmod(0o755)
    tools = Tools(cmake=cmake, ninja=Path("ninja"), environment={"PATH": "/usr/bin:/bin"})
    monkeypatch.setattr(building, "find_tools", lambda: tools)


def outcome(*, passed: bool) -> Callable[[object], builds.SelfTest]:
    check = builds.Check(name="tokens", passed=passed, detail="[1], expected [2]")
    return lambda build: builds.SelfTest(build_id="x", checks=(check,), took_s=0.1)


def test_a_build_is_laid_out_and_admitted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cmake(monkeypatch, tmp_path, CMAKE)
    seen: list[BuildProgress] = []
    build = building.build_engine("cpu", source, seen.append)
    assert build.id == "9.9.1-cpu"
    assert (build.lib_dir / "libllama.so").read_text() == "library\n"
    assert (build.python_dir / "llama_cpp" / "__init__.py").read_text() == ""
    assert (build.root / "licences" / "llama.cpp.txt").read_text() == "MIT"
    assert json.loads((build.root / "build.json").read_text())["native_sha256"]
    assert builds.find_build() == build
    assert [(p.done, p.total) for p in seen if p.step == "compile"] == [(1, 2), (2, 2)]


def test_a_failed_selftest_leaves_the_old_build(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cmake(monkeypatch, tmp_path, CMAKE)
    old = building.build_engine("cpu", source)
    (old.root / "mark").write_text("old")
    monkeypatch.setattr(building, "test_build", outcome(passed=False))
    with pytest.raises(EngineMissingError, match=r"not installed: tokens: \[1\], expected \[2\]"):
        building.build_engine("cpu", source)
    assert (old.root / "mark").read_text() == "old"
    assert [p.name for p in builds.engines_folder().iterdir()] == ["9.9.1-cpu"]


def test_a_new_build_replaces_the_old_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cmake(monkeypatch, tmp_path, CMAKE)
    (building.build_engine("cpu", source).root / "mark").write_text("old")
    assert not (building.build_engine("cpu", source).root / "mark").exists()
    assert [p.name for p in builds.engines_folder().iterdir()] == ["9.9.1-cpu"]


def test_a_compiler_error_is_shown_and_nothing_is_installed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cmake(monkeypatch, tmp_path, BROKEN)
    with pytest.raises(EngineMissingError, match="while compiling") as refused:
        building.build_engine("cpu", source)
    assert "x.cpp:7:1: error: no such thing" in refused.value.message
    log = Path(str(refused.value.hint).split("`")[1])
    assert "[1/9] one" in log.read_text()
    assert builds.list_builds() == ()


def test_a_gpu_build_that_fails_gives_the_cpus_and_the_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(target: str) -> None:
        if target == "cuda":
            raise EngineMissingError("cublas is missing", hint="install it")

    use_cmake(monkeypatch, tmp_path, CMAKE)
    monkeypatch.setattr(toolchain, "require", require)
    monkeypatch.setattr(
        building, "choose_target", lambda: toolchain.Choice(target="cuda", why="a GPU is here")
    )
    build, note = building.build_for_machine(source)
    assert build.target == "cpu"
    assert note is not None
    assert "cublas is missing" in note
    assert note.endswith("loadmaster engine build --cuda")


def test_a_current_build_of_the_pinned_source_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "llama_cpp" / "__init__.py").write_text(f'__version__ = "{PINNED_VERSION}"\n')
    use_cmake(monkeypatch, tmp_path, CMAKE)
    built = building.build_engine("cpu", source)
    monkeypatch.setattr(building, "open_source", lambda *_: pytest.fail("it was built again"))
    assert building.build_engine("cpu") == built


def test_two_builds_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: object) -> Tools:
        building.build_engine("cpu", source)
        return pytest.fail("two builds ran at once")

    monkeypatch.setattr(building, "find_tools", second)
    with pytest.raises(BusyError, match=r"process \d+"):
        building.build_engine("cpu", source)


def test_a_full_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=17))
    with pytest.raises(LoadmasterError, match=r"needs 1\.00 GiB of disk, .* has 17 B free"):
        building.build_engine("cpu", source)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("[12/80] Building CXX", (12, 80)), ("[100%] Built", None), ("-- Found", None), ("", None)],
)
def test_parse_progress(line: str, expected: tuple[int, int] | None) -> None:
    assert parse_progress(line) == expected


def test_last_lines_start_at_the_first_error() -> None:
    noise = [f"[{n}/40] Building error.cpp" for n in range(40)]
    text = "\n".join([*noise[:20], "a.cu:1: error: x", *noise[20:]])
    assert last_lines(text).splitlines()[0] == "  a.cu:1: error: x"
    assert last_lines("\n".join(noise)).splitlines()[-1] == f"  {noise[-1]}"


def test_the_digest_follows_the_native_sources(tmp_path: Path) -> None:
    copy = tmp_path / "native"
    shutil.copytree(NATIVE_FOLDER, copy)
    assert native_sha256(copy) == native_sha256()
    with (copy / "virtual_device.cpp").open("a") as file:
        file.write("\n")
    assert native_sha256(copy) != native_sha256()
