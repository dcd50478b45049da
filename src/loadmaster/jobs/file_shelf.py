"""Files that clients keep here, inputs and outputs of batches: each in a folder of its own.

A file is there when its folder has a card; folders appear by a rename, so what a client was told of
is on the disk, whole. A client's word for a file is compared with a pattern and never with a path.
"""

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from loadmaster.errors import LoadmasterError, NotFoundError
from loadmaster.jobs.files import OutputError, atomic_file, sync_folder
from loadmaster.jobs.lock import is_alive
from loadmaster.schema import SchemaError, from_json, to_json
from loadmaster.units import MIB, format_size

Purpose = Literal["batch", "batch_output"]

CARD_NAME = "card.json"
CONTENT_NAME = "content"
# Left free on the disk whatever is uploaded: jobs that run have to commit their results.
RESERVE_BYTES = 256 * MIB
_ID = re.compile(r"file-[0-9a-f]{24}")
_BUILDING = re.compile(r"\.file-[0-9a-f]{24}\.(\d+)\.part")


class StorageError(LoadmasterError):
    """The disk refused; what was kept before is as it was."""

    code = "storage"


class StorageFullError(StorageError):
    """The disk has no room for what is to be kept."""

    http_status = 507
    code = "insufficient_storage"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFile:
    """A file's card. Times are seconds since 1970."""

    file_id: str
    owner: str  # the scope of the key it was made with
    filename: str  # as its client calls it; nothing here is opened by this name
    purpose: Purpose
    size_bytes: int
    created_s: float
    expires_s: float | None = None


class FileShelf:
    """The folder of kept files; it may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # -- making files

    def incoming(self, purpose: Purpose, owner: str) -> "Incoming":
        """A file that is about to come, in pieces.

        Raises:
            StorageError: the disk refused.
        """
        with keeping():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return Incoming(self, new_file_id(), purpose, owner)

    def reserve(self, file_id: str) -> Path:
        """A place for a file's content, which nobody sees before `publish`."""
        folder = self._folder_of(file_id)
        with keeping():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            sync_folder(self.folder)
        return folder / CONTENT_NAME

    def publish(self, file_id: str, *, filename: str, owner: str) -> KeptFile:
        """Give a reserved file its card, now that its content is written."""
        with keeping():
            card = KeptFile(
                file_id=file_id,
                owner=owner,
                filename=filename,
                purpose="batch_output",
                size_bytes=self.content(file_id).stat().st_size,
                created_s=time.time(),
            )
        write_card(self.folder / file_id, card)
        return card

    def content(self, file_id: str) -> Path:
        """Where the bytes of a file are.

        Raises:
            NotFoundError: this is no file's id.
        """
        return self._folder_of(file_id) / CONTENT_NAME

    # -- what there is

    def find(self, file_id: str, owner: str) -> KeptFile:
        """A file of an owner.

        Raises:
            NotFoundError: there is none, or it is another's.
        """
        card = _read_card(self._folder_of(file_id))
        if card is None or card.owner != owner:
            raise _unknown(file_id)
        if card.expires_s is not None and card.expires_s <= time.time():
            self._remove(file_id)
            raise _unknown(file_id)
        return card

    def all(self, owner: str) -> list[KeptFile]:
        """All files of an owner, the newest first."""
        found = []
        for file_id in self._ids():
            with suppress(NotFoundError):
                found.append(self.find(file_id, owner))
        return sorted(found, key=lambda card: (card.created_s, card.file_id), reverse=True)

    def open(self, file_id: str, owner: str) -> BinaryIO:
        """A file's bytes; who reads them is not disturbed when it is deleted.

        Raises:
            NotFoundError: there is no such file.
        """
        self.find(file_id, owner)
        try:
            return self.content(file_id).open("rb")
        except FileNotFoundError:
            raise _unknown(file_id) from None

    def delete(self, file_id: str, owner: str) -> None:
        """Remove a file.

        Raises:
            NotFoundError: there is no such file.
            StorageError: the disk refused.
        """
        self.find(file_id, owner)
        self._remove(file_id)

    def discard(self, file_id: str) -> None:
        """Remove a reserved file that nobody was told of, if it is there."""
        with suppress(OSError):
            shutil.rmtree(self._folder_of(file_id))

    def sweep(self) -> None:
        """Remove uploads whose process died."""
        for path in self._paths():
            match = _BUILDING.fullmatch(path.name)
            if match and not is_alive(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)

    def _ids(self) -> Iterator[str]:
        return (path.name for path in self._paths() if _ID.fullmatch(path.name))

    def _paths(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except OSError:
            return []

    def _folder_of(self, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise _unknown(file_id)
        return self.folder / file_id

    def _remove(self, file_id: str) -> None:
        """The card goes first: half of a file is no file."""
        folder = self._folder_of(file_id)
        with keeping():
            (folder / CARD_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


class Incoming:
    """A file on its way. `finish` makes it one; `close` without that leaves no trace."""

    def __init__(self, shelf: FileShelf, file_id: str, purpose: Purpose, owner: str) -> None:
        self._shelf = shelf
        self._file_id = file_id
        self._purpose = purpose
        self._owner = owner
        self._building = shelf.folder / f".{file_id}.{os.getpid()}.part"
        self._building.mkdir(mode=0o700)
        fd = os.open(self._building / CONTENT_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = open(fd, "wb", buffering=0)  # noqa: SIM115 (`close` does)
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            StorageFullError: the disk would be left with too little.
            StorageError: it refused.
        """
        check_room(self._shelf.folder, len(data))
        with keeping():
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self.size_bytes += len(data)

    def finish(self, filename: str, expires_s: float | None = None) -> KeptFile:
        """The file is whole; when this returns, it is on the disk."""
        card = KeptFile(
            file_id=self._file_id,
            owner=self._owner,
            filename=filename,
            purpose=self._purpose,
            size_bytes=self.size_bytes,
            created_s=time.time(),
            expires_s=expires_s,
        )
        with keeping():
            os.fsync(self._file.fileno())
            self._file.close()
            write_card(self._building, card)
            self._building.rename(self._shelf.folder / self._file_id)
            sync_folder(self._shelf.folder)
        return card

    def close(self) -> None:
        """No more bytes. Idempotent."""
        self._file.close()
        shutil.rmtree(self._building, ignore_errors=True)


def new_file_id() -> str:
    """An id that no file has."""
    return f"file-{secrets.token_hex(12)}"


def check_room(folder: Path, needed_bytes: int) -> None:
    """Refuse what the disk has no room for, beside what jobs need to go on.

    Raises:
        StorageFullError: with both numbers.
    """
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + RESERVE_BYTES:
        raise StorageFullError(
            f"the server's disk has {format_size(free_bytes)} free; {format_size(needed_bytes)} "
            f"and a reserve of {format_size(RESERVE_BYTES)} are needed",
            hint="delete files that are not needed any more",
            numbers={"free_bytes": free_bytes, "needed_bytes": needed_bytes},
        )


@contextmanager
def keeping() -> Iterator[None]:
    """Turn a disk's errors into ours, without the paths of this machine: clients read them."""
    try:
        yield
    except (OSError, OutputError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT)
        reason = os.strerror(number) if number is not None else type(error).__name__
        raise (StorageFullError if full else StorageError)(
            f"the server's disk refused: {reason}"
        ) from error


def write_card(folder: Path, card: object) -> None:
    """Write a frozen value beside what it tells of, whole or not at all."""
    with keeping(), atomic_file(folder / CARD_NAME) as file:
        file.write(json.dumps(to_json(card), ensure_ascii=False).encode())


def _read_card(folder: Path) -> KeptFile | None:
    try:
        return from_json(KeptFile, json.loads((folder / CARD_NAME).read_bytes()))
    except (OSError, ValueError, SchemaError):
        return None


def _unknown(file_id: str) -> NotFoundError:
    return NotFoundError(f"there is no file `{file_id[:80]}`", hint="`GET /v1/files` lists yours")
