"""Where a text must not be: in files, logs, core dumps, arguments and environments of processes."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_PIECE_BYTES = 1 << 20


def forms(text: str) -> tuple[bytes, ...]:
    """The text as it may be written: plain, in UTF-16, escaped, in base64, in hex."""
    import base64

    plain = text.encode()
    shifted = (base64.b64encode(b"x" * n + plain)[4 if n else 0 : -4] for n in range(3))
    return (plain, text.encode("utf-16-le"), plain.hex().encode(), *shifted)


def in_files(text: str, folders: Iterable[Path]) -> Iterator[str]:
    """Files below the folders that have it, under their names or in them."""
    wanted = forms(text)
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if text in path.name:
                yield f"{path}: its name"
            with suppress(OSError):
                if stat.S_ISREG(path.lstat().st_mode) and _has(path, wanted):
                    yield str(path)


def in_processes(text: str, pid: int) -> Iterator[str]:
    """Arguments, environments, names, and open files that have no name any more, of a family."""
    wanted = forms(text)
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            yield from _in_process(process.pid, wanted)


def _in_process(pid: int, wanted: tuple[bytes, ...]) -> Iterator[str]:
    folder = Path(f"/proc/{pid}")
    names = [folder / "cmdline", folder / "environ", folder / "comm"]
    names += folder.glob("task/*/comm")
    for path in names:
        with suppress(OSError):
            if _has(path, wanted):
                yield str(path)
    for path in folder.glob("fd/*"):
        with suppress(OSError):
            target = os.readlink(path)
            kept = "memfd:" in target or target.endswith(" (deleted)")
            if kept and _has(path, wanted):
                yield f"{path} -> {target}"


def _has(path: Path, wanted: tuple[bytes, ...]) -> bool:
    """Piece by piece, with an overlap: a core dump is large."""
    keep = max(map(len, wanted))
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            window = tail + piece
            if any(form in window for form in wanted):
                return True
            tail = window[-keep:]
    return False
