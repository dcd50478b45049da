"""Jobs that are killed, whose disk fails, and whose power is cut: nothing acknowledged is lost.

    python -m benchmarks.batch_faults [--kills 300] [--items 1000] [--cuts 200] [--seed 0]

`kill -9` of the worker, of the process that runs the job, or of both, at random moments, half of
them just after a start, again and again until the job is done: on the fake backend, whose answers
are known, and on the demo model. An item is acknowledged when its commit returned; the process
writes that down elsewhere. Then `benchmarks.batch_io_faults`: a failed or killed system call at
every place of the commit path, and power cuts. The last line is one JSON object.

    lost         acknowledged or accepted items without a result
    duplicated   items with two results
    wrong        results that differ from the acknowledged one, or from the known answer
    blamed       items failed by the rule for those that kill two workers, which we killed
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.job_parts import FakeModel, completion, new_check, write
from loadmaster.engine.backends.fake_spec import ANSWER
from loadmaster.errors import EngineError
from loadmaster.jobs.lines import read_lines
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import ItemResult, NewJob
from loadmaster.schema import to_json
from loadmaster.tasks.batch.items import order_of
from loadmaster.tasks.batch.jobs import Run
from loadmaster.tasks.batch.opening import open_for_job
from loadmaster.tasks.batch.policy import BatchSettings, Clock
from loadmaster.tasks.batch.progress import Unwatched
from loadmaster.tasks.progress import Silent

JOB = "job"
TOKENS = 12
ENDED_WITH_ERROR = 7 << 8  # as `os.waitpid` has it
HURRIED = Clock(sleep=lambda seconds: time.sleep(seconds / 100))
VICTIMS = ("worker", "parent", "both")
LATEST_S = 1.5  # after a start, by when most fake jobs of 1,000 items are done
LEAST_S = 0.5
EARLY_S = 0.05  # after a start, while the store is opened
DEMO_ITEMS = 200
DEMO_LATEST_S = 6.0


class Acknowledging(Unwatched):
    """Writes down what has been committed, so that a dead process can be held to it."""

    def __init__(self, store: JobStore, path: Path) -> None:
        self._store = store
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def committed(self, results: Sequence[ItemResult]) -> None:
        """One write for all of them: a kill leaves no half of a line."""
        lines = (f"{r.line['custom_id']} {_digest(r.line)}\n" for r in results)
        os.write(self._fd, "".join(lines).encode())


def _digest(line: Any) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True, kw_only=True)
class Findings:
    """Sums over jobs."""

    jobs: int = 0
    items: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    blamed: int = 0
    resumes: int = 0
    killed: Counter[str] = field(default_factory=Counter)


def main() -> None:
    options = _options()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="batch-faults-"))
    try:
        chance = random.Random(options.seed)
        latest_s = max(LEAST_S, LATEST_S * options.items / 1000)
        fake = kill_jobs(folder / "fake", options.kills, options.items, chance, run_fake, latest_s)
        demo = Findings()
        if options.demo_kills:
            demo = kill_jobs(
                folder / "demo", options.demo_kills, DEMO_ITEMS, chance, run_demo, DEMO_LATEST_S
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    summary = _summary(fake, demo)
    if not options.kills_only:
        summary |= _io_faults(options)
    summary |= {"elapsed_s": round(time.monotonic() - started, 1), "seed": options.seed}
    print(json.dumps(summary))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_faults")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--demo-kills", type=int, default=12)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills-only", action="store_true", help="no faults of the disk")
    return parser.parse_args()


def _summary(fake: Findings, demo: Findings) -> dict[str, Any]:
    both = (fake, demo)
    return {
        "benchmark": "batch_faults",
        "kills": sum(sum(found.killed.values()) for found in both),
        "killed": dict(fake.killed + demo.killed),
        "demo_kills": sum(demo.killed.values()),
        "jobs": sum(found.jobs for found in both),
        "items": sum(found.items for found in both),
        "acknowledged": sum(found.acknowledged for found in both),
        "resumes": sum(found.resumes for found in both),
        "lost": sum(found.lost for found in both),
        "duplicated": sum(found.duplicated for found in both),
        "wrong": sum(found.wrong for found in both),
        "blamed": sum(found.blamed for found in both),
    }


def _io_faults(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.batch_io_faults", f"--seed={options.seed}"]
    child = subprocess.run([*command, f"--cuts={options.cuts}"], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if key not in ("benchmark", "elapsed_s")}


# -- jobs that are killed


def kill_jobs(
    folder: Path,
    n_kills: int,
    n_items: int,
    chance: random.Random,
    run: Callable[[Path], None],
    latest_s: float,
) -> Findings:
    """Jobs, one after the other, each killed until it is done; so many kills in all."""
    found = Findings()
    while sum(found.killed.values()) < n_kills:
        place = folder / f"job-{found.jobs}"
        place.mkdir(parents=True)
        _new_job(place, n_items, "demo" if run is run_demo else "m")
        _kill_until_done(place, n_kills, chance, run, latest_s, found)
        _check(place, n_items, found, known=run is run_fake)
        found.jobs += 1
        shutil.rmtree(place)
    return found


def _new_job(place: Path, n_items: int, model: str) -> None:
    lines = [
        completion(f"c{i}", f"Item {i} of a job", max_tokens=TOKENS, temperature=1, seed=i)
        for i in range(n_items)
    ]
    path = write(place / "in.jsonl", lines)
    settings = BatchSettings(model=model, n_sequences=8)
    job = NewJob(
        job_id=JOB,
        model=model,
        settings=json.dumps(to_json(settings)),
        input_path=path,
        output_path=place / "out.jsonl",
    )
    Shelf(place / "jobs").create(job, read_lines(path, new_check()), order_of)


def _kill_until_done(
    place: Path,
    n_kills: int,
    chance: random.Random,
    run: Callable[[Path], None],
    latest_s: float,
    found: Findings,
) -> None:
    while True:
        pid = _fork(run, place)
        status = None
        while status is None:
            victim = chance.choice(VICTIMS)
            may_kill = sum(found.killed.values()) < n_kills
            wait_s = chance.uniform(0, chance.choice((EARLY_S, latest_s))) if may_kill else 600.0
            status = _wait(pid, wait_s)
            if status is None and not may_kill:
                os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"a job did not end in {wait_s:.0f} s")
            if status is None and _kill(victim, pid):
                found.killed[victim] += 1
        if status == 0:
            return
        if not os.WIFSIGNALED(status) and status != ENDED_WITH_ERROR:
            raise SystemExit(f"the job's process ended with status {status}")
        found.resumes += 1


def _fork(run: Callable[[Path], None], place: Path) -> int:
    """The process of a job: a fork, for starting Python would take longer than the job."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(place)
        status = 0
    except EngineError:
        status = ENDED_WITH_ERROR >> 8  # the worker was killed while it was opened first
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status, or None when it still runs after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def _kill(victim: str, pid: int) -> bool:
    """Kill it; False when there is none (the worker is being started)."""
    victims = {"worker": _workers(pid), "parent": [pid], "both": [*_workers(pid), pid]}[victim]
    for number in victims:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return bool(victims)


def _workers(pid: int) -> list[int]:
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            if "loadmaster.engine.worker" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def run_fake(place: Path) -> None:
    with Run(Shelf(place / "jobs"), JOB) as work, FakeModel(n_sequences=8) as model:
        executor = work.attach(model, Acknowledging(work.store, place / "acknowledged"), HURRIED)
        work.end(executor.run())


def run_demo(place: Path) -> None:
    with Run(Shelf(place / "jobs"), JOB) as work:
        model = open_for_job(work.settings, work.store, Silent()).model
        with model.opened:
            executor = work.attach(
                model, Acknowledging(work.store, place / "acknowledged"), HURRIED
            )
            work.end(executor.run())


# -- what is left of them


def _check(place: Path, n_items: int, found: Findings, *, known: bool) -> None:
    """Hold the store and the output file to what was acknowledged."""
    with JobStore(Shelf(place / "jobs").path(JOB)) as store:
        done = [json.loads(line) for line in store.lines(failed=False)]
        failed = [json.loads(line) for line in store.lines(failed=True)]
    in_file = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    stored = {line["custom_id"]: line for line in (*done, *failed)}
    promised = [line.split() for line in (place / "acknowledged").read_text().splitlines()]
    expected = {f"c{i}" for i in range(n_items)}
    found.items += n_items
    found.acknowledged += len(promised)
    found.lost += len(expected - stored.keys()) + (in_file != done)
    found.lost += sum(name not in stored for name, _ in promised)
    found.duplicated += len(done) + len(failed) - len(stored)
    found.duplicated += len(promised) - len({name for name, _ in promised})
    found.wrong += sum(_digest(stored.get(name)) != digest for name, digest in promised)
    if known:
        found.wrong += sum(_text(line) != _answer(line["custom_id"]) for line in done)
    found.blamed += len(failed)


def _text(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["text"])


def _answer(custom_id: str) -> str:
    """What the fake backend says with this item's seed."""
    seed = int(custom_id[1:])
    return "".join(ANSWER[(seed + i) % len(ANSWER)] for i in range(TOKENS))


if __name__ == "__main__":
    main()
