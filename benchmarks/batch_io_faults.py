"""The store of a job under a failing disk: every system call of the commit path, and power cuts.

    python -m benchmarks.batch_io_faults [--cuts 200] [--seed 0] [--every 1] [--control]

The path: make a job of a file, open it, commit four times, close, write the output file. Its n-th
system call below the job's folder fails with EIO or ENOSPC, once or from then on, or the process is
killed before it; for every n. Then the disk is well again: what was acknowledged must be there,
what was said to be done must be done, and the job must go on to its end. A power cut leaves what
was synced and any part of the rest. With `--control` nothing is synced: then power cuts must be
seen to lose results. The last line is one JSON object.

    lost_acknowledged   acknowledged results that are not there, or are others
    false_success       an output file that was said to be written and is not the whole of it
    not_resumed         jobs that did not come to their end when the disk was well again
"""

import argparse
import errno
import json
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import io_faults
from benchmarks.job_parts import completion, new_check, write
from loadmaster.errors import LoadmasterError
from loadmaster.jobs import database
from loadmaster.jobs.intake import create_job
from loadmaster.jobs.lines import read_lines
from loadmaster.jobs.lock import JobLock
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import ItemResult, NewJob
from loadmaster.tasks.batch.items import order_of
from loadmaster.tasks.batch.outputs import write_results

JOB = "job"
N_ITEMS = 12
PER_COMMIT = 3
ANSWER_BYTES = 6000  # some database pages for each result
MODES = {
    "kill": (0, False),
    "EIO once": (errno.EIO, False),
    "EIO from then on": (errno.EIO, True),
    "ENOSPC once": (errno.ENOSPC, False),
    "ENOSPC from then on": (errno.ENOSPC, True),
}
MEMORY = "/dev/shm"
SAID_DONE = 100
KILLED = 9


@dataclass(slots=True, kw_only=True)
class Findings:
    """Sums over faults."""

    faults: Counter[str] = field(default_factory=Counter)
    places: int = 0
    lost_acknowledged: int = 0
    false_success: int = 0
    not_resumed: int = 0
    unclear: int = 0  # ended with anything but one of our errors


def main() -> None:
    io_faults.preload_self()
    options = _options()
    if options.control:
        _sync_nothing()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="batch-io-", dir=_memory_folder()))
    try:
        faults = call_faults(root, options.every)
        cuts = power_cuts(root, options.cuts, random.Random(options.seed))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(io_faults.library_folder(), ignore_errors=True)
    summary = {
        "benchmark": "batch_io_faults",
        "io_places": faults.places,
        "io_faults": sum(faults.faults.values()),
        "io_fault_kinds": dict(faults.faults),
        "power_cuts": sum(cuts.faults.values()),
        "lost_acknowledged": faults.lost_acknowledged + cuts.lost_acknowledged,
        "false_success": faults.false_success + cuts.false_success,
        "not_resumed": faults.not_resumed + cuts.not_resumed,
        "unclear_ends": faults.unclear,
        "elapsed_s": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_io_faults")
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="every so-manieth system call")
    parser.add_argument("--control", action="store_true", help="without any sync")
    return parser.parse_args()


def _memory_folder() -> str | None:
    """Faults and cuts are ours, so the folder may as well be one whose syncs cost nothing."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None


def _sync_nothing() -> None:
    """The negative control: a store that does not wait for the disk."""
    prepare = database._prepare

    def careless(connection: sqlite3.Connection, folder: Path, *, read_only: bool) -> None:
        prepare(connection, folder, read_only=read_only)
        connection.execute("PRAGMA synchronous=OFF")

    database._prepare = careless
    os.fsync = lambda fd: None


# -- the path


def _work(place: Path, acknowledge: Callable[[int], object]) -> None:
    """Everything that touches the disk between a file of requests and a file of answers."""
    folder = place / "jobs" / JOB
    if not folder.exists():
        path = place.parent / "in.jsonl"
        job = NewJob(job_id=JOB, model="m", settings="{}")
        create_job(place / "jobs", job, read_lines(path, new_check()), order_of)
    with JobLock(folder), JobStore(folder) as store:
        store.begin_run()
        numbers = [item.number for item in store.pending()]
        for at in range(0, len(numbers), PER_COMMIT):
            chunk = numbers[at : at + PER_COMMIT]
            store.commit([_result(number) for number in chunk])
            for number in chunk:
                acknowledge(number)
        store.end_run("finished", None, 1.0)
        write_results(store, place / "out.jsonl", None, job_id=JOB)
        acknowledge(SAID_DONE)


def _result(number: int) -> ItemResult:
    return ItemResult(number=number, failed=False, line=_line(number))


def _line(number: int) -> dict[str, object]:
    return {"custom_id": f"c{number}", "text": f"{number:04}" * (ANSWER_BYTES // 4)}


def _new_place(root: Path, name: str) -> Path:
    path = root / "in.jsonl"
    if not path.exists():
        write(path, [completion(f"c{i}") for i in range(1, N_ITEMS + 1)])
    place = root / name
    (place / "jobs").mkdir(parents=True)
    return place


def _check(place: Path, acknowledged: set[int], found: Findings) -> None:
    """The disk is well again: hold the store to its word, and go on to the end."""
    items = acknowledged - {SAID_DONE}
    if SAID_DONE in acknowledged and not _is_whole(place):
        found.false_success += 1
    if not items <= _stored(place):
        found.lost_acknowledged += 1
    try:
        _work(place, lambda _: None)
    except LoadmasterError as error:
        print(f"not resumed: {error.message}")
        found.not_resumed += 1
        return
    if not _is_whole(place) or _stored(place) != set(range(1, N_ITEMS + 1)):
        found.not_resumed += 1


def _stored(place: Path) -> set[int]:
    """The items whose stored result is the one that was computed."""
    folder = place / "jobs" / JOB
    if not folder.exists():
        return set()
    try:
        with JobStore(folder) as store:
            lines = [json.loads(line) for line in store.lines(failed=False)]
    except LoadmasterError:
        return set()
    numbers = [int(line["custom_id"][1:]) for line in lines]
    return {n for n, line in zip(numbers, lines, strict=True) if line == _line(n)}


def _is_whole(place: Path) -> bool:
    path = place / "out.jsonl"
    if not path.exists():
        return False
    lines = [json.dumps(_line(n), separators=(",", ":")) for n in range(1, N_ITEMS + 1)]
    return path.read_bytes() == "".join(f"{line}\n" for line in lines).encode()


# -- a call that fails


def call_faults(root: Path, every: int) -> Findings:
    """Every mode at every system call of the path."""
    found = Findings()
    found.places = _count_calls(root)
    for mode, (error, forever) in MODES.items():
        for at in range(1, found.places + 1, every):
            place = _new_place(root, "faulty")
            arm = partial(io_faults.arm, place, at=at, error=error, forever=forever)
            status, acknowledged = _in_a_fork(place, arm)
            expected = status == KILLED if mode == "kill" else status in (0, 256)
            found.unclear += not expected
            found.faults[mode] += 1
            _check(place, acknowledged, found)
            shutil.rmtree(place)
    return found


def _count_calls(root: Path) -> int:
    place = _new_place(root, "counted")
    io_faults.arm(place)
    _work(place, lambda _: None)
    n_calls = io_faults.calls()
    io_faults.disarm()
    shutil.rmtree(place)
    return n_calls


def _in_a_fork(place: Path, arm: Callable[[], object]) -> tuple[int, set[int]]:
    """Run the path in a process of its own; how it ended, and what it acknowledged before."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        status = 2
        try:
            arm()
            _work(place, lambda number: os.write(write_fd, bytes([number])))
            status = 0
        except LoadmasterError:
            status = 1
        except BaseException as error:
            print(f"unclear: {error!r}", flush=True)
        finally:
            os._exit(status)
    os.close(write_fd)
    said = b"".join(iter(lambda: os.read(read_fd, 4096), b""))
    os.close(read_fd)
    return os.waitpid(pid, 0)[1], set(said)


# -- the power goes


def power_cuts(root: Path, n_cuts: int, chance: random.Random) -> Findings:
    """Disks as they may be after a cut at any call of the path, and what becomes of the job."""
    found = Findings()
    records = _trace(root)
    place = root / "traced"
    for _ in range(n_cuts):
        until = chance.randint(0, len(records))
        disk, acknowledged = io_faults.Disk(root / "nothing"), set()
        for record in records[:until]:
            if record.kind == "m":
                acknowledged.add(record.inode)
            else:
                disk.play(record)
        after = _new_place(root, "cut")
        disk.cut(chance, place, after)
        found.faults["power cut"] += 1
        _check(after, acknowledged, found)
        shutil.rmtree(after)
    return found


def _trace(root: Path) -> list[io_faults.Record]:
    path, place = root / "trace", _new_place(root, "traced")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    io_faults.arm(place, trace=fd)
    _work(place, io_faults.mark)
    io_faults.disarm()
    os.close(fd)
    shutil.rmtree(place)
    return io_faults.read_trace(path.read_bytes())


if __name__ == "__main__":
    main()
