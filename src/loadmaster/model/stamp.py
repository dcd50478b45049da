"""The identity of a model's files: what was planned is what gets loaded."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from loadmaster.errors import ModelChangedError, NotFoundError
from loadmaster.model.checkpoint import AnyModel
from loadmaster.model.types import FileStamp
from loadmaster.units import Bytes


def file_stamp(path: Path) -> FileStamp:
    """The stamp of a file as it is now.

    Raises:
        NotFoundError: there is none, or it cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        lost = "the link leads nowhere: " if path.is_symlink() else ""
        raise NotFoundError(
            f"cannot read `{path}`: {error.strerror}", hint=f"{lost}download the model again"
        ) from None
    return FileStamp(
        path=path,
        size_bytes=Bytes(status.st_size),
        device=status.st_dev,
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
    )


def stamp_of(files: Iterable[FileStamp]) -> str:
    """A digest of sizes, devices, inodes and times, in order."""
    digest = hashlib.sha256()
    for file in files:
        line = f"{file.size_bytes} {file.device} {file.inode} {file.mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:32]


def model_stamp(model: AnyModel) -> str:
    """The digest of a model's files when its header was read."""
    return stamp_of(model.files)


def current_stamp(paths: Iterable[Path]) -> str:
    """The digest of the files as they are now.

    Raises:
        NotFoundError: one of them is gone.
    """
    return stamp_of(file_stamp(path) for path in paths)


def check_unchanged(paths: Iterable[Path], planned: str) -> None:
    """Compare the files with the digest they were planned under.

    Raises:
        ModelChangedError: they differ, or one is gone.
    """
    paths = tuple(paths)
    try:
        found = current_stamp(paths)
    except NotFoundError as error:
        raise ModelChangedError(error.message, hint="plan the model again") from None
    if found != planned:
        name = paths[0].name if len(paths) == 1 else paths[0].parent.name
        what = f"`{name}`" if len(paths) == 1 else f"one of the {len(paths)} files in `{name}`"
        raise ModelChangedError(
            f"{what} changed on disk after it was planned",
            hint="plan it again: the numbers of the old plan do not hold for the new file",
        )
