"""`loadmaster batch run`, `submit`, `resume`, `retry`: from a file of requests to answers."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from loadmaster.interfaces.cli.batch_rehearsal import goes_on
from loadmaster.interfaces.cli.batch_render import counts_text, finish_time, job_json
from loadmaster.interfaces.cli.batch_watch import RunProgress, heeding_signals
from loadmaster.interfaces.cli.failure import INTERRUPTED_EXIT_CODE
from loadmaster.interfaces.cli.options import (
    Command,
    common_options,
    plan_options,
    read_plan_options,
)
from loadmaster.interfaces.cli.progress import duration
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.jobs import Run, RunEnd
from loadmaster.tasks.batch.opening import OpenJob, identify, open_for_job
from loadmaster.tasks.batch.policy import BatchSettings, parse_duration, parse_window

_FILE = click.Path(path_type=Path, dir_okay=False)
FAILED_ITEMS_EXIT_CODE = 8
LOG_NAME = "log.txt"


def _limits(command: Command) -> Command:
    """The rules of a run; what is left out stays as the job has it."""
    for option in (
        click.option("--window", metavar="HH:MM-HH:MM", help="Run only in this part of the day."),
        click.option("--max-total-tokens", type=click.IntRange(min=1), metavar="N",
                     help="Stop when a run has generated so many."),
        click.option("--max-time", metavar="TIME", help="Stop a run after 8h, 90m …"),
        click.option("--deadline", metavar="TIME", help="Fail an item that takes longer."),
        click.option("--retries", type=click.IntRange(min=0), metavar="N",
                     help="Tries of an item after a failed one; default: 2."),
    ):  # fmt: skip
        command = option(command)
    return command


def _job_options(command: Command) -> Command:
    """What a new job is made from."""
    for option in (
        click.option("-m", "--model", required=True, metavar="MODEL", help="GGUF file, or `demo`."),
        click.option("--served-model-name", "served", multiple=True, metavar="NAME",
                     help="What lines call the model; may be given again."),
        click.option("-np", "--sequences", "--parallel", "--max-num-seqs", "n_sequences",
                     type=click.IntRange(1, 256), metavar="N",
                     help="Requests that run at the same time; default: the planner chooses."),
        click.option("--cells", "n_cells", type=click.IntRange(min=1), metavar="N",
                     help="Tokens of all sequences together; default: the planner chooses."),
    ):  # fmt: skip
        command = option(command)
    return command


_rehearse = click.option(
    "--rehearse", type=click.IntRange(min=1), metavar="N",
    help="Run N items first, show measured beside predicted, and ask.",
)  # fmt: skip
_yes = click.option("-y", "--yes", is_flag=True, help="Go on after a rehearsal without asking.")


@click.command("run")
@click.option("-i", "--input-file", "input_path", type=_FILE, required=True, help="Requests.")
@click.option("-o", "--output-file", "output_path", type=_FILE, required=True, help="Answers.")
@click.option("--error-file", "error_path", type=_FILE, help="Failed items; default: beside -o.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run into this file has done.")
@_job_options
@_limits
@_rehearse
@_yes
@plan_options
@common_options
def run(
    input_path: Path, output_path: Path, error_path: Path | None, fresh: bool,
    rehearse: int | None, yes: bool, as_json: bool, quiet: bool, debug: bool, **given: Any,
) -> None:  # fmt: skip
    """Run a file of requests, and write the answers when it is done.

    The same command again goes on where the last one stopped, however it stopped: results are kept
    in a store of their own until the job is done, and beyond.
    """
    settings, names = identify(_settings(given))
    shelf = batch_jobs.open_shelf()
    job_id = batch_jobs.job_of_output(output_path)
    progress = RunProgress(quiet=quiet or as_json)
    if fresh and shelf.exists(job_id):
        shelf.delete(job_id)
    if shelf.exists(job_id):
        batch_jobs.check_output(output_path, error_path)
        added = batch_jobs.compare_with_file(shelf, job_id, input_path, settings, names, error_path)
        progress.say(f"going on with job {job_id}" + (f", {added.new} new" if added.new else ""))
    else:
        batch_jobs.submit(
            shelf, input_path, settings, names,
            output_path=output_path, error_path=error_path, job_id=job_id,
        )  # fmt: skip
    _run_job(shelf, job_id, progress, rehearse=rehearse, yes=yes, as_json=as_json)


@click.command("submit")
@click.argument("input_path", metavar="FILE", type=_FILE)
@click.option(
    "-o", "--output-file", "output_path", type=_FILE, help="Write answers here at the end."
)
@click.option("--error-file", "error_path", type=_FILE, help="Failed items; default: beside -o.")
@click.option("--hold", is_flag=True, help="Do not start it; `batch resume ID` does.")
@_job_options
@_limits
@plan_options
@common_options
def submit(
    input_path: Path, output_path: Path | None, error_path: Path | None, hold: bool,
    as_json: bool, quiet: bool, debug: bool, **given: Any,
) -> None:  # fmt: skip
    """Check a file of requests, and run it in the background.

    Prints the job's id. The job outlives this terminal; `batch status ID --watch` shows it.
    """
    settings, names = identify(_settings(given))
    shelf = batch_jobs.open_shelf()
    job_id = batch_jobs.submit(
        shelf, input_path, settings, names,
        output_path=output_path, error_path=error_path,
    )  # fmt: skip
    if not hold:
        _start_in_background(shelf, job_id)
    with JobStore(shelf.path(job_id), read_only=True) as store:
        counts = store.counts()
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "job_id": job_id, "items": counts.total}))
        return
    click.echo(job_id)
    if not quiet:
        how = f"`loadmaster batch resume {job_id}` runs it" if hold else (
            f"running in the background; `loadmaster batch status {job_id} --watch` shows it"
        )  # fmt: skip
        click.echo(f"{counts.total} items; {how}", err=True)


@click.command("resume")
@click.argument("job", metavar="ID")
@_limits
@_rehearse
@_yes
@common_options
def resume(
    job: str, rehearse: int | None, yes: bool, as_json: bool, quiet: bool, debug: bool, **given: Any
) -> None:
    """Run a job that was submitted, stopped, cancelled or interrupted; only what has no result.

    ID may be shortened. Limits that are given replace those of the job.
    """
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    progress = RunProgress(quiet=quiet or as_json)
    change = _changes(given)
    _run_job(shelf, job_id, progress, rehearse=rehearse, yes=yes, as_json=as_json, change=change)


@click.command("retry")
@click.argument("job", metavar="ID")
@click.option("--hold", is_flag=True, help="Do not start it; `batch resume ID` does.")
@_limits
@common_options
def retry(job: str, hold: bool, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Run the failed items of a job again; what has an answer keeps it."""
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    count = batch_jobs.retry(shelf, job_id)
    progress = RunProgress(quiet=quiet or as_json)
    progress.say(f"{count} failed items to run again")
    if hold and as_json:
        click.echo(json.dumps({"schema_version": 1, "job_id": job_id, "retried": count}))
    if not hold:
        change = _changes(given)
        _run_job(shelf, job_id, progress, rehearse=None, yes=True, as_json=as_json, change=change)


def _settings(given: dict[str, Any]) -> BatchSettings:
    settings = BatchSettings(
        model=_lasting(given["model"]),
        served_names=tuple(given["served"]),
        n_sequences=given["n_sequences"],
        n_cells=given["n_cells"],
        plan=read_plan_options(given),
    )
    return _changes(given)(settings)


def _lasting(model: str) -> str:
    """A file by its whole path: the job may be resumed from another folder."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_file() else model


def _changes(given: dict[str, Any]) -> Callable[[BatchSettings], BatchSettings]:
    """The limits that were given, in place of those of the job."""
    if given["window"] is not None:
        parse_window(given["window"])
    values = {
        "window": given["window"],
        "max_tokens": given["max_total_tokens"],
        "max_time_s": given["max_time"] and parse_duration(given["max_time"]),
        "deadline_s": given["deadline"] and parse_duration(given["deadline"]),
        "retries": given["retries"],
    }
    chosen: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
    return lambda settings: replace(settings, **chosen)


# -- running


def _run_job(
    shelf: Shelf,
    job_id: str,
    progress: RunProgress,
    *,
    rehearse: int | None,
    yes: bool,
    as_json: bool,
    change: Callable[[BatchSettings], BatchSettings] = lambda settings: settings,
) -> None:
    with Run(shelf, job_id) as work:
        work.settings = change(work.settings)

        def stop(at_once: bool) -> bool:
            work.stop(at_once=at_once)
            return work.executor is not None

        with heeding_signals(stop):
            end = _finish(work, progress, rehearse=rehearse, yes=yes)
    _show(shelf, end, progress, as_json=as_json)


def _finish(work: Run, progress: RunProgress, *, rehearse: int | None, yes: bool) -> RunEnd:
    """Open the model and run what is left; a job with nothing left needs no model."""
    if not work.store.counts().left:
        return work.end("finished")
    job = open_for_job(work.settings, work.store, progress)
    with closing(job.model.opened):
        _announce(job, progress)
        executor = work.attach(job.model, progress)
        try:
            if rehearse is not None:
                chosen = work.store.spread(rehearse)
                reason = executor.run(only=chosen)
                if reason != "finished":
                    return work.end(reason)
                if not goes_on(executor.state(), len(chosen), job, progress, yes=yes):
                    return work.end("rehearsed")
            reason = executor.run()
        finally:
            progress.finish()
    return work.end(reason)


def _announce(job: OpenJob, progress: RunProgress) -> None:
    """What is open, and when it may be done."""
    engine = job.model.opened.session.plan.engine
    words = f"{engine.n_seq_max} sequences, {engine.n_ctx} cells"
    if job.predicted is not None:
        seconds = job.predicted.seconds
        ends = finish_time(seconds, datetime.now())
        words += f"; predicted: {duration(seconds)}, until {ends}"
    progress.say(words + job.model.opened.label)


def _show(shelf: Shelf, end: RunEnd, progress: RunProgress, *, as_json: bool) -> None:
    """What came of the run, and the exit code for it."""
    job, counts = end.job, end.counts
    if as_json:
        value = job_json(job, batch_jobs.shown_state(shelf, job), counts)
        click.echo(json.dumps({**value, "reason": end.reason}, ensure_ascii=False))
    if end.reason == "finished":
        progress.say(f"{counts_text(counts)}, in {duration(job.run_s)}{_where(end)}")
    else:
        progress.say(
            f"{end.reason}: {counts_text(counts)}; `loadmaster batch resume {job.job_id}` goes on"
        )
    if end.reason in ("interrupted", "cancelled"):
        click.get_current_context().exit(INTERRUPTED_EXIT_CODE)
    if end.reason == "finished" and counts.failed:
        click.get_current_context().exit(FAILED_ITEMS_EXIT_CODE)


def _where(end: RunEnd) -> str:
    job = end.job
    if job.output_path is None:
        return f"; `loadmaster batch results {job.job_id}` has the answers"
    if not end.counts.failed:
        return f"; answers in {job.output_path}"
    errors = job.error_path or batch_jobs.default_error_path(job.output_path)
    return f"; answers in {job.output_path}, failed items in {errors}"


def _start_in_background(shelf: Shelf, job_id: str) -> None:
    """A process of its own, which outlives this terminal; what it says goes to the job's log."""
    words = ["-P", "-m", "loadmaster", "batch", "resume", job_id]
    with (shelf.path(job_id) / LOG_NAME).open("ab") as log:
        # Not a Popen: that one warns when it is forgotten while its process lives.
        os.posix_spawn(
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
