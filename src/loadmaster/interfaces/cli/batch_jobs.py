"""`loadmaster batch list`, `status`, `results` and `cancel`: jobs seen from outside."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import click

from loadmaster.errors import LoadmasterError
from loadmaster.interfaces.cli.batch_background import LOG_NAME
from loadmaster.interfaces.cli.batch_render import (
    finish_time,
    job_json,
    job_text,
    jobs_table,
    run_line,
)
from loadmaster.interfaces.cli.batch_watch import RunProgress
from loadmaster.interfaces.cli.options import common_options
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Counts
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.outputs import check_output, write_results
from loadmaster.tasks.batch.policy import Window

_WATCH_S = 1.0
_LISTED_FAILURES = 5


@click.command("list")
@common_options
def list_jobs(as_json: bool, quiet: bool, debug: bool) -> None:
    """List all jobs, the newest first."""
    shelf = batch_jobs.open_shelf()
    rows = []
    ids = shelf.ids()
    for job in shelf.jobs():
        with suppress(LoadmasterError):
            rows.append((job, batch_jobs.shown_state(shelf, job), _counts(shelf, job.job_id)))
    unreadable = sorted(set(ids) - {job.job_id for job, _, _ in rows})
    if as_json:
        value = {"jobs": [job_json(*row) for row in rows], "unreadable": unreadable}
        click.echo(json.dumps({"schema_version": 1, **value}))
        return
    if rows:
        click.echo(jobs_table(rows))
    elif not (quiet or unreadable):
        click.echo("no jobs; `loadmaster batch run -i FILE -o FILE -m MODEL` makes one", err=True)
    for job_id in unreadable:
        words = f"{job_id}: cannot be read; `loadmaster batch status {job_id}` says why"
        click.echo(words, err=True)


def _counts(shelf: Shelf, job_id: str) -> Counts:
    with JobStore(shelf.path(job_id), read_only=True) as store:
        return store.counts()


@click.command("status")
@click.argument("job", metavar="ID")
@click.option("--watch", is_flag=True, help="Stay, and draw it again until the job ends.")
@common_options
def status(job: str, watch: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Show how far a job is, and what its first failed items say. ID may be shortened."""
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    if watch and not as_json:
        _watch(shelf, job_id)
    with JobStore(shelf.path(job_id), read_only=True) as store:
        found, counts = store.job(), store.counts()
        failed = store.failures_listed(_LISTED_FAILURES)
    state = batch_jobs.shown_state(shelf, found)
    if as_json:
        value = {**job_json(found, state, counts), "first_failures": failed}
        click.echo(json.dumps(value, ensure_ascii=False))
        return
    click.echo(job_text(found, state, counts, shelf.path(job_id) / LOG_NAME))
    for line in failed:
        click.echo(f"failed: {line['custom_id']}: {_reason(line)}")


def _reason(line: Mapping[str, object]) -> str:
    """The message in a line of an error file."""
    error = line.get("error")
    if isinstance(error, dict):
        return str(error.get("message"))
    response = line.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    inner = body.get("error") if isinstance(body, dict) else None
    return str(inner.get("message")) if isinstance(inner, dict) else "no reason"


def _watch(shelf: Shelf, job_id: str) -> None:
    """Show the job's line every second while a process works on it."""
    progress = RunProgress()
    with JobStore(shelf.path(job_id), read_only=True) as store:
        began = (time.monotonic(), store.counts())
        window = batch_jobs.read_settings(store.job()).policy().window
        while shelf.owner(job_id) is not None:
            progress.show(_watch_line(store.counts(), began, window, progress.columns))
            time.sleep(_WATCH_S)
    progress.finish()


def _watch_line(
    counts: Counts, began: tuple[float, Counts], window: Window | None, columns: int | None
) -> str:
    since, before = began
    passed, now = time.monotonic() - since, datetime.now()
    if window and not window.is_open(now.time()):
        return run_line(counts, f"waiting for {window}", columns=columns)
    ended = before.left - counts.left
    if passed <= _WATCH_S or not ended:
        return run_line(counts, "", columns=columns)
    rate = f"{(_tokens(counts) - _tokens(before)) / passed:.0f} tok/s"
    ends = f"until {finish_time(counts.left * passed / ended, now, window)}"
    return run_line(counts, rate, (ends,), columns=columns)


def _tokens(counts: Counts) -> int:
    return counts.generated_tokens or counts.prompt_tokens  # embeddings generate none


@click.command("results")
@click.argument("job", metavar="ID")
@click.option(
    "-o", "--output-file", "output_path", type=click.Path(path_type=Path, dir_okay=False),
    help="Write a file, and the failed items beside it; default: the answers to stdout.",
)  # fmt: skip
@click.option("--errors", is_flag=True, help="To stdout: the failed items.")
@common_options
def results(
    job: str, output_path: Path | None, errors: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Write the answers that a job has so far, in OpenAI's form; also while it runs."""
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    with JobStore(shelf.path(job_id), read_only=True) as store:
        if output_path is None:
            for line in store.lines(failed=errors):
                click.echo(line.decode())
            return
        if (requests := store.job().input_path) is not None:
            check_output(requests, output_path, None)
        n_done, n_failed = write_results(store, output_path, None, job_id=job_id)
        counts = store.counts()
    if as_json:
        value = {"done": n_done, "failed": n_failed, "left": counts.left}
        click.echo(json.dumps({"schema_version": 1, "job_id": job_id, **value}))
    elif not quiet:
        click.echo(f"{n_done} answers and {n_failed} failed items, {counts.left} left", err=True)


@click.command("cancel")
@click.argument("job", metavar="ID")
@common_options
def cancel(job: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Give a job up, also one that runs elsewhere. Its results stay; `resume` takes it up again."""
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    running = batch_jobs.cancel(shelf, job_id)
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "job_id": job_id, "was_running": running}))
    elif not quiet:
        with JobStore(shelf.path(job_id), read_only=True) as store:
            state = store.job().state  # one that is finished stays so
        words = "it ends within seconds" if running else state
        click.echo(f"{job_id}: {words}", err=True)
