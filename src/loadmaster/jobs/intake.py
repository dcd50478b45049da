"""From an input file to a job: the whole file is checked first, then it is a job or it is not.

Lines stream through; what is kept of a file in memory is one line and the list of what is wrong.
"""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loadmaster.errors import BusyError, UsageError
from loadmaster.jobs import database
from loadmaster.jobs.database import FILE_NAME, JobStoreError, failures, transaction
from loadmaster.jobs.files import sync_folder
from loadmaster.jobs.lock import JobLock, folder_lock
from loadmaster.jobs.types import BadLine, BatchLine, NewJob, Order

UNFINISHED = ".part"  # ends the name of a folder that is not a job yet; its process's id is before
MOST_LISTED = 20  # bad lines that are shown; the rest is counted

Lines = Iterable[BatchLine | BadLine]
OrderOf = Callable[[BatchLine], Order]

# Temporary tables with keys: as one statement it took time with the square of the lines.
_RANKS = (
    "CREATE TEMP TABLE longest (prefix BLOB PRIMARY KEY, cost INTEGER)",
    "INSERT INTO longest SELECT prefix, max(cost) FROM item GROUP BY prefix",
    "CREATE TEMP TABLE turn (number INTEGER PRIMARY KEY, rank INTEGER)",
    """INSERT INTO turn SELECT number, ROW_NUMBER() OVER (
        ORDER BY longest.cost DESC, item.prefix, item.cost DESC, item.number
    ) FROM item JOIN longest USING (prefix)""",
    "UPDATE item SET rank = (SELECT rank FROM turn WHERE turn.number = item.number)",
)


class BadInputError(UsageError):
    """Lines of an input file cannot be items; `lines` has the first of them."""

    code = "bad_input"

    def __init__(
        self, message: str, *, lines: tuple[BadLine, ...], count: int, known_job: bool = False
    ) -> None:
        listed = "".join(f"\n  {line}" for line in lines)
        rest = f"\n  … and {count - len(lines)} more" if count > len(lines) else ""
        super().__init__(
            f"{message}{listed}{rest}",
            hint="nothing was run; mend these lines and give the command again"
            + (", or begin anew with `--fresh`" if known_job else ""),
            numbers={"bad_lines": count},
        )
        self.lines = lines
        self.count = count


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What taking lines in has changed."""

    new: int
    known: int


@dataclass(slots=True, kw_only=True)
class _Complaints:
    """What is wrong with a file: the first lines, and how many in all."""

    lines: list[BadLine] = field(default_factory=list)
    count: int = 0

    def add(self, line: BadLine) -> None:
        self.count += 1
        if len(self.lines) < MOST_LISTED:
            self.lines.append(line)

    def raise_if_any(self, path: Path | None, n_lines: int, *, known_job: bool) -> None:
        if self.count:
            name = f"`{path}`" if path else "the input"
            raise BadInputError(
                f"{self.count} of {n_lines} lines of {name} cannot be run:",
                lines=tuple(self.lines),
                count=self.count,
                known_job=known_job,
            )
        if n_lines == 0:
            name = f"`{path}`" if path else "the input"
            raise UsageError(
                f"{name} has no lines",
                hint='a line is {"custom_id": "…", "method": "POST", '
                '"url": "/v1/chat/completions", "body": {…}}',
            )


def create_job(
    shelf: Path, job: NewJob, lines: Lines, order: OrderOf, *, anew: bool = False
) -> Path:
    """Make a job of a file; its folder appears when everything of it is on the disk. `anew`: in
    place of one of the same id, which stays as it is when there is an error.

    Raises:
        BadInputError: lines cannot be items; there is no job.
        BusyError: a process works on the one before, or has made a job of this id meanwhile.
        JobStoreError: the disk refused; there is no job.
    """
    folder = shelf / job.job_id
    building = shelf / f".{job.job_id}.{os.getpid()}{UNFINISHED}"
    shutil.rmtree(building, ignore_errors=True)
    try:
        with failures(folder):
            building.mkdir(parents=True, mode=0o700)
        _fill(building, job, lines, order)
        with failures(folder):
            _seal(building)
            _name(building, folder, anew=anew)
    except JobStoreError as error:
        raise JobStoreError(
            f"no job was made: its store cannot be written: {error.__cause__}",
            hint=f"mend the disk of `{shelf}`, then give the command again",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _fill(building: Path, job: NewJob, lines: Lines, order: OrderOf) -> None:
    with closing(database.create(building)) as db:
        with transaction(db, building):
            db.execute(
                "INSERT INTO job (job_id, model, settings, input_path, output_path, error_path,"
                " state, created_s) VALUES (?,?,?,?,?,?,'queued',?)",
                (
                    job.job_id, job.model, job.settings, _text(job.input_path),
                    _text(job.output_path), _text(job.error_path), time.time(),
                ),
            )  # fmt: skip
            _take_in(db, lines, order, job.input_path)
        database.keep_journal(db, building)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _seal(building: Path) -> None:
    fd = os.open(building / FILE_NAME, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(building)


def _name(building: Path, folder: Path, *, anew: bool) -> None:
    """Give a job that is on the disk its name. Of two processes that made the same, one may."""
    with folder_lock(folder.parent):
        if (folder / FILE_NAME).is_file():
            if not anew:
                raise BusyError(
                    f"another process has made job `{folder.name}` meanwhile",
                    hint=f"`loadmaster batch status {folder.name} --watch` shows how far it is",
                )
            delete_job(folder)
        shutil.rmtree(folder, ignore_errors=True)  # a process died while it deleted a job
        building.rename(folder)
        sync_folder(folder.parent)


def delete_job(folder: Path) -> None:
    """Remove a job and its results.

    Raises:
        BusyError: a process works on it.
    """
    with JobLock(folder):
        (folder / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def add_lines(folder: Path, lines: Lines, order: OrderOf, path: Path | None = None) -> Added:
    """Compare a job with its file as it is now, and take new lines in. The caller has the lock.

    Raises:
        BadInputError: a line is bad, or its `custom_id` stands for another request in the job;
            the job stays as it is.
        UsageError: the job has items that the file has no more.
    """
    with closing(database.connect(folder)) as db, transaction(db, folder):
        (before,) = db.execute("SELECT count(*) FROM item").fetchone()
        added = _take_in(db, lines, order, path)
        missing = before - added.known
        if missing:
            items = "1 item" if missing == 1 else f"{missing} items"
            raise UsageError(
                f"job `{folder.name}` has {items} that `{path}` has no more",
                hint="put them back, or begin anew with `--fresh`",
                numbers={"missing": missing},
            )
        if added.new:
            db.execute("UPDATE job SET state='queued', reason=NULL")
    return added


def _take_in(db: sqlite3.Connection, lines: Lines, order: OrderOf, path: Path | None) -> Added:
    db.execute("CREATE TEMP TABLE listed (custom_id TEXT PRIMARY KEY, line INTEGER NOT NULL)")
    # Items keep their numbers: of a file that grew, the new lines come after all known ones.
    (offset,) = db.execute("SELECT coalesce(max(number), 0) FROM item").fetchone()
    complaints, n_lines, new, known = _Complaints(), 0, 0, 0
    for line in lines:
        n_lines += 1
        verdict = line if isinstance(line, BadLine) else _judge(db, line)
        if isinstance(verdict, BadLine):
            complaints.add(verdict)
        elif verdict == "known":
            known += 1
        elif isinstance(line, BatchLine):
            new += 1
            _insert(db, line, order(line), offset + line.number)
    complaints.raise_if_any(path, n_lines, known_job=offset > 0)
    if new:
        for statement in _RANKS:
            db.execute(statement)
    return Added(new=new, known=known)


def _judge(db: sqlite3.Connection, line: BatchLine) -> Literal["new", "known"] | BadLine:
    """Whether a line is new to the job, known to it, or at odds with another."""
    name = line.custom_id
    twin = db.execute("SELECT line FROM listed WHERE custom_id=?", (name,)).fetchone()
    if twin is not None:
        return BadLine(number=line.number, message=f"custom_id `{name}` is that of line {twin[0]}")
    db.execute("INSERT INTO listed VALUES (?,?)", (name, line.number))
    known = db.execute("SELECT digest FROM item WHERE custom_id=?", (name,)).fetchone()
    if known is None:
        return "new"
    if known[0] == line.digest:
        return "known"
    return BadLine(
        number=line.number,
        message=f"custom_id `{name}` stood for another request when the job was made",
    )


def _insert(db: sqlite3.Connection, line: BatchLine, order: Order, number: int) -> None:
    body = json.dumps(line.body, ensure_ascii=False, separators=(",", ":")).encode()
    db.execute(
        "INSERT INTO item (number, custom_id, digest, prefix, cost) VALUES (?,?,?,?,?)",
        (number, line.custom_id, line.digest, order.group, order.cost),
    )
    db.execute("INSERT INTO request VALUES (?,?,?)", (number, line.url, body))
