"""The sdist: fetched, verified, unpacked; and what is refused."""

import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import pytest

from loadmaster import settings
from loadmaster.engine import build_source
from loadmaster.engine.build_progress import ignore
from loadmaster.engine.build_source import open_source
from loadmaster.errors import DamagedFileError, EngineMissingError, NetworkError, UsageError

TREE = {
    "llama_cpp/__init__.py": '__version__ = "9.9.1"\n',
    "vendor/llama.cpp/CMakeLists.txt": "",
    "vendor/llama.cpp/tests/big.txt": "left out",
    "vendor/llama.cpp/src/tests.cpp": "kept",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.HOME.name, str(tmp_path / "home"))
    return tmp_path / "home"


def pack(path: Path, tree: dict[str, str], *, top: str = "llama_cpp_python-9.9.1") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in tree.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_an_sdist_is_unpacked_without_what_is_not_compiled(tmp_path: Path) -> None:
    source = open_source(pack(tmp_path / "x.tar.gz", TREE), ignore)
    assert source.version == "9.9.1"
    assert source.sha256 == build_source.sha256_of(tmp_path / "x.tar.gz")
    assert (source.llama_cpp / "src" / "tests.cpp").read_text() == "kept"
    assert not (source.llama_cpp / "tests").exists()


def test_an_sdist_cannot_write_outside_its_folder(tmp_path: Path, home: Path) -> None:
    sdist = pack(tmp_path / "x.tar.gz", {**TREE, "../../../escaped": "no"})
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("top/llama_cpp")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    open_source(sdist, ignore)
    assert not list(tmp_path.rglob("escaped"))
    with pytest.raises(UsageError, match="holds no source tree"):
        open_source(tmp_path / "link.tar", ignore)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, text in TREE.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    source = open_source(tmp_path / "tree", ignore)
    assert (source.version, source.sha256) == ("9.9.1", None)


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an unpacked llama-cpp-python sdist"):
        open_source(tmp_path, ignore)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b\x08\0\0\0\0\0"])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(DamagedFileError) as refused:
        open_source(tmp_path / "x.tar.gz", ignore)
    assert refused.value.code == "damaged_archive"


def test_another_file_under_the_pinned_version_is_not_built(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    def download(folder: Path) -> None:
        pack(folder / build_source.SDIST_NAME, TREE)

    monkeypatch.setattr(build_source, "_pip_download", download)
    with pytest.raises(DamagedFileError, match="expected 832db0699007") as refused:
        open_source(None, ignore)
    assert refused.value.code == "checksum_mismatch"
    assert not list(home.rglob("*.tar.gz"))


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineMissingError, match="has no pip") as refused:
        open_source(None, ignore)
    assert "ensurepip" in str(refused.value.hint)


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(NetworkError, match=r"could not be downloaded: pip ended with 1$"):
        open_source(None, ignore)
