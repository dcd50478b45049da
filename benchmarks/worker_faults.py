"""A worker dies or stops at a random point: the parent says so in one line and leaves nothing.

    python -m benchmarks.worker_faults [--runs 200] [--seed 0]

Real engine, demo model. A run opens an engine, loads, commits the peak and generates on three
streams (or waits idle), until SIGKILL, SIGABRT, SIGSEGV or SIGSTOP hits the worker. Detection is
measured from the signal to the moment when every open call and request has its one error. The
runs go through parents of their own, whose deaths are counted. Beside them, steps of 60 s (fake
backend) must not be taken for faults. The last line is one JSON object.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from loadmaster.engine import builds
from loadmaster.engine.process import Engine
from loadmaster.engine.types import DoneEvent, GenerateRequest, LoadRequest, SamplingParams
from loadmaster.errors import LoadmasterError
from loadmaster.model.stamp import current_stamp
from loadmaster.plan.types import EngineSettings

SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGSTOP)
LATEST_S = 1.5  # after the start of the worker; loading and peak are over by then
STOP_THREADS = 4  # a stop takes 5 s to be sure of: several wait at a time
LONG_STEPS = 6
LONG_STEP_S = 60.0
STREAMS = 3
DEMO = Path(str(files("loadmaster") / "data" / "demo.gguf"))
SETTINGS = EngineSettings(
    n_gpu_layers=0, layers_per_device=(), overrides=(), n_ctx=1024, n_seq_max=2, n_batch=256,
    n_ubatch=256, n_outputs_max=2, type_k="f16", type_v="f16", flash_attn=True, offload_kqv=True,
    op_offload=True, op_offload_min_batch=32, swa_full=False, kv_unified=True, load_mode="mmap",
    use_extra_bufts=True, n_threads=1, n_threads_batch=1,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one run showed."""

    signal: str
    doing: str
    detection_s: float
    message: str
    clear: bool
    orphan: bool


def main() -> None:
    options = _options()
    if options.part is not None:
        _run_part(options)
        return
    started = time.monotonic()
    plain = options.runs * 3 // 4
    parts = [("kill", plain), ("stop", options.runs - plain), ("long", LONG_STEPS)]
    if options.quick:
        parts.pop()
    children = {name: _start_part(name, runs, options.seed) for name, runs in parts}
    reports = {name: _result(child) for name, child in children.items()}
    summary = _summary(reports)
    summary |= {"elapsed_s": round(time.monotonic() - started, 1), "seed": options.seed}
    print(json.dumps(summary))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_faults")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="without the steps of 60 s")
    parser.add_argument("--part", choices=["kill", "stop", "long"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _start_part(name: str, runs: int, seed: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.worker_faults", f"--part={name}"]
    return subprocess.Popen(
        [*command, f"--runs={runs}", f"--seed={seed}"], stdout=subprocess.PIPE, text=True
    )


def _result(child: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """A parent's report; None when it died."""
    out, _ = child.communicate()
    if child.returncode != 0 or not out:
        return None
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


def _summary(reports: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    alive = [report for report in reports.values() if report is not None]
    outcomes = [Outcome(**row) for report in alive for row in report.get("outcomes", ())]
    for outcome in outcomes:
        if not outcome.clear:
            print(f"unclear: {outcome}")
    stops = [o.detection_s for o in outcomes if o.signal == "SIGSTOP"]
    others = [o.detection_s for o in outcomes if o.signal != "SIGSTOP"]
    return {
        "benchmark": "worker_faults",
        "runs": len(outcomes),
        "clear_errors": sum(o.clear for o in outcomes),
        "orphans": sum(o.orphan for o in outcomes) + sum(r["left_running"] for r in alive),
        "parent_deaths": len(reports) - len(alive),
        "false_kills": sum(report.get("false_kills", 0) for report in alive),
        "long_steps": sum(report.get("long_steps", 0) for report in alive),
        "slowest_detection_s": round(max(others, default=0.0), 3),
        "slowest_stop_detection_s": round(max(stops, default=0.0), 3),
        "hit_while": _counts(o.doing for o in outcomes),
    }


def _counts(words: Iterator[str]) -> dict[str, int]:
    return {word: len(list(group)) for word, group in itertools.groupby(sorted(words))}


# -- one parent


def _run_part(options: argparse.Namespace) -> None:
    if options.part == "long":
        report: dict[str, Any] = _long_steps(options.runs)
    else:
        threads = STOP_THREADS if options.part == "stop" else 1
        chance = random.Random(f"{options.seed}-{options.part}")
        kinds = [SIGNALS[3]] if options.part == "stop" else SIGNALS[:3]
        plans = [
            (kinds[i % len(kinds)], chance.uniform(0, LATEST_S), chance.random() < 0.15)
            for i in range(options.runs)
        ]
        with ThreadPoolExecutor(threads) as pool:
            outcomes = list(pool.map(lambda plan: _one_run(*plan), plans))
        report = {"outcomes": [vars_of(outcome) for outcome in outcomes]}
    report["left_running"] = len(_children())
    print(json.dumps(report))


def vars_of(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in Outcome.__slots__}


def _children() -> list[str]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return path.read_text().split() if path.exists() else []


def _one_run(number: signal.Signals, delay_s: float, idle: bool) -> Outcome:
    with Engine.start(builds.find_build()) as engine:
        seen = _Use(engine, idle)
        seen.thread.start()
        time.sleep(delay_s)
        os.kill(engine.pid, number)
        struck = time.monotonic()
        if idle:
            seen.look()
        seen.thread.join()
        message = seen.errors[0] if seen.errors else ""
        doing = message.rpartition(" while ")[2].partition(":")[0]
        return Outcome(
            signal=number.name,
            doing=doing,
            detection_s=seen.ended_s - struck,
            message=message,
            clear=_is_clear(message, number) and seen.each_once and len(set(seen.errors)) == 1,
            orphan=Path(f"/proc/{engine.pid}").exists(),
        )


def _is_clear(message: str, number: signal.Signals) -> bool:
    """One line that says what happened and while doing what."""
    said = "is stopped" if number == signal.SIGSTOP else number.name
    return said in message and " while " in message and "\n" not in message and len(message) < 300


class _Use:
    """A user of an engine, until it fails: load, peak, and three streams again and again."""

    def __init__(self, engine: Engine, idle: bool) -> None:
        self._engine = engine
        self._idle = idle
        self._ids = itertools.count()
        self.errors: list[str] = []
        self.each_once = True
        self.ended_s = 0.0
        self.thread = threading.Thread(target=self._run)

    def look(self) -> None:
        """Ask an idle engine something: its death comes as the answer."""
        self.thread.join()
        while not self.errors:
            self._try(lambda: self._engine.memory())

    def _run(self) -> None:
        self._try(self._open)
        while not self.errors and not self._idle:
            self._try(self._generate)

    def _try(self, action: Any) -> None:
        try:
            action()
        except LoadmasterError as error:
            self.errors.append(error.message)
        if self.errors:
            self.ended_s = time.monotonic()

    def _open(self) -> None:
        request = LoadRequest(
            model_path=DEMO, model_stamp=current_stamp([DEMO]), settings=SETTINGS,
            ram_cap_bytes=None,
        )  # fmt: skip
        self._engine.load(request)
        self._engine.commit_peak(time_limit_s=0.2)

    def _generate(self) -> None:
        prompt = tuple(self._engine.tokenize("The quick brown fox jumps over the lazy dog. " * 9))
        streams = [
            self._engine.generate(
                GenerateRequest(
                    request_id=f"r{next(self._ids)}",
                    prompt=prompt[i:],
                    max_tokens=40,
                    sampling=SamplingParams(temperature=0),
                    ignore_eos=True,
                )
            )
            for i in range(STREAMS)
        ]
        for stream in streams:
            ends = [event for event in stream if isinstance(event, DoneEvent)]
            self.each_once &= len(ends) == 1
            self.errors += [end.error for end in ends if end.error is not None]


def _long_steps(count: int) -> dict[str, Any]:
    with ThreadPoolExecutor(count) as pool:
        fine = list(pool.map(_one_long_step, range(count)))
    return {"long_steps": count, "false_kills": fine.count(False)}


def _one_long_step(number: int) -> bool:
    """A step of 60 s, early or late in a generation; whether it is left alone."""
    options = {"step_s": {"at_step": 1 + number, "seconds": LONG_STEP_S}}
    with Engine.start(builds.find_build(), backend="fake", options=options) as engine:
        request = LoadRequest(
            model_path=DEMO, model_stamp="", settings=SETTINGS, ram_cap_bytes=None
        )
        engine.load(request)
        wanted = GenerateRequest(
            request_id="long", prompt=(1, 2, 3), max_tokens=20, sampling=SamplingParams(),
        )  # fmt: skip
        *_, end = engine.generate(wanted)
        return isinstance(end, DoneEvent) and end.finish_reason == "length"


if __name__ == "__main__":
    main()
