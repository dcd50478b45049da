"""A job's run in a process of its own, which outlives the terminal."""

import os
import sys
import time
from contextlib import suppress

from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore

LOG_NAME = "log.txt"
_STDERR = 2
_STARTS_WITHIN_S = 60.0  # the process of a submitted job; a second, on a machine that is not busy


def start_in_background(shelf: Shelf, job_id: str) -> None:
    """A process of its own, which outlives this terminal; what it says goes to the job's log."""
    before = _started_s(shelf, job_id)
    _inherit_nothing()
    words = ["-P", "-m", "loadmaster", "batch", "resume", job_id]
    with (shelf.path(job_id) / LOG_NAME).open("ab") as log:
        # Not a Popen: that one warns when it is forgotten while its process lives.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *words],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
            ],
            setsid=True,
        )
    until = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < until and _started_s(shelf, job_id) == before:
        if os.waitpid(pid, os.WNOHANG)[0]:
            break  # it ended before it began: its log says why
        time.sleep(0.05)  # so that `status --watch`, typed next, sees it


def _inherit_nothing() -> None:
    """Locks and pipes that came with the command are not the job's, which may run for a night."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the folder that is listed is closed by now
            if int(name) > _STDERR:
                os.set_inheritable(int(name), False)


def _started_s(shelf: Shelf, job_id: str) -> float | None:
    """When the job was last begun."""
    with JobStore(shelf.path(job_id), read_only=True) as store:
        return store.job().started_s
