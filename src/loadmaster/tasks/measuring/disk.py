"""Sequential reads from the disk that models are on."""

import contextlib
import mmap
import os
import tempfile
import time
from pathlib import Path

from loadmaster.units import MIB

_DISK_BYTES = 256 * MIB
_DISK_BLOCK_BYTES = 8 * MIB


def disk_read_bytes_s(folder: Path, size_bytes: int = _DISK_BYTES) -> float | None:
    """Sequential reads of a file that is not in the page cache; None where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".measure-") as file:
            block = os.urandom(_DISK_BLOCK_BYTES)
            for _ in range(max(1, size_bytes // _DISK_BLOCK_BYTES)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _read_uncached(Path(file.name))
    except OSError:
        return None


def _read_uncached(path: Path) -> float:
    """Read with O_DIRECT; where the file system has none, with its pages dropped beforehand."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, _DISK_BLOCK_BYTES) as buffer:  # page-aligned, as O_DIRECT wants it
            total, start = 0, time.perf_counter()
            while count := os.readv(descriptor, [buffer]):
                total += count
            return total / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
