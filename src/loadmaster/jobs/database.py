"""The database of one job: its tables, and how it is opened so that a commit is on the disk.

WAL with `synchronous=FULL`: a transaction counts once its frames are synced. An I/O error ends the
connection; a sync that failed is never tried again, for the kernel may have dropped the pages. The
next open reads what the disk has.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadmaster.errors import BusyError, DamagedFileError, LoadmasterError, NotFoundError

SCHEMA_VERSION = 1
FILE_NAME = "job.sqlite3"
BUSY_TIMEOUT_S = 10.0  # another process reads, or asks for a cancellation

SCHEMA = """
CREATE TABLE job (
    job_id TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL,
    input_path TEXT, output_path TEXT, error_path TEXT,
    state TEXT NOT NULL, reason TEXT,
    created_s REAL NOT NULL, started_s REAL, ended_s REAL, run_s REAL NOT NULL DEFAULT 0,
    cancel_asked INTEGER NOT NULL DEFAULT 0 -- the id of the process that was asked
);
CREATE TABLE item (
    number INTEGER PRIMARY KEY, custom_id TEXT NOT NULL UNIQUE, digest BLOB NOT NULL,
    prefix BLOB NOT NULL, cost INTEGER NOT NULL, rank INTEGER NOT NULL DEFAULT 0,
    state INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE request (number INTEGER PRIMARY KEY REFERENCES item, url TEXT NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE result (
    number INTEGER PRIMARY KEY REFERENCES item, failed INTEGER NOT NULL, line BLOB NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    generated_tokens INTEGER NOT NULL
);
CREATE INDEX item_turn ON item (state, rank);
"""


class JobStoreError(LoadmasterError):
    """The job's database could not be read or written; what was committed before stays."""

    code = "job_store"


def create(folder: Path) -> sqlite3.Connection:
    """A new database in a folder that nobody else knows yet: no journal and no syncs, until
    `keep_journal` and a sync of the file."""
    with failures(folder):
        connection = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA synchronous=OFF")
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    return connection


def keep_journal(connection: sqlite3.Connection, folder: Path) -> None:
    """From now on the database has a write-ahead log, for good.

    A process that is killed while it turns this on leaves a journal behind that readers cannot
    roll back: it is done before the job has a name.
    """
    with failures(folder):
        connection.execute("PRAGMA journal_mode=WAL")


def connect(folder: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a job's database.

    Raises:
        NotFoundError: there is none.
        DamagedFileError: it is no database of ours, or a later one.
        JobStoreError: it cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise NotFoundError(
            f"there is no job `{folder.name}`", hint="`loadmaster batch list` shows all of them"
        )
    with failures(folder):
        mode = "ro" if read_only else "rw"
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            timeout=BUSY_TIMEOUT_S,
            check_same_thread=False,
        )
        try:
            _prepare(connection, folder, read_only=read_only)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, folder: Path, *, read_only: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != SCHEMA_VERSION:
        raise DamagedFileError(
            f"job `{folder.name}` has a store of version {version}, this is for {SCHEMA_VERSION}",
            code="job_version",
        )
    connection.execute("PRAGMA foreign_keys=ON")
    if not read_only:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA fullfsync=ON")  # macOS: its plain fsync stops at the drive


@contextmanager
def transaction(connection: sqlite3.Connection, folder: Path) -> Iterator[None]:
    """All or nothing; when it ends without an error, it is on the disk."""
    with failures(folder):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def failures(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, with what to type next."""
    try:
        yield
    except sqlite3.Error as error:
        raise _failure(error, folder) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        raise _unwritable(folder, str(error.strerror)) from error


def _failure(error: sqlite3.Error, folder: Path) -> LoadmasterError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return BusyError(f"another process writes to job `{folder.name}`", hint="try it again")
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT") or "malformed" in str(error):
        return DamagedFileError(
            f"the store of job `{folder.name}` is damaged: {error}",
            code="damaged_job",
            hint=f"its file is `{folder / FILE_NAME}`; `sqlite3 FILE .recover` saves what it can",
        )
    return _unwritable(folder, str(error))


def _unwritable(folder: Path, reason: str) -> JobStoreError:
    return JobStoreError(
        f"the store of job `{folder.name}` cannot be written: {reason}; results committed before "
        "this are safe",
        hint=f"mend the disk of `{folder}`, then `loadmaster batch resume {folder.name}`",
    )
