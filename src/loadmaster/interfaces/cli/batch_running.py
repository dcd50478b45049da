"""A job's run in this process: its model is opened, its items are run, and what came of it said."""

import json
from contextlib import closing
from datetime import datetime

import click

from loadmaster.errors import FailedItemsError
from loadmaster.interfaces.cli.batch_rehearsal import goes_on
from loadmaster.interfaces.cli.batch_render import counts_text, finish_time, job_json
from loadmaster.interfaces.cli.batch_watch import RunProgress, heeding_signals
from loadmaster.interfaces.cli.failure import INTERRUPTED_EXIT_CODE
from loadmaster.interfaces.cli.progress import duration
from loadmaster.jobs.shelf import Shelf
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.jobs import Run, RunEnd
from loadmaster.tasks.batch.opening import OpenJob, open_for_job, open_in_window
from loadmaster.tasks.batch.outputs import default_error_path


def run_job(
    shelf: Shelf,
    job_id: str,
    progress: RunProgress,
    *,
    rehearse: int | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Run what is left of a job, and leave with its exit code."""
    with Run(shelf, job_id) as work:
        progress.window = work.settings.policy().window

        def stop(at_once: bool) -> bool:
            if progress.asks:
                return False  # the answer is no
            work.stop(at_once=at_once)
            return work.executor is not None

        with heeding_signals(stop):
            end = _finish(work, progress, rehearse=rehearse, yes=yes)
    _show(shelf, end, progress, as_json=as_json)


def _finish(work: Run, progress: RunProgress, *, rehearse: int | None, yes: bool) -> RunEnd:
    """Open the model and run what is left; a job with nothing left needs no model."""
    if not work.store.counts().left:
        return work.end("finished")
    job = open_in_window(work, lambda: open_for_job(work.settings, work.store, progress), progress)
    if not isinstance(job, OpenJob):
        return work.end(job)
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
    sequences = "1 sequence" if engine.n_seq_max == 1 else f"{engine.n_seq_max} sequences"
    words = f"{sequences}, {engine.n_ctx} cells"
    if job.predicted is not None:
        seconds = job.predicted.seconds
        ends = finish_time(seconds, datetime.now(), progress.window)
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
        click.get_current_context().exit(FailedItemsError.exit_code)


def _where(end: RunEnd) -> str:
    job = end.job
    if job.output_path is None:
        return f"; `loadmaster batch results {job.job_id}` has the answers"
    if not end.counts.failed:
        return f"; answers in {job.output_path}"
    errors = job.error_path or default_error_path(job.output_path)
    return f"; answers in {job.output_path}, failed items in {errors}"
