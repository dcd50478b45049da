"""The source an engine is compiled from: a llama-cpp-python sdist, pinned, or one the user gives.

Its ctypes layer and the llama.cpp inside it belong together: the structs are the same.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loadmaster import settings
from loadmaster.engine.build_progress import BuildProgress, Report
from loadmaster.errors import DamagedFileError, EngineMissingError, NetworkError, UsageError

PACKAGE = "llama-cpp-python"
PINNED_VERSION = "0.3.36"
PINNED_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# Half of the tree is not needed to compile it.
_LEFT_OUT = frozenset(
    map(
        PurePosixPath,
        (
            *(".git", ".github", "docs", "docker", "examples", "tests"),
            *(f"vendor/llama.cpp/{name}" for name in ("benches", "ci", "conversion", "docs")),
            *(f"vendor/llama.cpp/{name}" for name in ("examples", "gguf-py", "media", "models")),
            *(f"vendor/llama.cpp/{name}" for name in ("pocs", "requirements", "skills", "tests")),
        ),
    )
)
SDIST_NAME = f"{PACKAGE.replace('-', '_')}-{PINNED_VERSION}.tar.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An unpacked llama-cpp-python source tree."""

    folder: Path
    version: str
    sha256: str | None  # of the sdist; None for a folder the user gave

    @property
    def llama_cpp(self) -> Path:
        return self.folder / "vendor" / "llama.cpp"

    @property
    def bindings(self) -> Path:
        return self.folder / "llama_cpp"


def open_source(given: Path | None, report: Report) -> Source:
    """The pinned source, fetched when it is not in the cache; or the sdist or folder `given`.

    Raises:
        NetworkError: the pinned sdist could not be fetched.
        DamagedFileError: an archive is not what it claims to be.
        UsageError: `given` is neither an sdist nor an unpacked one.
    """
    if given is not None and given.is_dir():
        return _from_folder(given.resolve(), None)
    if given is not None:
        return _from_sdist(given, sha256_of(given), report)
    return _from_sdist(_pinned_sdist(report), PINNED_SHA256, report)


def _from_folder(folder: Path, sha256: str | None) -> Source:
    init = folder / "llama_cpp" / "__init__.py"
    if not init.is_file() or not (folder / "vendor" / "llama.cpp" / "CMakeLists.txt").is_file():
        raise UsageError(
            f"`{folder}` is not an unpacked {PACKAGE} sdist",
            hint="it must hold llama_cpp/ and vendor/llama.cpp/",
        )
    match = re.search(r"""__version__\s*=\s*["']([\w.+-]+)["']""", init.read_text())
    if match is None:
        raise UsageError(f"`{init}` has no version", hint=f"take the sdist of {PACKAGE}")
    return Source(folder=folder, version=match[1], sha256=sha256)


# ---- fetch


def _pinned_sdist(report: Report) -> Path:
    folder = settings.cache_folder() / "engine" / "sdist"
    sdist = folder / SDIST_NAME
    if not (sdist.is_file() and sha256_of(sdist) == PINNED_SHA256):
        report(BuildProgress(step="fetch", done=0, total=1))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            _pip_download(Path(fresh))
            _verify(Path(fresh) / sdist.name)
            os.replace(Path(fresh) / sdist.name, sdist)
    report(BuildProgress(step="fetch", done=1, total=1))
    return sdist


def _pip_download(folder: Path) -> None:
    # pip knows the user's index, proxy and certificates; we do not.
    run_pip(
        "download", "--no-deps", "--no-binary", PACKAGE, "-d", str(folder),
        f"{PACKAGE}=={PINNED_VERSION}",
        failed=f"{PACKAGE} {PINNED_VERSION} could not be downloaded",
    )  # fmt: skip


def run_pip(*words: str, failed: str) -> None:
    """Run pip in this Python; a failure is a NetworkError with pip's last words."""
    if importlib.util.find_spec("pip") is None:
        raise EngineMissingError(
            "this Python has no pip, which fetches the engine's source",
            hint=f"`{sys.executable} -m ensurepip`, or give the sdist: "
            f"`loadmaster engine build --source {SDIST_NAME}`",
        )
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NetworkError(
            f"{failed}: {lines[-1] if lines else f'pip ended with {done.returncode}'}",
            hint="check the connection and the proxy, or fetch the sdist elsewhere and "
            "`loadmaster engine build --source FILE`",
        )


def _verify(sdist: Path) -> None:
    if not sdist.is_file():
        raise NetworkError(f"pip downloaded no `{sdist.name}`")
    found = sha256_of(sdist)
    if found != PINNED_SHA256:
        raise DamagedFileError(
            f"`{sdist.name}` has sha256 {found[:12]}…, expected {PINNED_SHA256[:12]}…",
            code="checksum_mismatch",
            hint="the index you use serves another file under this version; do not build it",
        )


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- unpack


def _from_sdist(sdist: Path, sha256: str, report: Report) -> Source:
    folder = settings.cache_folder() / "engine" / f"source-{sha256[:12]}"
    if not folder.is_dir():
        report(BuildProgress(step="unpack", done=0, total=1))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            _unpack(sdist, Path(fresh) / "tree")
            os.replace(Path(fresh) / "tree", folder)
    report(BuildProgress(step="unpack", done=1, total=1))
    return _from_folder(folder, sha256)


def _unpack(sdist: Path, folder: Path) -> None:
    try:
        with tarfile.open(sdist) as archive:
            for member, path in _wanted(archive):
                _write(archive, member, folder / path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DamagedFileError(
            f"`{sdist}` cannot be unpacked: {error}",
            code="damaged_archive",
            hint=f"fetch it again: `pip download --no-binary {PACKAGE} {PACKAGE}`",
        ) from error
    if not folder.is_dir():
        raise UsageError(f"`{sdist}` holds no source tree", hint=f"give the sdist of {PACKAGE}")


def _wanted(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath]]:
    """Regular files of the tree, without its top folder; links and devices are left out."""
    for member in archive:
        path = PurePosixPath(member.name)
        if not member.isfile() or path.is_absolute() or ".." in path.parts:
            continue
        inner = path.relative_to(path.parts[0])
        if inner.parts and not _LEFT_OUT.intersection((inner, *inner.parents)):
            yield member, inner


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(member)
    assert content is not None  # a regular file
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)
