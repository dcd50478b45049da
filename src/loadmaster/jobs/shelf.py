"""All jobs of this user: a folder with a folder for each."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loadmaster.errors import BusyError, LoadmasterError, NotFoundError, UsageError
from loadmaster.jobs import database, lock
from loadmaster.jobs.intake import UNFINISHED, Lines, OrderOf, create_job, delete_job
from loadmaster.jobs.lock import JobLock, is_alive
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Job, NewJob

_ID_BYTES = 6


class Shelf:
    """The folder of jobs; it may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new_id(self) -> str:
        """An id that no job has: `batch_` and twelve digits."""
        return f"batch_{secrets.token_hex(_ID_BYTES)}"

    def path(self, job_id: str) -> Path:
        """The folder of a job, which may not be there.

        Raises:
            UsageError: this cannot be an id.
        """
        if not job_id.replace("_", "").replace("-", "").isalnum() or not job_id.isascii():
            raise UsageError(f"`{job_id}` is not a job's id", hint="`loadmaster batch list`")
        return self.folder / job_id

    def create(self, job: NewJob, lines: Lines, order: OrderOf, *, anew: bool = False) -> Path:
        """Make a job; see `create_job`. Raises BusyError when there is one of this id, and it is
        not to be made `anew`, or a process works on it."""
        if self.exists(job.job_id):
            if not anew:
                raise BusyError(f"there is a job `{job.job_id}` already")
            with JobLock(self.path(job.job_id)):
                pass  # nobody works on it: better said before its lines are read
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()
        return create_job(self.folder, job, lines, order, anew=anew)

    def _sweep(self) -> None:
        """Remove what processes left that died while they made a job."""
        for path in self.folder.glob(f".*{UNFINISHED}"):
            pid = path.name.removesuffix(UNFINISHED).rpartition(".")[2]
            if pid.isdigit() and not is_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)

    def exists(self, job_id: str) -> bool:
        """Whether there is such a job."""
        return (self.path(job_id) / database.FILE_NAME).is_file()

    def find(self, start: str) -> str:
        """The one job whose id is `start`, or begins with it.

        Raises:
            NotFoundError: there is none, or more than one.
        """
        if self.exists(start):
            return start
        found = [job_id for job_id in self.ids() if job_id.startswith((start, f"batch_{start}"))]
        if len(found) == 1:
            return found[0]
        listed = f"{len(found)} jobs begin" if found else "no job begins"
        raise NotFoundError(
            f"{listed} with `{start}`", hint="`loadmaster batch list` shows all of them"
        )

    def ids(self) -> list[str]:
        """The ids of all jobs."""
        if not self.folder.is_dir():
            return []
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if not path.name.startswith(".") and (path / database.FILE_NAME).is_file()
        )

    def jobs(self) -> Iterator[Job]:
        """All jobs that can be read, the newest first."""
        found = []
        for job_id in self.ids():
            with suppress(LoadmasterError), JobStore(self.path(job_id), read_only=True) as store:
                found.append(store.job())
        yield from sorted(found, key=lambda job: -job.created_s)

    def owner(self, job_id: str) -> int | None:
        """The process that works on a job."""
        return lock.owner(self.path(job_id))

    def delete(self, job_id: str) -> None:
        """Remove a job and its results.

        Raises:
            BusyError: a process works on it.
        """
        delete_job(self.path(job_id))
