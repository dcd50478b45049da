"""Part 1b of the plan benchmark: the final plan against a real load, and again after decoding.

Every architecture of `benchmarks.shapes` as a tiny model with random weights, on no, one and two
stand-in GPUs under several budgets; then real shapes whose weights are a hole in the file (zeros
take the memory that any weights take) as far as they load in 20 GiB and a few seconds.

    final_error_bytes     planned less the engine's own buffers, without sign: model, context and
                          compute on every device and the host, after loading and after decoding
    counter_error_bytes   the stand-in's count of what it gave, less those buffers

Weights mapped from the file are no buffer: the engine reports the span of the file that it mapped.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.stand_in import (
    SizingEngine,
    Trial,
    buffer_error_bytes,
    counter_error_bytes,
    devices_of,
    plan_with,
    stand_in_machine,
    try_plan,
)
from benchmarks.gguf_writer import write_random, write_sparse
from benchmarks.shapes import ARCHITECTURES, TINY
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import LoadmasterError
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.types import Knobs, Plan, Workload
from loadmaster.units import MIB

QUANTS = ("q4_K_M", "q8_0", "q6_K", "q5_K_M", "f16")
# Parts of what all on one device takes, for each GPU; an empty one is the host alone.
SHARES: Sequence[tuple[float, ...]] = ((), (1.05,), (0.75,), (0.45,), (0.7, 0.5))
# Real shapes of 0.7 to 7 GB; their prompts are short, because two cores prefill them.
REAL = ("lfm2-1.2b", "llama-3b", "mamba-2.8b", "granitehybrid-3b", "phi3-mini", "qwen2-7b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model file and its share of the stand-ins."""

    path: Path
    shares: tuple[float, ...]
    knobs: Knobs
    n_ctx: int
    has_words: bool  # without a vocabulary there is nothing to generate: the peak is committed


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    name: str
    shares: tuple[float, ...]
    error_bytes: int
    counter_error_bytes: int
    device_bytes: int
    failure: str = ""


def run(build: EngineBuild, *, n_processes: int = 2) -> dict[str, object]:
    """Every case; the figures of this part."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = list(_tiny_cases(Path(folder)))
        with ProcessPoolExecutor(n_processes) as pool:
            rows = pool.map(run_cases, [build] * len(tiny), tiny)
            results = [result for batch in rows for result in batch]
        for name in REAL:  # one after another: together they would not fit in RAM
            results += run_cases(build, _real_cases(Path(folder), name))
    return _figures(results)


def _tiny_cases(folder: Path) -> Iterator[list[Case]]:
    for number, (name, shape) in enumerate(TINY.items()):
        quant = QUANTS[number % len(QUANTS)]
        path = write_random(folder / f"{name}-{quant}.gguf", *shape(quant), seed=number)
        yield [
            Case(path=path, shares=shares, knobs=knobs, n_ctx=512, has_words=True)
            for shares in SHARES
            for knobs in _tiny_knobs(shares)
        ]


def _tiny_knobs(shares: tuple[float, ...]) -> list[Knobs]:
    if shares:
        return [Knobs(n_ubatch=128)]
    return [Knobs(n_ubatch=128), Knobs(n_ubatch=64, load_mode="mmap")]


def _real_cases(folder: Path, name: str) -> list[Case]:
    path = write_sparse(folder / f"{name}.gguf", *ARCHITECTURES[name]("q4_K_M"))
    knobs = Knobs(n_ubatch=32)
    return [
        Case(path=path, shares=shares, knobs=knobs, n_ctx=2048, has_words=False)
        for shares in ((0.6,), (0.5, 0.4))
    ]


def run_cases(build: EngineBuild, cases: Sequence[Case]) -> list[Result]:
    """The cases of one model."""
    model = read_model(cases[0].path)
    results = []
    for n_devices in sorted({len(case.shares) for case in cases}):
        with SizingEngine(build, n_devices) as sizing:
            results += [
                _one(build, sizing, model, case) for case in cases if len(case.shares) == n_devices
            ]
    return results


def _one(build: EngineBuild, sizing: SizingEngine, model: ModelSpec, case: Case) -> Result:
    name, workload = case.path.stem, Workload(n_ctx=case.n_ctx)
    roomy = stand_in_machine([64 << 30] * len(case.shares), n_threads=2)
    widest = plan_with(sizing, roomy, model, workload, case.knobs)
    assert isinstance(widest, Plan), f"{name} does not fit at all"
    total = sum(d.planned_bytes for d in widest.devices if d.id != "cpu") + MIB
    machine = stand_in_machine([int(total * share) for share in case.shares], n_threads=2)
    plan = plan_with(sizing, machine, model, workload, case.knobs)
    if not isinstance(plan, Plan):
        return _failed(case, "no plan")
    try:
        trial = try_plan(build, plan, devices_of(machine), has_words=case.has_words)
    except LoadmasterError as error:
        return _failed(case, error.message)
    return _compare(case, plan, trial)


def _compare(case: Case, plan: Plan, trial: Trial) -> Result:
    reports = (trial.loaded, trial.decoded)
    return Result(
        name=case.path.stem,
        shares=case.shares,
        error_bytes=sum(buffer_error_bytes(plan, report) for report in reports),
        counter_error_bytes=sum(counter_error_bytes(report) for report in reports),
        device_bytes=sum(device.planned_bytes for device in plan.devices if device.id != "cpu"),
    )


def _failed(case: Case, why: str) -> Result:
    return Result(
        name=case.path.stem, shares=case.shares, error_bytes=0, counter_error_bytes=0,
        device_bytes=0, failure=why,
    )  # fmt: skip


def _figures(results: Sequence[Result]) -> dict[str, object]:
    for result in results:
        if result.failure or result.error_bytes or result.counter_error_bytes:
            print(f"loads: {result}")
    return {
        "loads": len(results),
        "load_failures": sum(bool(result.failure) for result in results),
        "final_error_bytes": sum(result.error_bytes for result in results),
        "counter_error_bytes": sum(result.counter_error_bytes for result in results),
        "loads_on_devices": sum(result.device_bytes > 0 for result in results),
    }
