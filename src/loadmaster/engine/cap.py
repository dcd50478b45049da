"""A RAM cap that the kernel enforces: a cgroup for the worker, where this user may make one."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadmaster.units import Bytes

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "loadmaster-"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The names of a cgroup version."""

    limit: str
    swap_limit: str
    events: str


_V1 = _Files(
    limit="memory.limit_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    events="memory.oom_control",
)
_V2 = _Files(limit="memory.max", swap_limit="memory.swap.max", events="memory.events")


class MemoryCgroup:
    """A cgroup of one process. `remove` it when the process is gone."""

    def __init__(self, path: Path, files: _Files) -> None:
        self.path = path
        self._files = files

    @classmethod
    def create(cls, pid: int, limit_bytes: Bytes, *, root: Path = _ROOT) -> "MemoryCgroup | None":
        """Move a process into a new cgroup under a limit; None where that is not permitted."""
        for parent, files in _candidates(root):
            _remove_stale(parent)
            path = parent / f"{_PREFIX}{os.getpid()}-{pid}"
            try:
                path.mkdir()
            except OSError:
                continue
            group = cls(path, files)
            try:
                group.set_limit(limit_bytes)
                (path / "cgroup.procs").write_text(str(pid))
            except OSError:
                group.remove()
                continue
            return group
        return None

    def set_limit(self, limit_bytes: Bytes) -> None:
        """Cap memory; swap is closed where the kernel accounts for it."""
        (self.path / self._files.limit).write_text(str(limit_bytes))
        swap = self.path / self._files.swap_limit
        if swap.exists():
            with contextlib.suppress(OSError):
                swap.write_text("0" if self._files is _V2 else str(limit_bytes))

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        try:
            lines = (self.path / self._files.events).read_text().splitlines()
        except OSError:
            return 0
        counts = dict(line.split() for line in lines if len(line.split()) == 2)
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        """Remove the cgroup; while a process is in it, it stays."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _candidates(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Where a cgroup may be made: v1 below our own, v2 from our own upwards.

    In v2 a group with processes in it cannot have limited children, hence the search upwards.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield root / "memory" / path.lstrip("/"), _V1
        elif controllers == "":
            yield from _v2_candidates(root, path)


def _v2_candidates(root: Path, path: str) -> Iterator[tuple[Path, _Files]]:
    own = root / path.lstrip("/")
    for folder in (own, *own.parents):
        try:
            controllers = (folder / "cgroup.subtree_control").read_text().split()
        except OSError:
            return
        if "memory" in controllers:
            yield folder, _V2


def _remove_stale(parent: Path) -> None:
    """Groups that a killed parent left. One with a process in it cannot be removed."""
    for path in parent.glob(f"{_PREFIX}*-*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                path.rmdir()
