"""Compiling an engine: find CMake, configure, compile, and lay the result out in a folder."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadmaster import settings
from loadmaster.engine import toolchain
from loadmaster.engine.build_progress import BuildProgress, Report
from loadmaster.engine.build_source import Source, run_pip
from loadmaster.engine.native_sources import NATIVE_FOLDER, native_sources
from loadmaster.engine.toolchain import Target
from loadmaster.errors import EngineMissingError
from loadmaster.units import GIB

_BUILD_TOOLS = NATIVE_FOLDER / "build-tools.txt"
_OLDEST_CMAKE = (3, 21)

_GPU_ARGUMENTS: Mapping[Target, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "rocm": ("-DGGML_HIP=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
}
# The largest translation units, as seen with g++ 12 and nvcc 13.
_JOB_BYTES: Mapping[str, int] = {"cpu": GIB, "gpu": 3 * GIB}
_LAST_LINES = 12
# Turing and newer, for a build on a machine without the card; with it, the card's own alone.
_CUDA_ARCHITECTURES = "75-virtual;80-virtual;86-real;89-real;90-virtual"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """CMake and Ninja, and the environment they run in."""

    cmake: Path
    ninja: Path
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where one build is compiled; kept in the cache, so that the next one is incremental."""

    folder: Path
    log: Path

    @property
    def native(self) -> Path:
        return self.folder / "native"

    @property
    def build(self) -> Path:
        return self.folder / "build"


def open_workplace(name: str, source: Source) -> Workplace:
    """The folder for compiling `name` from `source`, with the native sources copied into it."""
    # CMake refuses a build folder that has seen another source folder.
    key = hashlib.sha256(str(source.folder).encode()).hexdigest()[:8]
    folder = settings.cache_folder() / "engine" / "work" / f"{name}-{key}"
    workplace = Workplace(folder=folder, log=folder / "build.log")
    workplace.native.mkdir(parents=True, exist_ok=True)
    for path in native_sources():
        copy = workplace.native / path.name
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)  # only when changed: Ninja goes by time
    workplace.log.write_text("")
    return workplace


# ---- tools


def find_tools() -> Tools:
    """CMake and Ninja from PATH; else their wheels, installed once into the cache."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake and ninja and _cmake_version(cmake) >= _OLDEST_CMAKE:
        return Tools(cmake=Path(cmake), ninja=Path(ninja), environment=os.environ.copy())
    return _private_tools()


def _cmake_version(cmake: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)", toolchain.first_line_of([cmake, "--version"]))
    return (int(match[1]), int(match[2])) if match else ()


def _private_tools() -> Tools:
    digest = hashlib.sha256(_BUILD_TOOLS.read_bytes()).hexdigest()[:12]
    folder = settings.cache_folder() / "engine" / f"tools-{digest}"
    cmake, ninja = folder / "bin" / "cmake", folder / "bin" / "ninja"
    if not (cmake.is_file() and ninja.is_file()):
        run_pip(
            "install", "--require-hashes", "--no-deps", "--upgrade", "--target", str(folder),
            "-r", str(_BUILD_TOOLS),
            failed="cmake and ninja are not installed, and their wheels could not be fetched",
        )  # fmt: skip
    # The wheel's `cmake` is a Python script that imports the package beside it.
    return Tools(cmake=cmake, ninja=ninja, environment={**os.environ, "PYTHONPATH": str(folder)})


# ---- configure and compile


def cmake_arguments(target: Target) -> tuple[str, ...]:
    """What an engine for `target` is configured with, apart from folders."""
    tool = toolchain.find_tool(target)
    arguments = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *_GPU_ARGUMENTS[target])
    if target == "cuda" and tool is not None:
        arguments = (*arguments, f"-DCMAKE_CUDA_COMPILER={tool}")
    if target == "cuda" and "cuda" not in toolchain.present_gpus():
        arguments = (*arguments, f"-DCMAKE_CUDA_ARCHITECTURES={_CUDA_ARCHITECTURES}")
    return arguments


def configure(workplace: Workplace, source: Source, tools: Tools, arguments: Sequence[str]) -> None:
    """Run CMake; raises EngineMissingError with its last words."""
    command = [
        str(tools.cmake), "-G", "Ninja", "-S", str(workplace.native), "-B", str(workplace.build),
        f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", f"-DLLAMA_SOURCE={source.llama_cpp}", *arguments,
    ]  # fmt: skip
    _run(command, workplace, tools, "configuring")


def compile_target(
    workplace: Workplace, tools: Tools, name: str, jobs: int, report: Report
) -> None:
    """Compile a target of the configured folder; raises EngineMissingError with the error."""
    command = [str(tools.cmake), "--build", str(workplace.build), "--target", name]
    for done, total in _progress(_lines([*command, "--parallel", str(jobs)], workplace, tools)):
        report(BuildProgress(step="compile", done=done, total=total))


def install(workplace: Workplace, tools: Tools, folder: Path) -> None:
    """Copy the compiled libraries to `folder`/lib."""
    command = [str(tools.cmake), "--install", str(workplace.build), "--prefix", str(folder)]
    _run([*command, "--component", "engine"], workplace, tools, "installing")


def parallel_jobs(target: Target) -> int:
    """One compiler per processor, as far as memory goes."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job_bytes = _JOB_BYTES["cpu" if target == "cpu" else "gpu"]
    return max(1, min(cpus, psutil.virtual_memory().available // job_bytes))


def _progress(lines: Iterator[str]) -> Iterator[tuple[int, int]]:
    for line in lines:
        counted = parse_progress(line)
        if counted is not None:
            yield counted


def parse_progress(line: str) -> tuple[int, int] | None:
    """The `[12/80]` that Ninja puts before each finished piece."""
    match = re.match(r"\[(\d+)/(\d+)\] ", line)
    return (int(match[1]), int(match[2])) if match else None


def _run(command: list[str], workplace: Workplace, tools: Tools, doing: str) -> None:
    for _ in _lines(command, workplace, tools, doing):
        pass


def _lines(
    command: list[str], workplace: Workplace, tools: Tools, doing: str = "compiling"
) -> Iterator[str]:
    """Run a command and give its lines, which go to the log as well."""
    environment = {**tools.environment, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    with (
        workplace.log.open("a") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                yield line
        except BaseException:
            process.terminate()  # Ninja stops its compilers
            raise
    if process.returncode != 0:
        raise _failure(doing, workplace.log)


def _failure(doing: str, log: Path) -> EngineMissingError:
    last = last_lines(log.read_text(errors="replace"))
    return EngineMissingError(
        f"the engine could not be built, it failed while {doing}:\n\n{last}\n",
        hint=f"the whole log is `{log}`",
    )


def last_lines(text: str) -> str:
    """The lines that tell why: from the first error on, else the last ones."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    wrong = [n for n, line in enumerate(lines) if re.search(r"\berror:|FAILED:|CMake Error", line)]
    start = wrong[0] if wrong else max(0, len(lines) - _LAST_LINES)
    return "\n".join(f"  {line[:200]}" for line in lines[start : start + _LAST_LINES])


# ---- lay out


def copy_bindings(source: Source, folder: Path) -> None:
    """The ctypes layer alone, under an empty package: the rest imports numpy and diskcache."""
    package = folder / "python" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("llama_cpp.py", "_ctypes_extensions.py", "llama_cpp_ext.py"):
        shutil.copyfile(source.bindings / name, package / name)
    licences = folder / "licences"
    licences.mkdir()
    for name, path in (
        ("llama-cpp-python.md", source.folder / "LICENSE.md"),
        ("llama.cpp.txt", source.llama_cpp / "LICENSE"),
    ):
        if path.is_file():
            shutil.copyfile(path, licences / name)
    command = [sys.executable, "-m", "compileall", "-q", str(package)]
    subprocess.run(command, check=False, capture_output=True)  # saves 0.3 s at the first start
