"""Plans of a few jobs, kept in `jobs.json`. To renew it: `python -m tests.golden.jobs`.

Sizes are bounds (no engine is asked), so the plans are arithmetic and the same everywhere.
"""

import json
from pathlib import Path
from typing import Any

from loadmaster.machine.profiles import load_profile
from loadmaster.model.shapes.library import parse_shape, shape_model
from loadmaster.plan.batch import ItemClass, JobOutline
from loadmaster.plan.budget import make_budget
from loadmaster.plan.job_planning import JobPlan, job_planning
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import DoesNotFit, Knobs, Workload

PLANS = Path(__file__).with_name("jobs.json")
JOBS = {
    "96 × 512+32": JobOutline(classes=(ItemClass(count=96, prompt_tokens=512, output_tokens=32),)),
    "10000 × 512+128, 400 shared": JobOutline(
        classes=(ItemClass(count=10_000, prompt_tokens=512, output_tokens=128, shared_tokens=400),),
        prefix_tokens=400,
    ),
}
SHORT, NIGHT = JOBS
CELLS = (
    ("rtx4090-24g", "shape:llama-3-70b@Q4_K_M", SHORT),
    ("rtx4090-24g", "shape:llama-3-70b@Q4_K_M", NIGHT),
    ("rtx3060-12g", "shape:llama-3-8b@Q8_0", NIGHT),
    ("rtx4090-24g", "shape:gpt-oss-120b@MXFP4", NIGHT),
    ("cpu-64g", "shape:llama-3-8b@Q4_K_M", SHORT),
)


def summary(machine_name: str, shape: str, job: str) -> dict[str, Any]:
    """What a reviewer reads of one plan."""
    machine = load_profile(machine_name)
    steps = job_planning(
        machine, shape_model(parse_shape(shape)), JOBS[job], Workload(),
        make_budget(machine, None, None), Knobs(), default_overheads(machine.gpus), None,
    )  # fmt: skip
    try:
        next(steps)
    except StopIteration as end:
        return _summary(end.value)
    raise AssertionError("without an engine there is nothing to ask")


def _summary(made: JobPlan | DoesNotFit) -> dict[str, Any]:
    assert isinstance(made, JobPlan)
    engine = made.plan.llamacpp
    return {
        "sequences": engine.n_seq_max,
        "n_ctx": engine.n_ctx,
        "kv": engine.type_k,
        "n_ubatch": engine.n_ubatch,
        "op_offload": engine.op_offload_min_batch if engine.op_offload else None,
        "layers": list(engine.layers_per_device),
        "overrides": [f"{it.pattern}={it.device}" for it in engine.overrides],
        "bytes": {
            device.id: {item.kind: device.of(item.kind) for item in device.items}
            for device in made.plan.devices
        },
        "requests_per_hour": _figure(made.predicted.items_per_hour),
        "bound_by": made.predicted.bound_by,
        "speedup": None if made.speedup is None else _figure(made.speedup),
    }


def _figure(value: float) -> float:
    return float(f"{value:.3g}")


def all_plans() -> dict[str, Any]:
    """Every cell of the grid."""
    return {" · ".join(cell): summary(*cell) for cell in CELLS}


if __name__ == "__main__":
    PLANS.write_text(json.dumps(all_plans(), indent=1, ensure_ascii=False) + "\n")
