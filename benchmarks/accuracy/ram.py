"""Part 3 of the plan benchmark: the process total stays inside a RAM budget that the kernel holds.

Each case plans a model, takes the plan's own total for the host as the budget, and opens it in a
cgroup with that limit: the command, its chat template's child and the worker, from the first byte.
Most cases are `loadmaster run FILE PROMPT --ram BUDGET` on the CPU. Some have a stand-in GPU: those
run `ram_stand_in` in place of the command. A stand-in's memory is host memory in truth, so its
planned bytes count with the host's, in budget, limit and measurement alike.

    ram_failures           runs that did not end well; an OOM kill of the worker is one of them
    oom_kills              kills that the kernel counted in the cgroup
    ram_over_budget        runs whose private, shared and swapped memory, of all processes together,
                           was above the budget in any of the samples taken every 4 ms
    ram_over_plan          the same against the total of the plan that ran
    ram_over_prediction_*  that total over the highest sample, less 1

The kernel counts its own tables for the processes against the limit: `KERNEL_BYTES` is what budget
and limit have above the plan's total for that.
"""

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.accuracy.random_models import MIXED
from loadmaster.engine.cap import MemoryCgroup
from loadmaster.engine.meter import process_memory
from loadmaster.plan.types import CPU
from loadmaster.units import MIB, Bytes, align

SEED = 20261003
N_COMMAND = 40
N_STAND_IN = 10
KERNEL_BYTES = 4 * MIB
_SAMPLE_S = 0.004
_PAGE = 4096
_TIMEOUT_S = 120
_LOADMASTER = str(Path(sys.executable).with_name("loadmaster"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    path: Path
    n_ctx: int
    kv_type: str
    n_ubatch: int
    n_threads: int
    device_share: float  # of what all on the device takes; 0: no stand-in

    @property
    def flags(self) -> list[str]:
        return ["--ctx", str(self.n_ctx), "--kv", self.kv_type, "-ub", str(self.n_ubatch),
                "-t", str(self.n_threads)]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    case: Case
    planned_bytes: int  # of the plan that ran, stand-in included
    budget_bytes: int
    peak_bytes: int
    oom_kills: int
    failure: str


def run(*, n_processes: int = 2) -> dict[str, object]:
    """Every case; the figures of this part. Without a cgroup to make there are none."""
    with tempfile.TemporaryDirectory() as folder:
        cases = list(_cases(Path(folder)))
        if not _may_limit():
            return {"ram_plans": 0, "ram_skipped": "no memory cgroup can be made here"}
        with ThreadPoolExecutor(n_processes) as pool:
            results = list(pool.map(run_case, cases))
    return _figures(results)


def _may_limit() -> bool:
    with subprocess.Popen(["sleep", "60"]) as process:
        group = MemoryCgroup.create(process.pid, Bytes(64 * MIB))
        process.kill()
        process.wait()
    if group is not None:
        group.remove()
    return group is not None


def _cases(folder: Path) -> Iterator[Case]:
    dice = random.Random(SEED)
    paths = [model.write(folder) for model in MIXED]
    for number in range(N_COMMAND + N_STAND_IN):
        yield Case(
            path=paths[number % len(paths)],
            n_ctx=dice.choice((512, 1024, 2048, 4096)),
            kv_type=dice.choice(("f16", "q8_0", "f32")),
            n_ubatch=dice.choice((32, 128, 256, 512)),
            n_threads=dice.choice((1, 2)),
            device_share=0.0 if number < N_COMMAND else dice.uniform(0.3, 1.0),
        )


def run_case(case: Case) -> Result:
    """Plan, then run under the limit."""
    planned = _plan(case)
    host, total = _planned_bytes(planned)
    command = _stand_in(case, host + KERNEL_BYTES) if case.device_share else _command(case, host)
    process = _paused(command)
    group = MemoryCgroup.create(process.pid, Bytes(align(total + KERNEL_BYTES, _PAGE)))
    assert group is not None
    with _Peak(process.pid) as peak:
        out, errors = process.communicate("go\n", timeout=_TIMEOUT_S)
    kills = group.oom_kills()
    group.remove()
    done = json.loads(out.splitlines()[-1]) if process.returncode == 0 else None
    return Result(
        case=case,
        planned_bytes=_planned_bytes(done["plan"])[1] if done else total,
        budget_bytes=total + KERNEL_BYTES,
        peak_bytes=peak.highest,
        oom_kills=kills,
        failure="" if done else f"{process.returncode}: {errors.strip()[-300:]}",
    )


def _planned_bytes(plan: dict[str, Any]) -> tuple[int, int]:
    """A plan's bytes on the host, and with those on a stand-in."""
    sizes = {device["id"]: int(device["planned_bytes"]) for device in plan["devices"]}
    return sizes[CPU], sum(sizes.values())


def _plan(case: Case) -> dict[str, Any]:
    command = [_LOADMASTER, "plan", str(case.path), *case.flags, "--json"]
    if case.device_share:
        command = _stand_in(case, None)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _command(case: Case, host: int) -> list[str]:
    words = ["run", str(case.path), "hello there", *case.flags]
    words += ["-n", "12", "--ram", f"{host + KERNEL_BYTES}B", "--json", "--temp", "0"]
    return [_LOADMASTER, *words]


def _stand_in(case: Case, budget: int | None) -> list[str]:
    words = [str(case.path), str(case.n_ctx), case.kv_type, str(case.n_ubatch)]
    words += [str(case.n_threads), str(case.device_share), str(budget or 0)]
    return [sys.executable, "-m", "benchmarks.accuracy.ram_stand_in", *words]


def _paused(command: Sequence[str]) -> "subprocess.Popen[str]":
    """A shell that becomes the command when a line comes: it is moved into its cgroup before."""
    script = 'read line; exec "$@" </dev/null'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class _Peak:
    """Samples a process and its descendants; `highest` is their largest sum."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.highest = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(psutil.Error):
                tree = [self._root, *self._root.children(recursive=True)]
                self.highest = max(
                    self.highest, sum(process_memory(one.pid).own_bytes for one in tree)
                )
            time.sleep(_SAMPLE_S)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _figures(results: Sequence[Result]) -> dict[str, object]:
    for result in results:
        if result.failure or result.peak_bytes > result.budget_bytes:
            print(f"ram: {result}")
    over = [100 * (r.planned_bytes / r.peak_bytes - 1) for r in results if not r.failure]
    return {
        "ram_plans": len(results),
        "ram_failures": sum(bool(r.failure) for r in results),
        "oom_kills": sum(r.oom_kills for r in results),
        "ram_over_budget": sum(r.peak_bytes > r.budget_bytes for r in results),
        "ram_over_plan": sum(r.peak_bytes > r.planned_bytes for r in results),
        "ram_over_prediction_p50_pct": round(statistics.median(over), 2) if over else None,
        "ram_over_prediction_max_pct": round(max(over), 2) if over else None,
        "ram_peak_min_mib": round(min(r.peak_bytes for r in results) / MIB),
        "ram_peak_max_mib": round(max(r.peak_bytes for r in results) / MIB),
    }
