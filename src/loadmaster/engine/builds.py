"""Engine builds side by side: which llama.cpp, for which device, from which source.

A build is a folder under the user's data: `lib/` (libllama, the ggml backends, our native
library), `python/` (the ctypes layer of the same source), `licences/`, `build.json`. It comes into
its place by one rename, after its self-test has passed, so a folder that is there works.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from loadmaster import settings
from loadmaster.engine import toolchain
from loadmaster.engine.native_sources import native_sha256
from loadmaster.engine.toolchain import TARGETS, Target
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import EngineMissingError, NotFoundError

BUILD_COMMAND = "loadmaster engine build"

MANIFEST = "build.json"
_DEFAULT = "default"  # a file with the id that `loadmaster engine use` chose
_SELFTEST_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Where a build is from; `build.json` in its folder."""

    id: str
    target: Target
    version: str
    sdist_sha256: str | None  # None: from a folder the user gave
    native_sha256: str
    compiler: str
    cmake_arguments: tuple[str, ...]
    created: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing the self-test looked at."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The outcome of testing a build."""

    build_id: str
    checks: tuple[Check, ...]
    took_s: float

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failure(self) -> Check | None:
        """The first check that did not pass."""
        return next((check for check in self.checks if not check.passed), None)


# ---- what is there


def engines_folder() -> Path:
    """Where builds are kept; it may not exist yet."""
    return settings.data_folder() / "engines"


def list_builds() -> tuple[EngineBuild, ...]:
    """Every installed build, by id."""
    folder = engines_folder()
    if not folder.is_dir():
        return ()
    roots = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return tuple(open_build(root) for root in roots if (root / MANIFEST).is_file())


def open_build(root: Path) -> EngineBuild:
    manifest = _read_manifest(root)
    return EngineBuild(id=manifest.id, target=manifest.target, version=manifest.version, root=root)


def read_manifest(build: EngineBuild) -> Manifest:
    """Where `build` is from."""
    return _read_manifest(build.root)


def _read_manifest(root: Path) -> Manifest:
    try:
        known = json.loads((root / MANIFEST).read_text())
        return Manifest(**{**known, "cmake_arguments": tuple(known["cmake_arguments"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EngineMissingError(
            f"`{root / MANIFEST}` cannot be read: {error}",
            hint=f"remove `{root}` and `{BUILD_COMMAND}`",
        ) from error


def is_current(build: EngineBuild) -> bool:
    """Whether the build's native library is of this version of loadmaster."""
    return read_manifest(build).native_sha256 == native_sha256()


def find_build(build_id: str | None = None) -> EngineBuild:
    """The build with this id; without one LOADMASTER_ENGINE's, the chosen one, or the first
    of cuda, rocm, vulkan, metal and cpu, newest source first.

    Raises:
        EngineMissingError: there is none, or its native library is of another loadmaster.
    """
    builds = list_builds()
    wanted = build_id or settings.ENGINE.value or chosen_id()
    build = _named(wanted, builds) if wanted else _preferred(builds)
    if build is None:
        raise EngineMissingError("no engine is built yet", hint=f"`{BUILD_COMMAND}`")
    if not is_current(build):
        raise EngineMissingError(
            f"the engine `{build.id}` was built by another version of loadmaster",
            hint=f"`{BUILD_COMMAND} --{build.target}` brings it up to date",
        )
    return build


def _named(build_id: str, builds: tuple[EngineBuild, ...]) -> EngineBuild:
    for build in builds:
        if build.id == build_id:
            return build
    known = ", ".join(f"`{build.id}`" for build in builds) or "none"
    raise EngineMissingError(
        f"there is no engine `{build_id}`; installed: {known}",
        hint="`loadmaster engine list`, `loadmaster engine use ID`",
    )


def _preferred(builds: tuple[EngineBuild, ...]) -> EngineBuild | None:
    def rank(build: EngineBuild) -> tuple[int, ...]:
        return (-TARGETS.index(read_manifest(build).target), *_version_key(build.version))

    return max(builds, key=rank, default=None)


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def chosen_id() -> str | None:
    """The id that `use_build` wrote, if any."""
    try:
        return (engines_folder() / _DEFAULT).read_text().strip() or None
    except OSError:
        return None


def use_build(build_id: str) -> EngineBuild:
    """Make `build_id` the default; raises NotFoundError when it is not installed."""
    if all(build.id != build_id for build in list_builds()):
        known = ", ".join(f"`{build.id}`" for build in list_builds()) or "none"
        raise NotFoundError(
            f"there is no engine `{build_id}`; installed: {known}", hint=f"`{BUILD_COMMAND}`"
        )
    fresh = engines_folder() / f".{_DEFAULT}-{os.getpid()}"
    fresh.write_text(f"{build_id}\n")
    os.replace(fresh, engines_folder() / _DEFAULT)
    return find_build(build_id)


def gpu_hint(build: EngineBuild) -> str | None:
    """The command that would give a build for this machine's GPU; None when `build` has one or
    there is no GPU. (llama.cpp's users know the state as `BLAS = 0`.)"""
    if build.target != "cpu":
        return None
    gpus = toolchain.present_gpus()
    for target in TARGETS:
        if target in gpus:
            return toolchain.mend_command(target)
    return None


# ---- test


def test_build(build: EngineBuild) -> SelfTest:
    """Run the self-test in a process of its own."""
    start = time.monotonic()
    checks = _run_selftest(build.root)
    return SelfTest(build_id=build.id, checks=checks, took_s=time.monotonic() - start)


def _run_selftest(root: Path) -> tuple[Check, ...]:
    demo = Path(__file__).parents[1] / "data" / "demo.gguf"
    command = [sys.executable, "-P", "-m", "loadmaster.engine.selftest", str(root)]
    command += [str(demo)] if demo.is_file() else []
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment,
            timeout=_SELFTEST_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return (Check(name="ends", passed=False, detail=f"not within {_SELFTEST_TIMEOUT_S} s"),)
    if done.returncode != 0:
        return (Check(name="ends", passed=False, detail=_last_words(done)),)
    return tuple(Check(**check) for check in json.loads(done.stdout.splitlines()[-1])["checks"])


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    said = [line for line in done.stderr.splitlines() if line.strip()]
    words = f": {said[-1]}" if said else ""
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}{words}"
    return f"ended with {done.returncode}{words}"
