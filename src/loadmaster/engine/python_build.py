"""The engine that is not compiled: torch, transformers and bitsandbytes of this Python environment.

They are looked for, not imported: that takes seconds, and is the worker's to do.
"""

import sys
from importlib import metadata, util
from pathlib import Path

from loadmaster.engine.types import EngineBuild
from loadmaster.errors import EngineMissingError

TRANSFORMERS = "transformers"
# What the adapter was written against; older ones lack what it calls, or run code of a config
# (CVE-2026-4372, transformers 4.56–5.2).
LEAST = {
    "torch": (2, 10), "transformers": (5, 23), "accelerate": (1, 15), "bitsandbytes": (0, 50),
    "safetensors": (0, 5), "tokenizers": (0, 21),
}  # fmt: skip
INSTALL = '`pip install "loadmaster[hf]"`'


def find_python_build() -> EngineBuild:
    """The environment as a build: its versions, and whether torch has a GPU's libraries.

    Raises:
        EngineMissingError: a package is missing or too old.
    """
    versions = {package: _version(package) for package in LEAST}
    for package, version in versions.items():
        if version is None:
            raise EngineMissingError(
                f"safetensors models need the Python package `{package}`, which is not installed",
                hint=f"{INSTALL} installs it; a GGUF of the model needs none of it",
            )
        least = LEAST[package]
        if _numbers(version) < least:
            raise EngineMissingError(
                f"`{package}` is {version}, {'.'.join(map(str, least))} or newer is needed",
                hint=f"{INSTALL} brings it up to date",
            )
    named = (
        f"{package} {versions[package]}" for package in ("torch", TRANSFORMERS, "bitsandbytes")
    )
    return EngineBuild(
        id=f"{TRANSFORMERS}-{versions[TRANSFORMERS]}",
        target=_target(),
        version=", ".join(named),
        root=Path(sys.prefix),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13)."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


def _target() -> str:
    """`cuda`, `rocm` or `cpu`, by the libraries that torch brings."""
    found = util.find_spec("torch")
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    for target, name in (("cuda", "libtorch_cuda.so"), ("rocm", "libtorch_hip.so")):
        if any((folder / "lib" / name).exists() for folder in folders):
            return target
    return "cpu"
