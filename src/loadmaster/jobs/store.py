"""The durable store of one job: items in, exactly one committed result of each out.

A result is acknowledged when `commit` returns, and then it is on the disk. Its primary key is the
item's, so a second result of an item cannot exist, whatever was computed twice.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadmaster.jobs import database
from loadmaster.jobs.database import failures, transaction
from loadmaster.jobs.types import (
    STATE_CODES,
    Counts,
    Item,
    ItemResult,
    Job,
    JobState,
)

_PENDING, _DONE, _FAILED = (STATE_CODES[name] for name in ("pending", "done", "failed"))
_PAGE = 256
_BLOCKS = 16


class JobStore:
    """One job's database. One process writes items and results: the one with the job's lock."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Open the job in `folder`.

        Raises:
            NotFoundError, DamagedFileError, JobStoreError: it cannot be opened.
        """
        self.folder = folder
        self._db = database.connect(folder, read_only=read_only)

    def close(self) -> None:
        """Close the database. Idempotent."""
        self._db.close()

    def __enter__(self) -> "JobStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the job

    def job(self) -> Job:
        """The job as it is now."""
        with failures(self.folder):
            row = _one(self._db.execute("SELECT * FROM job"))
        paths = {
            name: None if row[name] is None else Path(row[name])
            for name in ("input_path", "output_path", "error_path")
        }
        return Job(**{**row, **paths, "cancel_asked": bool(row["cancel_asked"])})

    def counts(self) -> Counts:
        """Items by state, and the tokens of all results."""
        with failures(self.folder):
            states: dict[int, int] = dict(
                self._db.execute("SELECT state, count(*) FROM item GROUP BY state")
            )
            sums = self._db.execute(
                "SELECT total(prompt_tokens), total(cached_tokens), total(generated_tokens)"
                " FROM result"
            ).fetchone()
        prompt, cached, generated = map(int, sums)
        return Counts(
            done=states.get(_DONE, 0),
            failed=states.get(_FAILED, 0),
            left=states.get(_PENDING, 0),
            prompt_tokens=prompt,
            cached_tokens=cached,
            generated_tokens=generated,
        )

    def begin_run(self) -> Job:
        """This process starts to work on the job. A cancellation that was asked of it meanwhile
        counts; one that a process before it did not live to see does not.

        Items that were in flight when a run before this one died are pending still.
        """
        with self._transaction():
            self._db.execute(
                "UPDATE job SET state='running', reason=NULL, started_s=?1, ended_s=NULL,"
                " cancel_asked=CASE cancel_asked WHEN ?2 THEN ?2 ELSE 0 END",
                (time.time(), os.getpid()),
            )
        return self.job()

    def end_run(self, state: JobState, reason: str | None, run_s: float) -> None:
        """The process stops working on it, after `run_s` seconds."""
        with self._transaction():
            self._db.execute(
                "UPDATE job SET state=?, reason=?, ended_s=?, run_s=run_s+?, cancel_asked=0",
                (state, reason, time.time(), run_s),
            )

    def ask_to_cancel(self, pid: int) -> None:
        """Tell the process that has the job to give it up, also if it has not begun to run it."""
        with self._transaction():
            self._db.execute("UPDATE job SET cancel_asked=?", (pid,))

    def set_state(self, state: JobState, reason: str | None = None) -> None:
        """Put a job that nobody works on into a state."""
        with self._transaction():
            self._db.execute("UPDATE job SET state=?, reason=?", (state, reason))

    def cancel_asked(self) -> bool:
        """Whether someone asked for the end of the job."""
        with failures(self.folder):
            return bool(self._db.execute("SELECT cancel_asked FROM job").fetchone()[0])

    def set_settings(self, settings: str, error_path: Path | None) -> None:
        """Replace what the runner keeps with the job, and where failed items go if that is said."""
        path = None if error_path is None else str(error_path)
        with self._transaction():
            self._db.execute(
                "UPDATE job SET settings=?, error_path=coalesce(?, error_path)", (settings, path)
            )

    # -- items

    def pending(self) -> Iterator[Item]:
        """Items without a result, in their order; one body in memory at a time."""
        after_rank = 0
        while page := self._page(after_rank):
            yield from map(self._item, page)
            after_rank = page[-1][-1]

    def _page(self, after_rank: int) -> list[tuple[int, ...]]:
        with failures(self.folder):
            return self._db.execute(
                "SELECT number, rank FROM item WHERE state=? AND rank>? ORDER BY rank LIMIT ?",
                (_PENDING, after_rank, _PAGE),
            ).fetchall()

    def _item(self, key: tuple[int, ...]) -> Item:
        with failures(self.folder):
            row = _one(
                self._db.execute(
                    "SELECT number, custom_id, url, body, cost, deaths, rank"
                    " FROM item JOIN request USING (number) WHERE number=?",
                    key[:1],
                )
            )
        return Item(**{**row, "body": json.loads(row["body"])})

    def cost_left(self) -> int:
        """The sum of what pending items may take, as `Order.cost` has it."""
        with failures(self.folder):
            sums = self._db.execute("SELECT total(cost) FROM item WHERE state=?", (_PENDING,))
            return int(sums.fetchone()[0])

    def spread(self, count: int) -> list[int]:
        """The numbers of so many pending items, spread evenly over their order."""
        with failures(self.folder):
            numbers = [
                number
                for (number,) in self._db.execute(
                    "SELECT number FROM item WHERE state=? ORDER BY rank", (_PENDING,)
                )
            ]
        if len(numbers) <= count:
            return numbers
        return [numbers[i * len(numbers) // count] for i in range(count)]

    def sample(self, most_items: int, most_cost: int) -> list[Item]:
        """Pending items that stand for all of them: blocks of neighbours in their order, and the
        one that may take most."""
        with failures(self.folder):
            keys = self._db.execute(
                "SELECT number, cost FROM item WHERE state=? ORDER BY rank", (_PENDING,)
            ).fetchall()
        if len(keys) > most_items:
            block = most_items // _BLOCKS
            starts = [i * (len(keys) - block) // (_BLOCKS - 1) for i in range(_BLOCKS)]
            longest = max(keys, key=lambda key: key[1])
            keys = [longest, *(keys[start + step] for start in starts for step in range(block))]
            keys = list(dict.fromkeys(keys))
        items: list[Item] = []
        for number, cost in keys:
            most_cost -= cost
            if most_cost < 0 and items:
                break
            items.append(self._item((number,)))
        return items

    def commit(self, results: Sequence[ItemResult]) -> None:
        """Make results durable, all or none of them. When this returns, they are acknowledged.

        Raises:
            JobStoreError: the disk refused; none of them counts.
        """
        with self._transaction():
            self._db.executemany(
                "INSERT INTO result VALUES (?,?,?,?,?,?)", map(_result_row, results)
            )
            self._db.executemany(
                "UPDATE item SET state=? WHERE number=?",
                [(_FAILED if r.failed else _DONE, r.number) for r in results],
            )

    def add_deaths(self, numbers: Iterable[int]) -> None:
        """A worker died with these in flight."""
        with self._transaction():
            self._db.executemany(
                "UPDATE item SET deaths=deaths+1 WHERE number=?", [(n,) for n in numbers]
            )

    def retry_failed(self) -> int:
        """Make failed items pending again, and forget what they failed with; how many they were."""
        with self._transaction():
            self._db.execute("DELETE FROM result WHERE failed")
            changed = self._db.execute(
                "UPDATE item SET state=?, deaths=0 WHERE state=?", (_PENDING, _FAILED)
            ).rowcount
            if changed:
                self._db.execute("UPDATE job SET state='queued', reason=NULL")
        return changed

    # -- results

    def lines(self, *, failed: bool) -> Iterator[bytes]:
        """The committed lines of the output file or of the error file, in the input's order."""
        after = 0
        while True:
            with failures(self.folder):
                rows = self._db.execute(
                    "SELECT number, line FROM result WHERE failed=? AND number>?"
                    " ORDER BY number LIMIT ?",
                    (failed, after, _PAGE),
                ).fetchall()
            if not rows:
                return
            for after, line in rows:  # noqa: B007 (the last one is where the next page begins)
                yield line

    def failures_listed(self, limit: int) -> list[Mapping[str, Any]]:
        """The first lines of the error file."""
        with failures(self.folder):
            rows = self._db.execute(
                "SELECT line FROM result WHERE failed ORDER BY number LIMIT ?", (limit,)
            ).fetchall()
        return [json.loads(line) for (line,) in rows]

    def _transaction(self) -> Any:
        return transaction(self._db, self.folder)


def _result_row(result: ItemResult) -> tuple[object, ...]:
    line = json.dumps(result.line, ensure_ascii=False, separators=(",", ":"))
    return (
        result.number,
        result.failed,
        line.encode("utf-8", errors="replace"),
        result.prompt_tokens,
        result.cached_tokens,
        result.generated_tokens,
    )


def _one(cursor: sqlite3.Cursor) -> dict[str, Any]:
    names = [column[0] for column in cursor.description]
    return dict(zip(names, cursor.fetchone(), strict=True))
