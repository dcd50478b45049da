"""Is the predicted speed true? Random-weight models on this machine, measured beside predicted.

    python -m benchmarks.predict_speed [--threads N] [--measurements FILE] [--keep]

The constants are those of `doctor --measure`: bare kernels on 2048 × 4096 matrices, and a probe of
two layers for the cost of a step; taken before, amid and after the models, the middle one counts,
because other machines on the same host slow this one by some per cent for minutes. The figures are
of other shapes: whole models of 0.3 to 4 GiB, dense and MoE, at positions 0 to 4k, with 1 to 16
sequences. Steps are timed one by one in the worker; a figure is the median of its steps. A timing
counts when nothing else had the processors meanwhile, or when its steps are all alike; else it is
repeated, for `--patience` seconds in all. Then the published measurements of
`benchmarks.predict_published`, predicted from tables alone. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gguf_writer import write_random
from benchmarks.predict_published import published
from benchmarks.quiet import Quiet
from benchmarks.shapes import build
from loadmaster import settings
from loadmaster.engine.builds import find_build
from loadmaster.engine.process import Engine
from loadmaster.engine.timing import TimeSteps
from loadmaster.engine.types import EngineBuild
from loadmaster.machine.detect import detect_machine
from loadmaster.machine.measurements import Measurements
from loadmaster.machine.types import Machine
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.budget import make_budget
from loadmaster.plan.forecast import Forecast, forecast
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.planner import make_plan
from loadmaster.plan.types import EngineSettings, Knobs, Plan, Workload
from loadmaster.schema import from_json, to_json
from loadmaster.tasks.bench import load_plan
from loadmaster.tasks.measuring.machine import measure_machine

PROMPT_TOKENS = 512
N_STEPS = 16
MANY_DEPTH = 64
SEQUENCES = (2, 4, 8, 16)
MOST_SPREAD = 1.1  # median over least of the decode steps of a timing that counts
KEEP_BYTES = 1 << 30  # larger files are removed after use


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model to measure; none of its matrices has the size that the constants are from."""

    name: str
    base: str
    quant: str
    depths: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)


def _llama(name: str, quant: str, depths: Sequence[int], **changes: Any) -> Case:
    return Case(name=name, base="llama-8b", quant=quant, depths=tuple(depths), changes=changes)


_SMALL = {"n_layer": 16, "n_embd": 1536, "n_head": 12, "n_head_kv": 4, "n_ff": 4608}
_WIDE = {"n_layer": 10, "n_embd": 3072, "n_head": 24, "n_head_kv": 8, "n_ff": 8192}
_VOCAB = {"n_vocab": 32000, "rope_freqs": False}
CASES = (
    _llama("0.3 GiB q4_K", "q4_K", (0, 1024, 4096), **_SMALL, **_VOCAB),
    _llama("0.5 GiB q8_0", "q8_0", (0, 1024, 4096), **_SMALL, **_VOCAB),
    _llama("0.7 GiB q4_K", "q4_K", (0, 512, 2048), **_WIDE, **_VOCAB),
    _llama("1.0 GiB f16", "f16", (0, 1024, 4096), **_SMALL, **_VOCAB),
    _llama("1.3 GiB q8_0", "q8_0", (0, 2048), **_WIDE, **_VOCAB),
    _llama("2.5 GiB f16", "f16", (0, 1024), **_WIDE, **_VOCAB),
    _llama("4.0 GiB q8_0", "q8_0", (0, 512), **{**_WIDE, "n_layer": 36}, **_VOCAB),
    Case(name="1.0 GiB q4_K MoE", base="qwen3moe-30b-a3b", quant="q4_K", depths=(0, 1024, 4096),
         changes={"n_layer": 12, "n_embd": 1280, "n_head": 20, "n_head_kv": 4, "head_dim": 64,
                  "n_expert": 32, "n_expert_used": 4, "n_ff_exp": 1280, "n_vocab": 32000}),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One figure of one model as it was timed: seconds of a step, or of a prompt."""

    model: str
    kind: str  # `decode`, `prefill`, `many`
    depth: int
    n_sequences: int
    measured_s: float
    predict_s: Callable[[Forecast], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A timing beside its prediction."""

    timing: Timing
    predicted_s: float

    @property
    def error_pct(self) -> float:
        """Of the predicted rate, in per cent of the measured one."""
        return 100 * (self.timing.measured_s / self.predicted_s - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The timings of one model under the same settings."""

    model: ModelSpec
    settings: EngineSettings
    timings: tuple[Timing, ...]

    def rows(self, machine: Machine) -> Iterator[Row]:
        """Beside what this machine's constants predict."""
        expected = forecast(machine, self.model, self.settings)
        for timing in self.timings:
            yield Row(timing=timing, predicted_s=timing.predict_s(expected))


def main(argv: list[str] | None = None) -> int:
    """Measure the constants and every case; 1 when a bound is broken."""
    arguments = _parser().parse_args(argv)
    start = time.monotonic()
    build, machine = find_build(), detect_machine()
    quiet = Quiet(patience_s=arguments.patience)
    constants = Constants(arguments, build, machine, quiet)
    cases = [case for case in CASES if not arguments.only or arguments.only in case.name]
    timed: list[Timed] = []
    for number, case in enumerate(cases):
        if number in (0, len(cases) // 2):
            constants.take()
        timed += _timed(case, build, machine, arguments, quiet)
    constants.take()
    measured = constants.middle()
    known = replace(machine, measured=measured)
    rows = [row for group in timed for row in group.rows(known)]
    print("\n".join(map(_line, rows)), flush=True)
    figures = {**_figures(rows), **published()}
    failed = [name for name, limit in LIMITS.items() if _above(figures.get(name), limit)]
    print(json.dumps({
        "benchmark": "predict_speed", **figures, "failed": failed,
        "disturbed": quiet.disturbed, "measure_spread": measured.spread,
        "constants_spread": constants.spread, "models": len(cases), "figures": len(rows),
        "measure_s": measured.seconds, "seconds": round(time.monotonic() - start, 1),
        "engine": build.id, "cpu": machine.cpu.name, "threads": _threads(machine, arguments),
        "python": platform.python_version(),
    }))  # fmt: skip
    return 1 if failed else 0


LIMITS = {
    "decode_median_error_pct": 7.0,
    "decode_max_error_pct": 15.0,
    "prefill_median_error_pct": 15.0,
    "many_median_error_pct": 15.0,
    "published_median_error_pct": 15.0,
}


def _above(figure: object, limit: float) -> bool:
    return isinstance(figure, int | float) and figure > limit


def _threads(machine: Machine, arguments: argparse.Namespace) -> int:
    threads: int | None = arguments.threads
    return threads or machine.cpu.physical_cores or machine.cpu.logical_cores


class Constants:
    """What `doctor --measure` finds, at several times. The worker is a child of its own."""

    def __init__(
        self, arguments: argparse.Namespace, build: EngineBuild, machine: Machine, quiet: Quiet
    ) -> None:
        self._file: Path | None = arguments.measurements
        self._build, self._machine, self._quiet = build, machine, quiet
        self._threads = _threads(machine, arguments)
        self._taken: list[Measurements] = []
        self._given = self._file is not None and self._file.exists()
        if self._file and self._given:
            self._taken = [from_json(Measurements, json.loads(self._file.read_text()))]

    def take(self) -> None:
        """Measure now, again while it is disturbed; nothing where a file has them."""
        while not self._given:
            self._quiet.wait()
            measured = measure_machine(
                self._build, self._machine, settings.data_folder(), n_threads=self._threads
            )
            if not measured.disturbed or self._quiet.patience_s <= 0:
                self._taken.append(measured)
                print(f"constants: products {_product_s(measured):.4g}", flush=True)
                return
            self._quiet.patience_s -= measured.seconds

    def middle(self) -> Measurements:
        """Those whose products were neither the fastest nor the slowest; kept in the file."""
        middle = sorted(self._taken, key=_product_s)[len(self._taken) // 2]
        if self._file and not self._given:
            self._file.write_text(json.dumps(to_json(middle)))
        return middle

    @property
    def spread(self) -> float:
        """The slowest products over the fastest."""
        seconds = [_product_s(one) for one in self._taken]
        return round(max(seconds) / min(seconds), 3)


def _product_s(measured: Measurements) -> float:
    """How slow the products were together."""
    return sum(point.s_per_byte / point.tokens for point in measured.devices[0].products)


def _file(case: Case, folder: Path) -> Path:
    """The case's file; written once, by a fixed seed."""
    path = folder / (case.name.replace(" ", "-") + ".gguf")
    if not path.exists():
        fresh = path.with_suffix(".part")
        write_random(fresh, *build(case.base, case.quant, **case.changes))
        fresh.rename(path)
    return path


def _plan(
    model: ModelSpec, machine: Machine, threads: int | None, n_ctx: int, n_seq_max: int
) -> Plan:
    workload = Workload(n_ctx=n_ctx, n_seq_max=n_seq_max)
    plan = make_plan(
        machine, model, workload, make_budget(machine, None, None), Knobs(n_threads=threads),
        default_overheads(machine.gpus), None, alternatives=False,
    )  # fmt: skip
    assert isinstance(plan, Plan), plan
    return plan


def _timed(
    case: Case,
    build: EngineBuild,
    machine: Machine,
    arguments: argparse.Namespace,
    quiet: Quiet,
) -> Iterator[Timed]:
    """One sequence at several depths, then several sequences, each under a plan of its own."""
    folder = settings.cache_folder() / "benchmarks" / "predict-speed"
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(case, folder)
    model = read_model(path)
    deepest = max((*case.depths, PROMPT_TOKENS))
    for n_ctx, n_seq_max, ask in ((deepest + N_STEPS, 1, _one), (256, max(SEQUENCES), _many)):
        plan = _plan(model, machine, arguments.threads, n_ctx, n_seq_max)
        assert isinstance(plan.llamacpp, EngineSettings)
        with Engine.start(build) as engine:
            load_plan(engine, plan)
            timings = tuple(ask(case, engine, quiet))
        yield Timed(model=model, settings=plan.llamacpp, timings=timings)
    if path.stat().st_size > KEEP_BYTES and not arguments.keep:
        path.unlink()


def _one(case: Case, engine: Engine, quiet: Quiet) -> Iterator[Timing]:
    _time(engine, 64, 1)  # touch the memory
    prompt = _prompt(engine, quiet)
    yield _timing(case, "prefill", 0, sum(prompt), lambda e: e.prefill_s(PROMPT_TOKENS))
    for depth in case.depths:
        seconds = _time(engine, depth, 1, quiet)
        chunks, steps = seconds[:-N_STEPS], seconds[-N_STEPS:]
        middle, before = depth + N_STEPS / 2, depth - PROMPT_TOKENS
        yield _timing(
            case, "decode", depth, statistics.median(steps), partial(_decode_s, middle, 1)
        )
        if len(chunks) > 2 and quiet.alone:
            yield _timing(case, "prefill", before, chunks[-1], partial(_prefill_s, before))


def _decode_s(depth: float, n_sequences: int, expected: Forecast) -> float:
    return expected.decode_s(depth, n_sequences)


def _prefill_s(depth: int, expected: Forecast) -> float:
    return expected.prefill_s(PROMPT_TOKENS, depth)


def _timing(
    case: Case,
    kind: str,
    depth: int,
    measured_s: float,
    predict_s: Callable[[Forecast], float],
    n_sequences: int = 1,
) -> Timing:
    found = Timing(
        model=case.name,
        kind=kind,
        depth=depth,
        n_sequences=n_sequences,
        measured_s=measured_s,
        predict_s=predict_s,
    )
    print(_measured_line(found), flush=True)
    return found


def _prompt(engine: Engine, quiet: Quiet) -> tuple[float, ...]:
    """The chunks of a prompt; there is one step of each kind, so nothing may run beside it."""
    question = TimeSteps(depth=PROMPT_TOKENS, n_sequences=1, n_steps=0)
    return quiet.timed(lambda: engine.time(question) or (), lambda: engine.pid)


def _many(case: Case, engine: Engine, quiet: Quiet) -> Iterator[Timing]:
    middle = MANY_DEPTH + N_STEPS / 2
    for count in SEQUENCES:
        steps = _time(engine, MANY_DEPTH, count, quiet)[-N_STEPS:]
        seconds = statistics.median(steps)
        predict = partial(_decode_s, middle, count)
        yield _timing(case, "many", MANY_DEPTH, seconds, predict, count)


def _time(engine: Engine, depth: int, count: int, quiet: Quiet | None = None) -> tuple[float, ...]:
    question = TimeSteps(depth=depth, n_sequences=count, n_steps=N_STEPS)
    if quiet is None:
        return engine.time(question) or ()
    return quiet.timed(lambda: engine.time(question) or (), lambda: engine.pid, _steady)


def _steady(seconds: tuple[float, ...]) -> bool:
    """Whether decode steps are all alike: most of them were undisturbed."""
    steps = seconds[-N_STEPS:]
    return statistics.median(steps) <= MOST_SPREAD * min(steps)


def _measured_line(timing: Timing) -> str:
    return (
        f"{timing.model:18} {timing.kind:8} depth {timing.depth:5} × {timing.n_sequences:2} "
        f"measured {timing.measured_s * 1e3:8.1f} ms"
    )


def _line(row: Row) -> str:
    predicted = f"predicted {row.predicted_s * 1e3:8.1f} ms {row.error_pct:+6.1f} %"
    return f"{_measured_line(row.timing)}  {predicted}"


def _figures(rows: Sequence[Row]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind in ("decode", "prefill", "many"):
        errors = [abs(row.error_pct) for row in rows if row.timing.kind == kind]
        if errors:
            figures[f"{kind}_median_error_pct"] = round(statistics.median(errors), 2)
            figures[f"{kind}_max_error_pct"] = round(max(errors), 2)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict_speed")
    parser.add_argument("--threads", type=int, help="CPU threads; default: physical cores")
    parser.add_argument("--measurements", type=Path, help="read the constants here, or keep them")
    parser.add_argument("--only", help="cases with this in their name")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for repetitions")
    parser.add_argument("--keep", action="store_true", help="keep large model files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
