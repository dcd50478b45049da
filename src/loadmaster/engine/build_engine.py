"""Building an engine: source, CMake, self-test, and only then its place among the builds."""

import datetime
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from loadmaster import settings
from loadmaster.engine import toolchain
from loadmaster.engine.build_progress import BuildProgress, Report, ignore
from loadmaster.engine.build_source import PINNED_VERSION, Source, open_source
from loadmaster.engine.build_steps import (
    Tools,
    Workplace,
    cmake_arguments,
    compile_target,
    configure,
    copy_bindings,
    find_tools,
    install,
    open_workplace,
    parallel_jobs,
)
from loadmaster.engine.builds import (
    BUILD_COMMAND,
    MANIFEST,
    Manifest,
    engines_folder,
    is_current,
    list_builds,
    open_build,
    test_build,
)
from loadmaster.engine.native_sources import native_sha256
from loadmaster.engine.toolchain import Target
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import BusyError, EngineMissingError, LoadmasterError
from loadmaster.units import GIB, format_size

# Source, object files and libraries; 0.3 GiB were seen for the CPU.
_DISK_BYTES = {"cpu": GIB, "gpu": 6 * GIB}


def build_engine(
    target: Target,
    source: Path | None = None,
    progress: Report = ignore,
    *,
    force: bool = False,
) -> EngineBuild:
    """Compile an engine and admit it if its self-test passes; one that is there and current stays.

    Raises:
        EngineMissingError: a tool is missing, the compiler failed, or the self-test did.
        NetworkError: the pinned source could not be fetched.
        BusyError: another build is running.
    """
    if source is None and not force:
        current = _current_build(f"{PINNED_VERSION}-{target}")
        if current is not None:
            return current
    toolchain.require(target)
    with building_lock():
        _check_disk(target)
        return _build(target, open_source(source, progress), progress)


def build_for_machine(
    source: Path | None = None, progress: Report = ignore, *, force: bool = False
) -> tuple[EngineBuild, str | None]:
    """Build for this machine's GPU, or for the CPU where that cannot be done.

    The second value says why there is no build for the GPU, and what to type to get one; None
    when there is one, or no GPU.
    """
    choice = choose_target()
    note = f"{choice.why}; for the GPU type\n  {choice.mend}" if choice.mend else None
    try:
        return build_engine(choice.target, source, progress, force=force), note
    except EngineMissingError as error:
        if choice.target == "cpu":
            raise
        note = (
            f"no build for {choice.target}: {error.message}\n{error.hint}; then type\n"
            f"  {BUILD_COMMAND} --{choice.target}"
        )
        return build_engine("cpu", source, progress, force=force), note


def choose_target() -> toolchain.Choice:
    """The target for this machine, and why."""
    return toolchain.choose_target(toolchain.present_gpus(), toolchain.present_tools())


def _current_build(build_id: str) -> EngineBuild | None:
    for build in list_builds():
        if build.id == build_id and is_current(build):
            return build
    return None


def _build(target: Target, source: Source, progress: Report) -> EngineBuild:
    build_id = f"{source.version}-{target}"
    workplace, tools = open_workplace(build_id, source), find_tools()
    arguments = cmake_arguments(target)
    progress(BuildProgress(step="configure", done=0, total=1))
    configure(workplace, source, tools, arguments)
    progress(BuildProgress(step="configure", done=1, total=1))
    compile_target(workplace, tools, "engine", parallel_jobs(target), progress)
    manifest = _manifest(build_id, target, source, arguments, native_sha256(workplace.native))
    with _staging(build_id) as staging:
        _lay_out(staging, workplace, tools, source, manifest)
        progress(BuildProgress(step="test", done=0, total=1))
        _require_passed(staging, manifest, workplace.log)
        _admit(staging, engines_folder() / build_id)
    progress(BuildProgress(step="test", done=1, total=1))
    return open_build(engines_folder() / build_id)


def _manifest(
    build_id: str,
    target: Target,
    source: Source,
    arguments: tuple[str, ...],
    native: str,
) -> Manifest:
    return Manifest(
        id=build_id,
        target=target,
        version=source.version,
        sdist_sha256=source.sha256,
        native_sha256=native,
        compiler=toolchain.first_line_of([str(toolchain.find_compiler()), "--version"]),
        cmake_arguments=arguments,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _lay_out(
    folder: Path, workplace: Workplace, tools: Tools, source: Source, manifest: Manifest
) -> None:
    install(workplace, tools, folder)
    copy_bindings(source, folder)
    shutil.copyfile(workplace.log, folder / "build.log")
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def _require_passed(staging: Path, manifest: Manifest, log: Path) -> None:
    test = test_build(open_build(staging))
    failed = test.failure
    if failed is not None:
        raise EngineMissingError(
            f"the engine `{manifest.id}` failed its self-test and was not installed: "
            f"{failed.name}: {failed.detail}",
            hint=f"the log of the build is `{log}`; a plain `{BUILD_COMMAND} --cpu` builds the "
            f"pinned source {PINNED_VERSION}",
        )


@contextmanager
def _staging(build_id: str) -> Iterator[Path]:
    """A folder beside the builds, gone at the end unless it was renamed."""
    folder = engines_folder() / f".{build_id}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _admit(staging: Path, root: Path) -> None:
    """Rename into place; a running worker keeps the libraries it has mapped."""
    old = root.with_name(f".old-{root.name}-{os.getpid()}")
    if root.exists():
        os.replace(root, old)
    os.replace(staging, root)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def building_lock() -> Iterator[None]:
    """Held while something is compiled in the cache; raises BusyError when another holds it."""
    folder = settings.cache_folder() / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BusyError(
                f"another engine build is running, process {file.read().strip() or 'unknown'}",
                hint=f"wait for it, then `{BUILD_COMMAND}`",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _check_disk(target: Target) -> None:
    need = _DISK_BYTES["cpu" if target == "cpu" else "gpu"]
    engines_folder().mkdir(parents=True, exist_ok=True)
    for folder in (settings.cache_folder(), engines_folder()):
        free = shutil.disk_usage(folder).free
        if free < need:
            raise LoadmasterError(
                f"a build for {target} needs {format_size(need)} of disk, "
                f"`{folder}` has {format_size(free)} free",
                hint=f"free some, or set {settings.HOME.name} to a folder on another disk",
                numbers={"need_bytes": need, "free_bytes": free},
            )
