"""Files that appear whole or not at all: a temporary one, synced, renamed, its folder synced."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from loadmaster.errors import LoadmasterError


class OutputError(LoadmasterError):
    """A results file cannot be written; the results themselves are in the job's store."""

    code = "output"


def write_lines(path: Path, lines: Iterable[bytes], *, hint: str | None = None) -> int:
    """Write a file of lines atomically; how many there were.

    Raises:
        OutputError: it cannot be written; what was there before still is.
    """
    count = 0
    with atomic_file(path, hint=hint) as file:
        for line in lines:
            file.write(line + b"\n")
            count += 1
    return count


@contextmanager
def atomic_file(path: Path, *, hint: str | None = None) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place when the block ends well, and leaves no trace otherwise."""
    temporary: Path | None = None
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), _mode(path))
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write `{path}`: {reason}", hint=hint) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def check_writable(path: Path) -> None:
    """Find out now whether `path` can be written when the work is done.

    Raises:
        OutputError: it cannot.
    """
    hint = "name another output file with `-o`"
    if path.is_dir():
        raise OutputError(f"cannot write `{path}`: it is a folder", hint=hint)
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"cannot write `{path}`: it is read-only", hint=hint)
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(fd)
        Path(name).unlink()
    except OSError as error:
        raise OutputError(f"cannot write `{path}`: {error.strerror}", hint=hint) from None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _mode(path: Path) -> int:
    """As the file it replaces; a new one is for its owner: prompts and answers are private."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    return 0o600
