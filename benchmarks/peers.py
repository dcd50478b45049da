"""llama.cpp's own tools, built once from the engine's source and with its flags.

`python -m benchmarks.peers [--cuda]` prints one JSON object with their paths last. They live in the
user's cache.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from loadmaster.engine.build_engine import building_lock
from loadmaster.engine.build_progress import BuildProgress, Report, ignore
from loadmaster.engine.build_source import open_source
from loadmaster.engine.build_steps import (
    cmake_arguments,
    compile_target,
    configure,
    find_tools,
    open_workplace,
    parallel_jobs,
)
from loadmaster.engine.toolchain import Target, require

TOOLS = ("llama-bench", "llama-server", "llama-fit-params")


def build_peers(
    target: Target = "cpu", names: Iterable[str] = TOOLS, progress: Report = ignore
) -> dict[str, Path]:
    """Compile the tools that are not there yet; name → executable."""
    require(target)
    with building_lock():
        return _build(target, tuple(names), progress)


def _build(target: Target, names: tuple[str, ...], progress: Report) -> dict[str, Path]:
    source = open_source(None, progress)
    workplace, tools = open_workplace(f"peers-{source.version}-{target}", source), find_tools()
    paths = {name: workplace.build / "bin" / name for name in names}
    if not all(path.is_file() for path in paths.values()):
        arguments = (*cmake_arguments(target), "-DLOADMASTER_PEERS=ON")
        configure(workplace, source, tools, arguments)
        for name in paths:
            compile_target(workplace, tools, name, parallel_jobs(target), progress)
    return paths


def _show(progress: BuildProgress) -> None:
    print(f"\r{progress.step} {progress.done}/{progress.total}  ", end="", file=sys.stderr)


if __name__ == "__main__":
    chosen: Target = "cuda" if "--cuda" in sys.argv else "cpu"
    built = build_peers(chosen, progress=_show)
    print(file=sys.stderr)
    print(json.dumps({name: str(path) for name, path in built.items()}))
