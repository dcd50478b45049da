"""The work on a batch's job by this server: one run, on a thread of its own, on a shared model."""

import threading
from collections.abc import Callable, Sequence

from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.types import ItemResult
from loadmaster.tasks.batch.jobs import Run, check_same_model
from loadmaster.tasks.batch.opening import fingerprint
from loadmaster.tasks.batch.policy import Clock, StopReason
from loadmaster.tasks.batch.progress import RunState
from loadmaster.tasks.locating import locate_model
from loadmaster.tasks.serving.guests import Guest


class Told:
    """A watcher that passes on what was committed, and what happened."""

    def __init__(
        self, committed: Callable[[Sequence[ItemResult]], None], say: Callable[[str], None]
    ) -> None:
        """Both are called on the thread of the run."""
        self.committed = committed
        self.say = say

    def state(self, state: RunState) -> None:
        """Nobody draws a bar here."""


class Shift:
    """One run of a job. `work` blocks; the others may be called from any thread."""

    def __init__(self, shelf: Shelf, job_id: str, model: str, guest: Guest, watcher: Told) -> None:
        """`model` is what the served model is made from."""
        self._shelf = shelf
        self._job_id = job_id
        self._model = model
        self._guest = guest
        self._watcher = watcher
        self._asked: StopReason | None = None
        self._stopping = threading.Event()
        self.has_exported = False  # the job is at its end, and its files are written

    def stop(self, reason: StopReason) -> None:
        """End the run at once: what is in flight stays pending."""
        self._asked = self._asked or reason
        self._stopping.set()
        self._guest.wake()

    def work(self) -> StopReason:
        """Run until the job is done or the shift is stopped.

        Raises:
            BusyError: another process works on the job.
            ModelChangedError: it was begun with another model.
            LoadmasterError: the engine or the disk failed.
        """
        try:
            with Run(self._shelf, self._job_id) as run:
                now = fingerprint(locate_model(self._model).model)
                check_same_model(run.settings.fingerprint, now)
                return self._run(run)
        finally:
            self._guest.wake = lambda: None
            self._guest.close()

    def _run(self, run: Run) -> StopReason:
        self._guest.reopen()
        executor = run.attach(self._guest, self._watcher, Clock(sleep=self._sleep))

        def wake() -> None:
            if self._asked is not None:
                executor.stop(self._asked, at_once=True)
            executor.wake()

        self._guest.wake = wake
        wake()  # for what was asked meanwhile
        reason = executor.run()
        run.end(reason)
        self.has_exported = reason in ("finished", "cancelled")
        return reason

    def _sleep(self, seconds: float) -> None:
        self._stopping.wait(seconds)
