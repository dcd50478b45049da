"""Damaged model files: refused in words, quickly, in little memory; the rest survives the engine.

    python -m benchmarks.damaged_files --count 20000 [--seed 0]

Hand-made cases (`damaged_corpus`) and seeded mutations of small valid models (`mutations`) go
through `read_model` in a fresh process per thousand, so that a crash and the peak of memory are
that thousand's own. What is accepted is loaded by the engine and decodes eight tokens, one forked
process per file (`decode_probe`). Valid files of every architecture and eight types must pass.
The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import mutations
from benchmarks.damaged_corpus import CASES
from benchmarks.gguf_writer import write_sparse
from loadmaster.errors import LoadmasterError
from loadmaster.model.source import read_model

CHUNK = 1000
SLOW_S = 0.3  # a refusal above it is timed twice more: other work on the machine is not its cost
VALID_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_K_M", "iq4_xs", "mxfp4")


def main() -> None:
    options = _options()
    if options.chunk is not None:
        _judge_chunk(options.chunk, options.count, options.seed, Path(options.work))
        return
    started = time.monotonic()
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    work = Path(tempfile.mkdtemp(prefix="damaged-", dir=shared))
    try:
        report = _run(options.count, options.seed, work, engine=not options.no_engine)
    finally:
        shutil.rmtree(work)
    report["elapsed_s"] = round(time.monotonic() - started, 1)
    print(json.dumps(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damaged_files")
    parser.add_argument("--count", type=int, default=20_000, help="mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-engine", action="store_true", help="judge only, load nothing")
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(count: int, seed: int, work: Path, *, engine: bool) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    aborts: list[dict[str, Any]] = []
    peak_mib = slowest_s = slowest_cpu_s = 0.0
    wrong: list[str] = []
    probing: tuple[subprocess.Popen[str], dict[str, str]] | None = None
    for start in (-1, *range(0, count, CHUNK)):  # -1: the hand-made cases
        chunk = _spawn_chunk(start, min(CHUNK, count - start), seed, work)
        totals.update(chunk["totals"])
        codes.update(chunk["codes"])
        wrong += chunk["wrong"]
        peak_mib = max(peak_mib, chunk["peak_mib"])
        slowest_s = max(slowest_s, chunk["slowest_s"])
        slowest_cpu_s = max(slowest_cpu_s, chunk["slowest_cpu_s"])
        if probing is not None:
            _collect(probing, totals, aborts)
        probing = _start_probe(chunk["accepted"]) if engine and chunk["accepted"] else None
        _progress(start, count, totals)
    if probing is not None:
        _collect(probing, totals, aborts)
    return {
        "benchmark": "damaged_files",
        "seed": seed,
        "hand_made": len(CASES),
        "mutations": count,
        "parent_crashes": totals["crashes"],
        "engine_aborts": len(aborts) if engine else None,
        "slowest_refusal_s": round(slowest_s, 3),
        "slowest_refusal_cpu_s": round(slowest_cpu_s, 3),
        "peak_refusal_mib": round(peak_mib, 1),
        "valid_refused": len(refused := _valid_refused(work)),
        "valid_refused_names": refused,
        "hand_made_wrong": wrong,
        "refused": totals["refused"],
        "accepted": totals["accepted"],
        "decoded": totals["decoded"],
        "refused_by_engine": totals["refused_by_engine"],
        "codes": dict(codes.most_common()),
        "aborts": aborts[:20],
        "command": f"python -m benchmarks.damaged_files --count {count} --seed {seed}",
    }


def _progress(start: int, count: int, totals: Counter[str]) -> None:
    done = max(0, min(count, start + CHUNK)) if start >= 0 else 0
    print(
        f"{done}/{count} mutations: {totals['refused']} refused, {totals['accepted']} accepted, "
        f"{totals['aborted']} aborted the engine, {totals['crashes']} crashed the reader",
        file=sys.stderr,
    )


def _spawn_chunk(start: int, count: int, seed: int, work: Path) -> dict[str, Any]:
    folder = work / f"chunk{start}"
    folder.mkdir()
    if start < 0:
        _write_cases(folder)
    command = [sys.executable, "-m", "benchmarks.damaged_files", "--chunk", str(start)]
    command += ["--count", str(count), "--seed", str(seed), "--work", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report
    print(f"the reader's process ended with {done.returncode}", file=sys.stderr)
    return {
        "totals": {"crashes": 1},
        "codes": {},
        "accepted": {},
        "wrong": [],
        "peak_mib": 0.0,
        "slowest_s": 0.0,
        "slowest_cpu_s": 0.0,
    }


def _write_cases(folder: Path) -> None:
    """Written by this process, so that the judging one has only the reading in its memory."""
    paths = []
    for index, case in enumerate(CASES):
        place = folder / str(index)
        place.mkdir()
        paths.append(os.fspath(case.make(place)))
    (folder / "paths.json").write_text(json.dumps(paths))


class _Judge:
    """Runs `read_model` on one file after the other and counts what comes of it."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.slowest_cpu_s = 0.0
        self.peak_kib = 0

    def judge(self, path: Path) -> tuple[str | None, Path | None]:
        """The refusal's code, or the file to load."""
        before = _reset_peak_kib()
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            loaded = read_model(path).path
        except LoadmasterError as error:
            elapsed_s = time.perf_counter() - started
            self.slowest_cpu_s = max(self.slowest_cpu_s, time.process_time() - cpu_started)
            self.peak_kib = max(self.peak_kib, _peak_kib() - before)
            if elapsed_s > SLOW_S:
                elapsed_s = min(elapsed_s, *(_timed(path) for _ in range(2)))
            self.slowest_s = max(self.slowest_s, elapsed_s)
            self.totals["refused"] += 1
            self.codes[error.code] += 1
            return error.code, None
        except Exception:
            self.totals["crashes"] += 1
            traceback.print_exc()
            return "crash", None
        self.totals["accepted"] += 1
        return None, loaded

    def report(self, accepted: dict[str, str], wrong: list[str]) -> None:
        report = {
            "totals": self.totals,
            "codes": self.codes,
            "accepted": accepted,
            "wrong": wrong,
            "peak_mib": self.peak_kib / 1024,
            "slowest_s": self.slowest_s,
            "slowest_cpu_s": self.slowest_cpu_s,
        }
        print(json.dumps(report))


def _timed(path: Path) -> float:
    started = time.perf_counter()
    with contextlib.suppress(LoadmasterError):
        read_model(path)
    return time.perf_counter() - started


def _peak_kib() -> int:
    return _status_kib("VmHWM")


def _reset_peak_kib() -> int:
    """Let the kernel's high-water mark begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS")


def _status_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def _judge_chunk(start: int, count: int, seed: int, folder: Path) -> None:
    judge = _Judge()
    accepted: dict[str, str] = {}
    wrong: list[str] = []
    if start < 0:
        paths = json.loads((folder / "paths.json").read_text())
        for case, path in zip(CASES, paths, strict=True):
            code, loaded = judge.judge(Path(path))
            if loaded is not None:
                accepted[os.fspath(loaded)] = case.name
            if code != case.code:
                wrong.append(f"{case.group}, {case.name}: {code}, expected {case.code}")
    else:
        chunks: dict[str, bytes] = {}
        models = mutations.bases(folder, chunks)
        for index in range(start, start + count):
            path = folder / f"{index}.gguf"
            what = mutations.mutant(models, index, seed, path, chunks)
            _, loaded = judge.judge(path)
            if loaded is None:
                path.unlink()
            else:
                accepted[os.fspath(loaded)] = f"{index}: {what}"
    judge.report(accepted, wrong)


def _start_probe(accepted: dict[str, str]) -> tuple[subprocess.Popen[str], dict[str, str]]:
    folder = Path(next(iter(accepted))).parent
    listing = folder / "accepted.txt"
    listing.write_text("".join(path + "\n" for path in accepted))
    with listing.open() as paths:
        probe = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.decode_probe"],
            stdin=paths,
            stdout=subprocess.PIPE,
            text=True,
        )
    return probe, accepted


def _collect(
    probing: tuple[subprocess.Popen[str], dict[str, str]],
    totals: Counter[str],
    aborts: list[dict[str, Any]],
) -> None:
    probe, accepted = probing
    out, _ = probe.communicate()
    results = [json.loads(line) for line in out.splitlines()]
    if probe.returncode != 0 or len(results) != len(accepted):
        raise SystemExit("the probe did not finish: is an engine build there?")
    for result in results:
        path = result["path"]
        name = {"refused": "refused_by_engine"}.get(result["outcome"], result["outcome"])
        totals[name] += 1
        if result["outcome"] == "aborted":
            kept = {"what": accepted[path], "why": result["why"], "signal": result["signal"]}
            aborts.append(kept)
            print(json.dumps(kept), file=sys.stderr)
        if path.endswith(".gguf") and Path(path).is_file():
            Path(path).unlink()


def _valid_refused(work: Path) -> list[str]:
    """Every architecture at its real shape in each type, as header-only files."""
    from benchmarks.shapes import ARCHITECTURES, TINY

    refused = []
    for models in (ARCHITECTURES, TINY):
        for name, describe in models.items():
            for quant in VALID_TYPES:
                path = write_sparse(work / "valid.gguf", *describe(quant))
                try:
                    read_model(path)
                except LoadmasterError as error:
                    refused.append(f"{name} {quant}: {error}")
    return refused


if __name__ == "__main__":
    main()
