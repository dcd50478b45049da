"""A file that is being downloaded: its bytes, and a map of the chunks that are on the disk.

`NAME.part` has the bytes, `NAME.part.json` the map. The map is written after the bytes are synced,
and by rename: whatever moment a crash takes, what the map claims is on the disk.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadmaster.errors import LoadmasterError
from loadmaster.model.ranges import Version
from loadmaster.units import format_size

_SCHEMA_VERSION = 1
_MAX_STATE_BYTES = 8 << 20


class DiskFullError(LoadmasterError):
    """The disk has too little room; what was downloaded is kept."""

    code = "disk_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a part belongs to: chunks of another version, or of another size, are of no use."""

    url: str
    version: Version
    sha256: str | None
    chunk_bytes: int

    def to_json(self) -> dict[str, object]:
        return {
            "url": self.url,
            "size_bytes": self.version.size_bytes,
            "etag": self.version.etag,
            "last_modified": self.version.last_modified,
            "sha256": self.sha256,
            "chunk_bytes": self.chunk_bytes,
        }

    @property
    def is_certain(self) -> bool:
        """Whether a changed file would be noticed: by its version, or by its digest at the end."""
        version = self.version
        return bool(version.etag or version.last_modified or self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Bytes `start` to `end`, the end excluded."""

    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.start


class PartFile:
    """Chunks on the way to a file. `write` may be called from many threads, the rest from one.

    A thread that was left behind may still call `write` after `close`: that is an OSError.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        """Take up what an earlier run left of the same version, else begin anew.

        Raises:
            OSError: the folder cannot be written.
        """
        assert identity.version.size_bytes is not None
        self.path = path
        self.identity = identity
        self.size_bytes: int = identity.version.size_bytes
        self._state = path.with_name(f"{path.name}.json")
        n_chunks = -(-self.size_bytes // identity.chunk_bytes)
        self._done = _read_done(self._state, path, identity, n_chunks) or bytearray(n_chunks)
        self.resumed_bytes = self.done_bytes
        if not self.resumed_bytes:
            discard(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o644)
        self._lock = threading.Lock()
        os.ftruncate(self._file, self.size_bytes)

    @property
    def done_bytes(self) -> int:
        """Bytes of the chunks that are complete."""
        return sum(run.n_bytes for run in self._runs(1))

    def missing(self) -> Iterator[Run]:
        """Runs of chunks that are not complete."""
        return self._runs(0)

    def _runs(self, value: int) -> Iterator[Run]:
        chunk, at = self.identity.chunk_bytes, 0
        while (start := self._done.find(value, at)) >= 0:
            end = self._done.find(1 - value, start)
            end = len(self._done) if end < 0 else end
            yield Run(start=start * chunk, end=min(end * chunk, self.size_bytes))
            at = end

    def write(self, at: int, data: bytes) -> None:
        """Put bytes into their place.

        Raises:
            OSError: the disk refuses.
        """
        view = memoryview(data)
        while view:
            with self._lock:
                n_bytes = os.pwrite(self._file, view, at)
            view, at = view[n_bytes:], at + n_bytes

    def mark(self, start: int, end: int) -> None:
        """The chunks that lie wholly between two positions are written."""
        chunk = self.identity.chunk_bytes
        first = -(-start // chunk)
        last = len(self._done) if end >= self.size_bytes else end // chunk
        for index in range(first, last):
            self._done[index] = 1

    def sync(self) -> None:
        """Make the map say what has been written by now, after making sure that it has."""
        done = bytes(self._done)  # chunks marked from here on wait for the next time
        os.fdatasync(self._file)
        document = {
            "schema_version": _SCHEMA_VERSION,
            **self.identity.to_json(),
            "done": _packed(done).hex(),
        }
        write_durably(self._state, json.dumps(document).encode())

    def close(self) -> None:
        """Close the file; what is not synced by now is downloaded again. Idempotent."""
        with self._lock:
            file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _read_done(state: Path, part: Path, identity: Identity, n_chunks: int) -> bytearray | None:
    """The map of an earlier run; None when there is none, or it is of something else."""
    try:
        with state.open("rb") as file:
            document = json.loads(file.read(_MAX_STATE_BYTES))
        if part.is_symlink() or part.stat().st_size != identity.version.size_bytes:
            return None
        packed = bytes.fromhex(document.pop("done"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    expected = {"schema_version": _SCHEMA_VERSION, **identity.to_json()}
    if document != expected or not identity.is_certain or len(packed) != -(-n_chunks // 8):
        return None
    return bytearray((packed[i // 8] >> (i % 8)) & 1 for i in range(n_chunks))


def _packed(done: bytes) -> bytes:
    packed = bytearray(-(-len(done) // 8))
    for index, value in enumerate(done):
        packed[index // 8] |= value << (index % 8)
    return bytes(packed)


def discard(part: Path) -> None:
    """Remove a part and its map, the map first: a map without its part would claim too much."""
    for path in (part.with_name(f"{part.name}.json"), part):
        path.unlink(missing_ok=True)


def promote(part: Path, final: Path) -> None:
    """Give a complete, verified file its name, durably."""
    file = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(part, final)
    sync_folder(final.parent)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)


def quarantine(part: Path) -> Path:
    """Keep a file with the wrong digest for whoever wants to look, under a name nothing loads."""
    bad = bad_of(part)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)
    os.replace(part, bad)
    return bad


def bad_of(part: Path) -> Path:
    """Where `quarantine` puts a part."""
    return part.with_name(f"{part.name.removesuffix('.part')}.bad")


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file at once: the old one or the new one is there, never half of one."""
    temporary = path.with_name(f"{path.name}.tmp")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable, where the file system can."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(file)
    finally:
        os.close(file)


def check_room(folder: Path, need_bytes: int) -> None:
    """Refuse a download that will not fit: its bytes and 5 % on top.

    Raises:
        DiskFullError: too little is free.
    """
    wanted = need_bytes + need_bytes // 20
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise DiskFullError(
            f"the disk of `{folder}` has {format_size(free)} free, the download needs "
            f"{format_size(wanted)} (5 % on top)",
            hint=f"free {format_size(wanted - free)}, or set `HF_HUB_CACHE` to a folder of another "
            "disk",
            numbers={"free_bytes": free, "need_bytes": wanted},
        )


def total_missing(runs: Iterable[Run]) -> int:
    """Bytes in all runs."""
    return sum(run.n_bytes for run in runs)
