"""`batch`: jobs from files, their runs, their results. What the commands and the server call."""

import hashlib
import json
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadmaster import settings as user_settings
from loadmaster.errors import (
    BusyError,
    InterruptedRunError,
    LoadmasterError,
    ModelChangedError,
    UsageError,
)
from loadmaster.jobs.intake import Added, add_lines
from loadmaster.jobs.lines import CheckBody, read_lines
from loadmaster.jobs.lock import JobLock
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Counts, Job, JobState, NewJob
from loadmaster.model.checkpoint import AnyModel
from loadmaster.schema import SchemaError, from_json, to_json
from loadmaster.tasks.batch.executor import TICK_S, Executor
from loadmaster.tasks.batch.items import BodyCheck, order_of
from loadmaster.tasks.batch.model import BatchModel
from loadmaster.tasks.batch.outputs import check_output, export
from loadmaster.tasks.batch.policy import BatchSettings, Clock, StopReason
from loadmaster.tasks.batch.progress import Watcher

_STATES: dict[StopReason, JobState] = {"finished": "finished", "cancelled": "cancelled"}


def open_shelf() -> Shelf:
    """This user's jobs."""
    return Shelf(user_settings.state_folder() / "jobs")


def model_names(model: AnyModel, argument: str, served: Collection[str]) -> frozenset[str]:
    """What lines may call a model: as it was typed, its file, its own name, and `served` names."""
    path = model.path
    return frozenset({argument, path.name, path.stem, model.name, *served})


# -- from files to jobs


def submit(
    shelf: Shelf,
    input_path: Path,
    settings: BatchSettings,
    names: Collection[str],
    *,
    output_path: Path | None = None,
    error_path: Path | None = None,
    job_id: str | None = None,
    anew: bool = False,
    check: CheckBody | None = None,
) -> str:
    """Check a whole file and make a job of it; its id. `anew`: in place of the one of this id.
    `check` is in place of the usual one.

    Raises:
        BadInputError: lines cannot be run, each by its number; an earlier job is as it was.
        BusyError: a process works on the earlier job.
        OutputError: the output could not be written when the job is done.
        UsageError: it would take the place of the file.
    """
    check_output(input_path, output_path, error_path)
    job = NewJob(
        job_id=job_id or shelf.new_id(),
        model=settings.model,
        settings=json.dumps(to_json(settings)),
        input_path=input_path.absolute(),
        output_path=output_path and output_path.absolute(),
        error_path=error_path and error_path.absolute(),
    )
    check = check or BodyCheck(model_names=names)
    shelf.create(job, read_lines(input_path, check), order_of, anew=anew)
    return job.job_id


def job_of_output(output_path: Path) -> str:
    """The id of the job that `run` makes for an output file: the same command finds it again."""
    digest = hashlib.sha256(str(output_path.absolute()).encode()).hexdigest()
    return f"run_{digest[:12]}"


def compare_with_file(
    shelf: Shelf,
    job_id: str,
    input_path: Path,
    settings: BatchSettings,
    names: Collection[str],
    error_path: Path | None = None,
) -> Added:
    """Go on with a job whose file may have grown since; settings become the new ones.

    Raises:
        BadInputError: lines are bad, or stand for another request than before.
        UsageError: the file has lost lines.
        ModelChangedError: the job was begun with another model.
        BusyError: a process works on the job.
    """
    folder = shelf.path(job_id)
    with JobLock(folder), JobStore(folder) as store:
        check_same_model(read_settings(store.job()).fingerprint, settings.fingerprint)
        lines = read_lines(input_path, BodyCheck(model_names=names))
        added = add_lines(folder, lines, order_of, input_path)
        store.set_settings(json.dumps(to_json(settings)), error_path and error_path.absolute())
    return added


def change_settings(
    shelf: Shelf, job_id: str, change: Callable[[BatchSettings], BatchSettings]
) -> None:
    """Replace what a job is to be run with, for this run and those to come.

    Raises:
        BusyError: a process works on the job.
    """
    folder = shelf.path(job_id)
    with JobStore(folder) as store, JobLock(folder):
        settings = read_settings(store.job())
        if (changed := change(settings)) != settings:
            store.set_settings(json.dumps(to_json(changed)), None)


def check_same_model(begun_with: str, now: str) -> None:
    """Answers of two models do not go into one file.

    Raises:
        ModelChangedError: they are two.
    """
    if begun_with and begun_with != now:
        raise ModelChangedError(
            f"the job was begun with {begun_with}; this is {now}",
            hint="put the model back, or begin anew: `run --fresh` or `submit`",
        )


def read_settings(job: Job) -> BatchSettings:
    """How a job is to be run.

    Raises:
        UsageError: another version of loadmaster made it.
    """
    try:
        return from_json(BatchSettings, json.loads(job.settings))
    except (SchemaError, ValueError) as error:
        raise UsageError(
            f"the settings of job `{job.job_id}` cannot be read: {error}",
            hint="submit its file again",
        ) from None


# -- runs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How a run ended."""

    reason: StopReason
    counts: Counts
    run_s: float
    job: Job


class Run:
    """A process's work on a job: its lock is ours until `close`."""

    def __init__(self, shelf: Shelf, job_id: str) -> None:
        """Take the job.

        Raises:
            BusyError: another process works on it.
        """
        self.folder = shelf.path(job_id)
        with JobStore(self.folder, read_only=True):
            pass  # there is such a job
        self._lock = JobLock(self.folder)
        try:
            self.store = JobStore(self.folder)
            self.job = self.store.begin_run()
            self.settings = read_settings(self.job)
        except BaseException:
            self._lock.release()
            raise
        self.executor: Executor | None = None
        self._stop_asked: tuple[StopReason, bool] | None = None
        self._started_s = time.monotonic()
        self._waited_s = 0.0  # for its window, before there was an executor
        self._ended = False

    def attach(self, model: BatchModel, watcher: Watcher, clock: Clock | None = None) -> Executor:
        """The executor of this job on an open model."""
        self.executor = Executor(self.store, model, self.settings.policy(), watcher, clock=clock)
        if self._stop_asked is not None:
            self.executor.stop(self._stop_asked[0], at_once=self._stop_asked[1])
        return self.executor

    def wait_for_window(self, watcher: Watcher, clock: Clock | None = None) -> StopReason | None:
        """Wait until the job's window is open, before its model is planned and takes memory; why
        the run ends instead, if it does."""
        clock, window = clock or Clock(), self.settings.policy().window
        if window is None or window.is_open(clock.time_of_day()):
            return None
        watcher.say(f"waiting for {window}")
        return self._wait(clock, lambda: window.is_open(clock.time_of_day()))

    def pause(self, seconds: float, clock: Clock | None = None) -> StopReason | None:
        """Wait so long; why the run ends instead, if it does."""
        told = clock or Clock()
        until_s = told.monotonic_s() + seconds
        return self._wait(told, lambda: told.monotonic_s() >= until_s)

    @property
    def has_waited(self) -> bool:
        """Whether it had to wait before its model was opened: then nobody may be there."""
        return self._waited_s > 0

    def _wait(self, clock: Clock, is_over: Callable[[], bool]) -> StopReason | None:
        begun_s = clock.monotonic_s()
        try:
            while not is_over():
                if self.store.cancel_asked():
                    return "cancelled"
                if self._stop_asked is not None:
                    return self._stop_asked[0]
                clock.sleep(TICK_S)
        finally:  # Ctrl-C ends it too
            self._waited_s += clock.monotonic_s() - begun_s
        return None

    def stop(self, *, at_once: bool = False) -> None:
        """End the run; callable from a signal handler, also before there is an executor."""
        self._stop_asked = ("interrupted", at_once)
        if self.executor is not None:
            self.executor.stop("interrupted", at_once=at_once)

    def end(self, reason: StopReason) -> RunEnd:
        """Record how the run ended, and write the results where the job says."""
        counts = self.store.counts()
        state = _STATES.get(reason, "stopped")
        run_s = self._run_s()
        self.store.end_run(state, None if state == reason else reason, run_s)
        self._ended = True
        export(self.store, self.job)
        return RunEnd(reason=reason, counts=counts, run_s=run_s, job=self.store.job())

    def fail(self, error: LoadmasterError) -> None:
        """Record that an error ended the run, if the disk lets us."""
        if not self._ended:
            with suppress(LoadmasterError):
                self.store.end_run("stopped", error.message, self._run_s())
                self._ended = True

    def _run_s(self) -> float:
        """Seconds of this run, waits left out."""
        idle_s = 0.0 if self.executor is None else self.executor.idle_s
        return time.monotonic() - self._started_s - self._waited_s - idle_s

    def close(self) -> None:
        """Let others have the job."""
        if self.executor is not None:
            self.executor.close()
        self.store.close()
        self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, LoadmasterError):
            self.fail(error)
        elif isinstance(error, KeyboardInterrupt):
            self.fail(InterruptedRunError("interrupted"))
        self.close()


# -- from other processes


def shown_state(shelf: Shelf, job: Job) -> str:
    """A job's state for people: one whose process died without a word was `interrupted`."""
    if job.state == "running" and shelf.owner(job.job_id) is None:
        return "interrupted"
    return f"{job.state}: {job.reason}" if job.reason else job.state


def cancel(shelf: Shelf, job_id: str) -> bool:
    """Give a job up; its results stay. Whether a process works on it, which ends within seconds."""
    folder = shelf.path(job_id)
    with JobStore(folder) as store:
        while True:
            try:
                with JobLock(folder):
                    if store.job().state != "finished":
                        store.set_state("cancelled")
                    return False
            except BusyError as error:
                if "pid" not in error.numbers:  # not the lock: the database
                    raise
                if pid := error.numbers["pid"]:  # else its owner has come or gone this moment
                    store.ask_to_cancel(int(pid))
                    return True


def retry(shelf: Shelf, job_id: str) -> int:
    """Make a job's failed items pending again; how many they are.

    Raises:
        BusyError: a process works on the job.
    """
    folder = shelf.path(job_id)
    with JobStore(folder) as store, JobLock(folder):
        return store.retry_failed()
