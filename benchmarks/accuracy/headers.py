"""Part 1 of the plan benchmark: bytes from the header against the engine's own, to the byte.

Header-only files at real shapes, sized by the engine on virtual devices without allocating.
"""

import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.accuracy.grid import DEVICE_SETS, QUANTS, DeviceSet, cases
from benchmarks.gguf_writer import write_sparse
from benchmarks.shapes import ARCHITECTURES
from loadmaster.engine.sizing import Sizer
from loadmaster.engine.types import EngineBuild
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan import bounds, memory
from loadmaster.plan.types import EngineSettings, Sizing, SizingFailure

SEED = 20261001
PER_SET = 8  # cases for each architecture on each set of devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One case: ours against the engine's; errors are summed over devices without sign."""

    name: str
    devices: str
    settings: EngineSettings
    model_error_bytes: int
    kv_error_bytes: int
    bound_below: tuple[str, ...]  # the devices where the engine needs more than our bound
    bound_ratio: float  # our bound over the engine's compute bytes, all devices together


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A case that the engine would not size: it proves nothing, and is counted."""

    name: str
    devices: str
    reason: str


def run(
    build: EngineBuild, isa: Sequence[str], *, per_set: int = PER_SET, seed: int = SEED
) -> tuple[list[Outcome], list[Refusal]]:
    """Size every case and compare; `isa` says what this CPU repacks."""
    repacked = memory.repacked_types(isa)
    outcomes: list[Outcome] = []
    refusals: list[Refusal] = []
    with tempfile.TemporaryDirectory(prefix="loadmaster-") as folder:
        for devices in DEVICE_SETS:
            with Sizer(build, devices.devices) as sizer:
                for name, model in _models(Path(folder), devices):
                    dice = random.Random(f"{seed} {devices.name} {name}")
                    asked = cases(model, devices, per_set, dice)
                    for settings, answer in sizer.sizes(model, asked).items():
                        if isinstance(answer, SizingFailure):
                            refusals.append(
                                Refusal(name=name, devices=devices.name, reason=answer.reason)
                            )
                        else:
                            outcome = _compare(name, model, devices, settings, answer, repacked)
                            outcomes.append(outcome)
    return outcomes, refusals


def _models(folder: Path, devices: DeviceSet) -> Iterator[tuple[str, ModelSpec]]:
    """Every architecture, in another quantization on each set of devices."""
    for number, (name, shape) in enumerate(ARCHITECTURES.items()):
        quant = QUANTS[(number + DEVICE_SETS.index(devices)) % len(QUANTS)]
        yield name, read_model(write_sparse(folder / f"{name}-{quant}.gguf", *shape(quant)))


def _compare(
    name: str,
    model: ModelSpec,
    devices: DeviceSet,
    settings: EngineSettings,
    answer: Sizing,
    repacked: frozenset[str],
) -> Outcome:
    rules = devices.rules
    bound = bounds.bound_compute_bytes(model, settings, rules)
    weights = memory.model_bytes(model, settings, rules, repacked=repacked)
    caches = memory.context_bytes(model, settings, rules)
    engine = {device: answer.on(device) for device in bound}
    kv_error = _error(caches, {device: row.context_bytes for device, row in engine.items()})
    return Outcome(
        name=name,
        devices=devices.name,
        settings=settings,
        model_error_bytes=_error(weights, {d: row.model_bytes for d, row in engine.items()}),
        kv_error_bytes=kv_error if model.kv_formula else 0,
        bound_below=tuple(d for d, row in engine.items() if bound[d] < row.compute_bytes),
        bound_ratio=sum(bound.values()) / max(1, sum(r.compute_bytes for r in engine.values())),
    )


def _error(ours: Mapping[str, int], engines: Mapping[str, int]) -> int:
    return sum(abs(ours[device] - engines[device]) for device in engines)


def figures(outcomes: Sequence[Outcome], refusals: Sequence[Refusal]) -> dict[str, object]:
    """What this part contributes to the benchmark's last line."""
    return {
        "header_cases": len(outcomes),
        "header_cases_refused": len(refusals),
        "header_architectures": len({outcome.name for outcome in outcomes}),
        "model_error_bytes": sum(outcome.model_error_bytes for outcome in outcomes),
        "kv_error_bytes": sum(outcome.kv_error_bytes for outcome in outcomes),
        "bound_below": sum(len(outcome.bound_below) for outcome in outcomes),
        "bound_ratio_p50": round(statistics.median(o.bound_ratio for o in outcomes), 2),
    }


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One line for each architecture, and the whole case where something differs."""
    yield f"{'architecture':<20} {'cases':>6} {'model error':>12} {'kv error':>10} {'below':>6}"
    for name, count in Counter(outcome.name for outcome in outcomes).items():
        own = [outcome for outcome in outcomes if outcome.name == name]
        weights, caches = (sum(getattr(o, f"{kind}_error_bytes") for o in own)
                           for kind in ("model", "kv"))  # fmt: skip
        below = sum(len(outcome.bound_below) for outcome in own)
        yield f"{name:<20} {count:>6} {weights:>12} {caches:>10} {below:>6}"
    for outcome in outcomes:
        if outcome.model_error_bytes or outcome.kv_error_bytes or outcome.bound_below:
            yield f"differs: {asdict(outcome)}"
