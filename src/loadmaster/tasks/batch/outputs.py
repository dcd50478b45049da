"""The files that a job writes: checked before the night, written from its store at any time."""

from pathlib import Path

from loadmaster.errors import UsageError
from loadmaster.jobs.files import check_writable, write_lines
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Job


def check_output(input_path: Path, output_path: Path | None, error_path: Path | None) -> None:
    """Find out before the night whether the results can be written after it.

    Raises:
        OutputError: they cannot.
        UsageError: two of the three are one file, or there are failed items without answers.
    """
    if output_path is None:
        if error_path is not None:
            raise UsageError("`--error-file` is written beside answers", hint="name them with `-o`")
        return
    errors = error_path or default_error_path(output_path)
    files = {path.resolve() for path in (input_path, output_path, errors)}
    if len(files) < 3:
        raise UsageError(
            f"requests, answers and failed items need a file each: `{input_path}`, "
            f"`{output_path}` and `{errors}` are not three",
            hint="name other files with `-o` and `--error-file`",
        )
    for path in (output_path, errors):
        check_writable(path)


def default_error_path(output_path: Path) -> Path:
    """Where failed items of an output file go: `out.jsonl` → `out.errors.jsonl`."""
    return output_path.with_name(f"{output_path.stem}.errors{output_path.suffix}")


def export(store: JobStore, job: Job) -> None:
    """Write the job's own output and error files, as far as the results go.

    Raises:
        OutputError: one of them cannot be written; the results are still in the store.
    """
    if job.output_path is not None:
        write_results(store, job.output_path, job.error_path, job_id=job.job_id)


def write_results(
    store: JobStore, output_path: Path, error_path: Path | None, *, job_id: str
) -> tuple[int, int]:
    """Write committed results; how many lines of each file. No failed item, no error file.

    Raises:
        OutputError: one of them cannot be written.
    """
    hint = f"nothing is lost: `loadmaster batch results {job_id} -o ELSEWHERE` writes them"
    errors = error_path or default_error_path(output_path)
    n_done = write_lines(output_path, store.lines(failed=False), hint=hint)
    if store.counts().failed or errors.exists():
        return n_done, write_lines(errors, store.lines(failed=True), hint=hint)
    return n_done, 0
