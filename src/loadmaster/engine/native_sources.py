"""The C++ sources that every engine build has compiled into it."""

import hashlib
from pathlib import Path

NATIVE_FOLDER = Path(__file__).parents[1] / "native"


def native_sources(folder: Path = NATIVE_FOLDER) -> list[Path]:
    """What CMake reads, in a fixed order."""
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), folder / "CMakeLists.txt"])


def native_sha256(folder: Path = NATIVE_FOLDER) -> str:
    """The digest of the sources, of this version of loadmaster or of a copy."""
    digest = hashlib.sha256()
    for path in native_sources(folder):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
