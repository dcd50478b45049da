"""Batches as clients ordered them: a card for each, beside the job that it became.

The job's store knows its items; the card knows what was asked for, and how it ended. The process
that attends to a batch holds the lock of its card and is the only one that writes it; others leave
a note when it is to be cancelled.
"""

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loadmaster.errors import NotFoundError
from loadmaster.jobs.file_shelf import CARD_NAME, keeping, write_card
from loadmaster.jobs.files import sync_folder
from loadmaster.jobs.lock import JobLock
from loadmaster.jobs.types import Counts
from loadmaster.schema import SchemaError, from_json

EndStatus = Literal["completed", "failed", "expired", "cancelled"]

CANCEL_NAME = "cancel"
_ID = re.compile(r"batch_[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderError:
    """Why a batch failed: something about a line, or about all of it."""

    code: str
    message: str
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderEnd:
    """How a batch ended; nothing of it changes after that."""

    status: EndStatus
    at_s: float
    counts: Counts | None = None
    has_output: bool = False
    has_errors: bool = False  # an error file, that is
    errors: tuple[OrderError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """A batch as it was ordered. Times are seconds since 1970."""

    batch_id: str  # its job has the same id
    owner: str  # the scope of the key it was ordered with
    endpoint: str
    input_file_id: str
    completion_window: str
    created_s: float
    expires_s: float
    output_file_id: str
    error_file_id: str
    metadata: Mapping[str, str] | None = None
    model: str | None = None  # the served one; None until the lines were read
    in_progress_s: float | None = None
    finalizing_s: float | None = None
    cancelling_s: float | None = None  # when somebody asked for its end
    end: OrderEnd | None = None


def new_batch_id() -> str:
    """An id that no batch and no job has."""
    return f"batch_{secrets.token_hex(6)}"


class OrderBook:
    """The folder of orders; it may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, order: BatchOrder) -> None:
        """Keep a new order; when this returns, it is on the disk.

        Raises:
            StorageError: the disk refused; there is no order.
        """
        folder = self.folder / order.batch_id
        with keeping():
            folder.mkdir(parents=True, mode=0o700)
        try:
            write_card(folder, order)
            with keeping():
                sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def write(self, order: BatchOrder) -> None:
        """Renew an order; the caller has its lock.

        Raises:
            StorageError: the disk refused; it is as it was.
        """
        write_card(self.folder / order.batch_id, order)

    def find(self, batch_id: str, owner: str) -> BatchOrder:
        """An order of an owner.

        Raises:
            NotFoundError: there is none, or it is another's.
        """
        order = self.read(batch_id)
        if order is None or order.owner != owner:
            raise NotFoundError(
                f"there is no batch `{batch_id[:80]}`", hint="`GET /v1/batches` lists yours"
            )
        return order

    def read(self, batch_id: str) -> BatchOrder | None:
        """An order, whosever it is; None when there is none that can be read."""
        if not _ID.fullmatch(batch_id):
            return None
        try:
            raw = (self.folder / batch_id / CARD_NAME).read_bytes()
            order = from_json(BatchOrder, json.loads(raw))
        except (OSError, ValueError, SchemaError):
            return None
        return replace(order, cancelling_s=self._cancel_asked_s(batch_id))

    def all(self) -> list[BatchOrder]:
        """All orders, the newest first."""
        found = [order for batch_id in self._ids() if (order := self.read(batch_id))]
        return sorted(found, key=lambda order: (order.created_s, order.batch_id), reverse=True)

    def claim(self, batch_id: str) -> JobLock:
        """The lock of whoever attends to a batch.

        Raises:
            BusyError: another process has it.
        """
        return JobLock(self.folder / batch_id)

    def ask_to_cancel(self, batch_id: str) -> None:
        """Leave a note for whoever attends to the batch."""
        with keeping(), suppress(FileExistsError):
            (self.folder / batch_id / CANCEL_NAME).touch(mode=0o600, exist_ok=False)

    def cancel_asked(self, batch_id: str) -> bool:
        """Whether somebody asked for the end of a batch."""
        return self._cancel_asked_s(batch_id) is not None

    def _cancel_asked_s(self, batch_id: str) -> float | None:
        with suppress(OSError):
            return (self.folder / batch_id / CANCEL_NAME).stat().st_mtime
        return None

    def _ids(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir()]
        except OSError:
            return []
