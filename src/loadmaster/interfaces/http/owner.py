"""Whose a port is: the process that listens on it, where /proc tells."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"


def owner_of_port(port: int, proc: Path = Path("/proc")) -> str | None:
    """`python (pid 42)`; None when it cannot be seen."""
    inodes = {
        inode for table in ("tcp", "tcp6") for inode in _listening(proc / "net" / table, port)
    }
    if not inodes:
        return None
    for folder in proc.glob("[0-9]*"):
        with suppress(OSError):
            for link in (folder / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(link) in inodes:
                        name = (folder / "comm").read_text().strip()
                        return f"{name} (pid {folder.name})"
    return None


def _listening(table: Path, port: int) -> Iterator[str]:
    """Sockets of a table that listen on the port, as /proc names them in `fd`."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN and fields[1].endswith(f":{port:04X}"):
            yield f"socket:[{fields[9]}]"
