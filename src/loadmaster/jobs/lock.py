"""Who works on a job: a lock that the kernel gives up when its owner dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loadmaster.errors import BusyError
from loadmaster.jobs.database import failures

FILE_NAME = "owner.lock"


class JobLock:
    """An exclusive lock on a job's folder. The file stays; only the lock on it counts."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            BusyError: another process has it.
            JobStoreError: the disk refused.
        """
        with failures(folder):
            # Not inherited: a worker that outlives its parent for a moment must not hold the job.
            self._fd = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not _take(self._fd) or not os.fstat(self._fd).st_nlink:  # of a deleted job
                    raise _busy(folder)
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
                os.close(self._fd)
                raise

    def release(self) -> None:
        """Let others have it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "JobLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _take(fd: int) -> bool:
    """Whether the lock is ours now. Someone who only looks (`owner`) has it for an instant."""
    for pause_s in (0.01, 0.05, None):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if pause_s is not None:
                time.sleep(pause_s)
        else:
            return True
    return False


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time, for a moment: others wait."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def owner(folder: Path) -> int | None:
    """The process that works on a job; None when nobody does."""
    try:
        fd = os.open(folder / FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(fd)
    finally:
        os.close(fd)
    return None


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _pid(fd: int) -> int:
    """The process id in a lock file that is held; 0 in the moment before it is written."""
    with suppress(ValueError):
        return int(os.pread(fd, 32, 0) or 0)
    return 0


def _busy(folder: Path) -> BusyError:
    pid = owner(folder)
    return BusyError(
        f"process {pid or '?'} works on job `{folder.name}`",
        hint=f"`loadmaster batch status {folder.name} --watch` shows how far it is, "
        f"`loadmaster batch cancel {folder.name}` ends it",
        numbers={"pid": pid},
    )
