"""The fixed grid of machine × model × workload whose plans are kept in `plans.json`.

Sizes are bounds (no engine is asked), so the plans are arithmetic and the same everywhere. After
an intended change: `python -m tests.golden.grid`, then read the difference.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gguf_writer import write_sparse
from benchmarks.shapes import ARCHITECTURES
from loadmaster.machine.profiles import load_profile
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.budget import make_budget
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.planner import make_plan
from loadmaster.plan.types import DoesNotFit, Knobs, NeedSizes, Plan, Workload

PLANS = Path(__file__).with_name("plans.json")
MACHINES = ("cpu-64g", "rtx3060-12g", "rtx4090-24g", "rtx3090-x2")
MODELS = ("llama-8b", "llama-70b", "qwen3moe-30b-a3b", "gemma3-12b", "gpt-oss-20b")
QUESTIONS: dict[str, tuple[str | None, Workload, Knobs]] = {
    "default": (None, Workload(), Knobs()),
    "long": (None, Workload(n_ctx=32768), Knobs()),
    "small budget": ("5GiB", Workload(), Knobs()),
    "all layers": ("10GiB", Workload(), Knobs(n_gpu_layers=999)),
    "refused": ("2GiB", Workload(n_ctx=65536), Knobs(n_gpu_layers=999, type_k="f16", type_v="f16")),
}
ON_CPU = ("default", "long")  # the others are about VRAM


def questions(machine_name: str) -> tuple[str, ...]:
    """What is asked of a machine."""
    return ON_CPU if machine_name.startswith("cpu") else tuple(QUESTIONS)


def models() -> dict[str, ModelSpec]:
    """The grid's models, read from sparse files of real shape."""
    specs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = Path(folder) / f"{name}.gguf"
            write_sparse(path, *ARCHITECTURES[name]("q4_K_M"))
            specs[name] = read_model(path)
    return specs


def summary(model: ModelSpec, machine_name: str, question: str) -> dict[str, Any]:
    """What a reviewer reads of one cell: the settings that matter, bytes and speed."""
    vram, workload, knobs = QUESTIONS[question]
    machine = load_profile(machine_name)
    if vram is not None and machine.gpus:
        vram = ",".join(f"{index}={vram}" for index in range(len(machine.gpus)))
    budget = make_budget(machine, vram if machine.gpus else None, None)
    overheads = default_overheads(machine.gpus)
    outcome = make_plan(machine, model, workload, budget, knobs, overheads, None)
    assert not isinstance(outcome, NeedSizes)
    return {
        "fits": isinstance(outcome, Plan),
        "layers": list(outcome.llamacpp.layers_per_device),
        "overrides": [f"{it.pattern}={it.device}" for it in outcome.llamacpp.overrides],
        "n_ctx": outcome.llamacpp.n_ctx,
        "kv": f"{outcome.llamacpp.type_k}/{outcome.llamacpp.type_v}",
        "n_ubatch": outcome.llamacpp.n_ubatch,
        "load_mode": outcome.llamacpp.load_mode,
        "bytes": {
            device.id: {item.kind: device.of(item.kind) for item in device.items}
            for device in outcome.devices
        },
        "decode_tok_s": _speed(outcome),
        "alternatives": [
            " ".join(it.flags)
            for it in (outcome.alternatives if isinstance(outcome, Plan) else outcome.nearest)
        ],
    }


def _speed(outcome: Plan | DoesNotFit) -> float | None:
    speed = outcome.predicted.decode_tok_s if isinstance(outcome, Plan) else None
    return None if speed is None else float(f"{speed:.3g}")


def all_plans() -> dict[str, Any]:
    """Every cell of the grid."""
    specs = models()
    return {
        f"{machine} · {name} · {question}": summary(spec, machine, question)
        for machine in MACHINES
        for name, spec in specs.items()
        for question in questions(machine)
    }


if __name__ == "__main__":
    PLANS.write_text(json.dumps(all_plans(), indent=1, ensure_ascii=False) + "\n")
