"""Downloads under fire: every behaviour of the hostile server, killed with SIGKILL at 50 points.

    python -m benchmarks.hostile_download [--points 50] [--behaviour NAME …]

A child process pulls a file at about 1 Gbit/s. It is killed when the server has sent a given part
of it, or a few milliseconds after the last byte, while it hashes and renames; where a server never
sends so much, after a given time. After the kill no file may have its name without being right. A
second run goes on: it ends with the file, or with an error where the server makes that impossible;
in time either way. The last line is one JSON object.

`refetched_pct` is the mean, over the behaviours that resume, of what the second run fetched again
of the bytes that the first had written, in percent of the file; `refetched_max_pct` is the largest.
Chunks are small because the file is: 16 KiB of 24 MiB are what 1 MiB are of 1.5 GiB.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.hostile_server import (
    BEHAVIOURS,
    HostileServer,
    hub_path,
    hub_routes,
    sha256_of,
)

REPO, NAME = "bench/Model-GGUF", "model-Q4_K_M.gguf"
FILE_BYTES = 24 << 20
TAIL_SHARE = 0.2  # of the points: after the last byte
TAIL_STEP_S = 0.004
PIECE_S = 0.001  # the server waits so long after each 32 KiB of a connection
REFUSED_WITHIN_S = 0.2  # most runs that end with an error take less; the points spread over it
HANG_S = 30.0
_ASIDE = (".part", ".json", ".lock", ".bad", ".tmp")


@dataclass(slots=True)
class Score:
    """What one behaviour came to."""

    killed: int = 0
    unverified: int = 0  # files under their name that are not the file
    hangs: int = 0
    wrong_ends: int = 0  # a failure where the file could be had, a success where it could not
    refetched: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every behaviour at every point; 1 when something that must not be was seen."""
    arguments = _parser().parse_args(argv)
    content = b"GGUF" + os.urandom(FILE_BYTES - 4)
    replacement = b"GGUF" + os.urandom(FILE_BYTES - 4)
    names = arguments.behaviour or list(BEHAVIOURS)
    start = time.monotonic()
    scores = {}
    with _workplace() as home, Nursery() as nursery:
        for name in names:
            range_ = Range(name, content, replacement, home, nursery)
            scores[name] = range_.run(arguments.points)
            print(f"{name:16} {_line(scores[name])}", flush=True)
    figures = _figures(scores)
    figures["seconds"] = round(time.monotonic() - start, 1)
    failed = [name for name, limit in LIMITS.items() if float(figures[name]) > limit]
    print(json.dumps({"benchmark": "hostile_download", "points": arguments.points, **figures,
                      "failed": failed}))  # fmt: skip
    return 1 if failed else 0


LIMITS = {"unverified_files": 0, "hangs": 0, "wrong_ends": 0, "refetched_pct": 2.0}


def _figures(scores: Mapping[str, Score]) -> dict[str, Any]:
    again = [share for score in scores.values() for share in score.refetched]
    return {
        "behaviours": len(scores),
        "killed": sum(score.killed for score in scores.values()),
        "unverified_files": sum(score.unverified for score in scores.values()),
        "hangs": sum(score.hangs for score in scores.values()),
        "wrong_ends": sum(score.wrong_ends for score in scores.values()),
        "refetched_pct": round(fmean(again), 3) if again else 0.0,
        "refetched_max_pct": round(max(again), 3) if again else 0.0,
    }


def _line(score: Score) -> str:
    again = f"{fmean(score.refetched):.2f} % again" if score.refetched else ""
    return (
        f"killed {score.killed:3}  unverified {score.unverified}  hangs {score.hangs}  "
        f"wrong ends {score.wrong_ends}  {again}"
    )


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs are not what is measured."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hostile-", dir=parent) as folder:
        yield Path(folder)


class Range:
    """One behaviour: kill, look, go on, look."""

    def __init__(
        self, behaviour: str, content: bytes, replacement: bytes, home: Path, nursery: "Nursery"
    ) -> None:
        self._behaviour = behaviour
        self._content = content
        self._replacement = replacement
        self._home = home
        self._nursery = nursery
        self._right = replacement if behaviour == "etag_changes" else content
        self._score = Score()

    def run(self, n_points: int) -> Score:
        """All points, each with a server and a folder of its own."""
        n_tail = round(n_points * TAIL_SHARE)
        for point in range(n_points):
            late = point - (n_points - n_tail)
            share = (point + 1) / (n_points - n_tail) if late < 0 else 1.0
            killer = Killer(
                round(share * FILE_BYTES),
                max(0, late + 1) * TAIL_STEP_S,
                None if self._flows else (point + 1) / n_points * REFUSED_WITHIN_S,
            )
            self._one(killer)
            shutil.rmtree(self._home / "run", ignore_errors=True)
        return self._score

    @property
    def _flows(self) -> bool:
        """Whether the server sends the file, right or not."""
        return BEHAVIOURS[self._behaviour].ends_well or self._behaviour == "flipped_byte"

    def _one(self, killer: "Killer") -> None:
        path = hub_path(REPO, NAME)
        with (
            HostileServer({path: self._content}, on_body=killer.on_body) as other,
            HostileServer(
                {path: self._content}, behaviour=self._behaviour, other=other,
                replacement=self._replacement, on_body=killer.on_body,
                routes=hub_routes(REPO, {NAME: self._right}),
            ) as server,
        ):  # fmt: skip
            by_url = self._behaviour == "etag_changes"  # a commit of the Hub does not change
            job = {
                "model": f"{server.url}{path}" if by_url else f"hf:{REPO}",
                "sha256": sha256_of(self._right),
                "home": str(self._home / "run"),
                "endpoint": server.url,
            }
            first = self._nursery.run(job, killer)
            self._score.killed += first.status == -signal.SIGKILL and not first.hung
            self._look()
            written = self._written()
            last = self._nursery.run(job, None)
            self._look()
            self._judge(first, last, written)

    def _judge(self, first: "End", last: "End", written: int) -> None:
        self._score.hangs += first.hung + last.hung
        known = BEHAVIOURS[self._behaviour]
        well = last.status == 0
        self._score.wrong_ends += well != known.ends_well
        if well and known.resumes and first.status == -signal.SIGKILL and not last.was_complete:
            again = max(0, written - last.resumed_bytes)
            self._score.refetched.append(100 * again / FILE_BYTES)

    def _named(self) -> list[Path]:
        root = self._home / "run"
        return [
            path for path in root.rglob("*")
            if path.is_file() and not path.name.endswith(_ASIDE) and "refs" not in path.parts
        ]  # fmt: skip

    def _look(self) -> None:
        self._score.unverified += sum(path.read_bytes() != self._right for path in self._named())

    def _written(self) -> int:
        """What the first run had on the disk."""
        parts = list((self._home / "run").rglob("*.part"))
        return sum(min(path.stat().st_blocks * 512, FILE_BYTES) for path in parts)


class Killer:
    """Kills a process when so many bytes have been sent, a little later, or by the clock."""

    def __init__(self, at_bytes: int, delay_s: float, at_s: float | None) -> None:
        self._at_bytes = at_bytes
        self._delay_s = delay_s
        self._at_s = at_s
        self._lock = threading.Lock()
        self.pid: int | None = None

    def begin(self, pid: int) -> None:
        """The child is about to start."""
        self.pid = pid
        if self._at_s is not None:
            threading.Timer(self._at_s, self._kill_now).start()

    def _kill_now(self) -> None:
        with self._lock:
            pid, self.pid = self.pid, None
        if pid is not None:
            _kill(pid)

    def end(self) -> None:
        """The child has ended: its pid may become another's."""
        with self._lock:
            self.pid = None

    def on_body(self, total: int) -> None:
        """The server has sent `total` bytes since it began."""
        time.sleep(PIECE_S)
        with self._lock:
            pid = self.pid
            if pid is None or total < self._at_bytes:
                return
            self.pid = None
        if self._delay_s:
            threading.Timer(self._delay_s, _kill, [pid]).start()
        else:
            _kill(pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a child ended; the bytes are of a child that succeeded."""

    status: int
    hung: bool
    resumed_bytes: int = 0
    was_complete: bool = False


class Nursery:
    """A process that has imported everything and forks a child for each job."""

    def __enter__(self) -> "Nursery":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.hostile_child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def run(self, job: Mapping[str, str], killer: Killer | None) -> End:
        """Start a child, let the killer know it, wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        pid = int(self._process.stdout.readline())
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            _kill(pid)

        if killer is not None:
            killer.begin(pid)
        watchdog = threading.Timer(HANG_S, give_up)
        watchdog.start()
        self._process.stdin.write("go\n")
        ended = json.loads(self._process.stdout.readline())
        watchdog.cancel()
        if killer is not None:
            killer.end()
        return End(hung=hung.is_set(), **ended)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile_download")
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--behaviour", action="append", choices=list(BEHAVIOURS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
