"""Faults of the disk: the library that makes them (data/io_faults.c), and power cuts worked out.

A power cut keeps, of every file, what was synced before it, and of later writes any part. Names
are kept like a journal keeps them: those of the past up to the last sync of any kind, and of later
ones as many as the cut allows, in their order.
"""

import ctypes
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).parent / "data" / "io_faults.c"
SECTOR_BYTES = 512
_RECORD = struct.Struct("<qqqq")
_ARMED = "LOADMASTER_IO_FAULTS"


def preload_self() -> None:
    """Start this program over with the library preloaded, unless it is."""
    if os.environ.get(_ARMED):
        return
    folder = tempfile.mkdtemp(prefix="io-faults-")
    library = Path(folder) / "io_faults.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), _ARMED: folder}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def library_folder() -> Path:
    """Where `preload_self` put the library; to be removed at the end."""
    return Path(os.environ[_ARMED])


def arm(
    folder: Path, *, at: int = 0, error: int = 0, forever: bool = False, trace: int = -1
) -> None:
    """From now on, count calls below a folder; strike at one of them, write them to a trace."""
    _library().io_faults_arm(
        str(folder).encode(), ctypes.c_long(at), error, int(forever), ctypes.c_int(trace)
    )


def disarm() -> None:
    """No more faults."""
    _library().io_faults_disarm()


def mark(number: int) -> None:
    """Write into the trace that something has been acknowledged."""
    _library().io_faults_mark(ctypes.c_int64(number))


def calls() -> int:
    """Calls since `arm`."""
    _library().io_faults_calls.restype = ctypes.c_long
    return int(_library().io_faults_calls())


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A call that changed files, or a mark."""

    kind: str  # w write, t truncate, s sync, n new, c opened, r rename, u unlink, d mkdir, m mark
    inode: int
    offset: int
    data: bytes


def read_trace(raw: bytes) -> list[Record]:
    """The records of a trace, in their order."""
    records, at = [], 0
    while at < len(raw):
        kind, inode, offset, size = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        records.append(Record(kind=chr(kind), inode=inode, offset=offset, data=raw[at : at + size]))
        at += size
    return records


@dataclass(slots=True, kw_only=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    unsynced: list[Record] = field(default_factory=list)


class Disk:
    """What a disk holds while records are played, and what it may hold when the power goes."""

    def __init__(self, folder: Path) -> None:
        """Begin with a folder as it is now; all of it is synced."""
        self._files: dict[int, _File] = {}
        self._names: dict[str, int] = {}
        self._folders: set[str] = set()
        self._unsynced_names: list[Record] = []
        for path in folder.rglob("*"):
            if path.is_file():
                inode = path.stat().st_ino
                self._files[inode] = _File(data=bytearray(path.read_bytes()))
                self._names[str(path)] = inode
            else:
                self._folders.add(str(path))

    def play(self, record: Record) -> None:
        """One more call has been made."""
        if record.kind in "wt":
            self._files.setdefault(record.inode, _File()).unsynced.append(record)
        elif record.kind in "ncrud":
            if record.kind == "n":  # the inode of a file that is gone may be used again
                self._files[record.inode] = _File()
            self._unsynced_names.append(record)
        elif record.kind == "s":
            file = self._files.get(record.inode)
            if file is not None:
                _apply(file.data, file.unsynced)
                file.unsynced = []
            self._rename(self._unsynced_names)
            self._unsynced_names = []

    def _rename(self, records: Sequence[Record]) -> None:
        for record in records:
            name = record.data.decode()
            if record.kind in "nc":
                self._names[name] = record.inode
                self._files.setdefault(record.inode, _File())
            elif record.kind == "d":
                self._folders.add(name)
            elif record.kind == "u":
                self._names.pop(name, None)
            else:
                self._move(*name.split("\n"))

    def _move(self, before: str, after: str) -> None:
        if before in self._names:
            self._names[after] = self._names.pop(before)
            return
        moved = {n: after + n[len(before) :] for n in self._names if n.startswith(f"{before}/")}
        for old, new in moved.items():
            self._names[new] = self._names.pop(old)
        self._folders.discard(before)
        self._folders.add(after)

    def cut(self, chance: random.Random, root: Path, into: Path) -> None:
        """Write one state that the disk may be in after a power cut now."""
        names = self._unsynced_names
        after = Disk.__new__(Disk)
        after._files, after._folders = self._files, set(self._folders)
        after._names = dict(self._names)
        after._rename(names[: chance.randint(0, len(names))])
        for name in after._folders:
            (into / Path(name).relative_to(root)).mkdir(parents=True, exist_ok=True)
        for name, inode in after._names.items():
            path = into / Path(name).relative_to(root)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_survivors(self._files[inode], chance))


def _apply(data: bytearray, records: Sequence[Record]) -> None:
    for record in records:
        if record.kind == "t":
            del data[record.offset :]
            data.extend(bytes(record.offset - len(data)))
        else:
            end = record.offset + len(record.data)
            data.extend(bytes(max(0, end - len(data))))
            data[record.offset : end] = record.data


def _survivors(file: _File, chance: random.Random) -> bytes:
    """What was synced, and any sectors of what was not."""
    data = bytearray(file.data)
    share = chance.choice([0.0, 0.5, 1.0, chance.random()])
    for record in file.unsynced:
        if record.kind == "t":
            if chance.random() < share:
                _apply(data, [record])
            continue
        for at in range(0, len(record.data), SECTOR_BYTES):
            if chance.random() < share:
                piece = record.data[at : at + SECTOR_BYTES]
                part = Record(kind="w", inode=0, offset=record.offset + at, data=piece)
                _apply(data, [part])
    return bytes(data)
