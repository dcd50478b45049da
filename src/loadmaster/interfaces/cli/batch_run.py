"""`loadmaster batch run`, `submit`, `resume`, `retry`: from a file of requests to answers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loadmaster.interfaces.cli.batch_background import start_in_background
from loadmaster.interfaces.cli.batch_running import run_job
from loadmaster.interfaces.cli.batch_watch import RunProgress
from loadmaster.interfaces.cli.options import (
    Command,
    common_options,
    plan_options,
    read_plan_options,
    sequence_options,
)
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.opening import identify
from loadmaster.tasks.batch.outputs import check_output
from loadmaster.tasks.batch.policy import BatchSettings, parse_duration, parse_window

_FILE = click.Path(path_type=Path, dir_okay=False)


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
        click.option("-m", "--model", required=True, metavar="MODEL",
                     help="GGUF file, folder of safetensors, or `demo`."),
        click.option("--served-model-name", "served", multiple=True, metavar="NAME",
                     help="What lines call the model; may be given again."),
        sequence_options(
            sequences="Requests that run at the same time; default: the planner chooses.",
            cells="Tokens of all sequences together; default: the planner chooses.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


_rehearse = click.option(
    "--rehearse", type=click.IntRange(min=1), metavar="N",
    help="Run N items first, show measured beside predicted, and ask.",
)  # fmt: skip
_background = click.option(
    "--background", is_flag=True, help="In a process that outlives this terminal, as `submit` does."
)
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
    if shelf.exists(job_id) and not fresh:
        check_output(input_path, output_path, error_path)
        added = batch_jobs.compare_with_file(shelf, job_id, input_path, settings, names, error_path)
        progress.say(f"going on with job {job_id}" + (f", {added.new} new" if added.new else ""))
    else:
        batch_jobs.submit(
            shelf, input_path, settings, names,
            output_path=output_path, error_path=error_path, job_id=job_id, anew=fresh,
        )  # fmt: skip
    run_job(shelf, job_id, progress, rehearse=rehearse, yes=yes, as_json=as_json)


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
        start_in_background(shelf, job_id)
    _tell_submitted(shelf, job_id, hold=hold, as_json=as_json, quiet=quiet)


def _tell_submitted(shelf: Shelf, job_id: str, *, hold: bool, as_json: bool, quiet: bool) -> None:
    """The id on stdout, and on stderr what to type next."""
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
@_background
@common_options
def resume(
    job: str, rehearse: int | None, yes: bool, background: bool, as_json: bool, quiet: bool,
    debug: bool, **given: Any,
) -> None:  # fmt: skip
    """Run a job that was submitted, stopped, cancelled or interrupted; only what has no result.

    ID may be shortened. Limits that are given replace those of the job.
    """
    if background and rehearse is not None:
        raise click.UsageError("a rehearsal asks before it goes on: not with `--background`")
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    batch_jobs.change_settings(shelf, job_id, _changes(given))
    if background:
        start_in_background(shelf, job_id)
        _tell_submitted(shelf, job_id, hold=False, as_json=as_json, quiet=quiet)
        return
    progress = RunProgress(quiet=quiet or as_json)
    run_job(shelf, job_id, progress, rehearse=rehearse, yes=yes, as_json=as_json)


@click.command("retry")
@click.argument("job", metavar="ID")
@click.option("--hold", is_flag=True, help="Do not start it; `batch resume ID` does.")
@_limits
@_background
@common_options
def retry(
    job: str, hold: bool, background: bool, as_json: bool, quiet: bool, debug: bool, **given: Any
) -> None:
    """Run the failed items of a job again; what has an answer keeps it."""
    shelf = batch_jobs.open_shelf()
    job_id = shelf.find(job)
    batch_jobs.change_settings(shelf, job_id, _changes(given))
    count = batch_jobs.retry(shelf, job_id)
    progress = RunProgress(quiet=quiet or as_json)
    progress.say(f"failed items to run again: {count}")
    if background and not hold:
        start_in_background(shelf, job_id)
    if not (hold or background):
        run_job(shelf, job_id, progress, rehearse=None, yes=True, as_json=as_json)
    elif as_json:
        click.echo(json.dumps({"schema_version": 1, "job_id": job_id, "retried": count}))


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
    """A file or a folder by its whole path: the job may be resumed from elsewhere."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


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
