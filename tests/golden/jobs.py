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
from loadmaster.plan.hf_jobs import plan_checkpoint_job
from loadmaster.plan.job_planning import JobPlan, job_planning
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import DoesNotFit, Knobs, Quantize, TransformersSettings, Workload
from tests.checkpoint_parts import shape

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
# The same jobs of safetensors, quantized while they load.
HF_CELLS: tuple[tuple[str, str, Quantize, str], ...] = (
    ("rtx3060-12g", "llama-3-8b", "nf4", NIGHT),
    ("rtx4090-24g", "llama-3-8b", "int8", SHORT),
    ("a100-80g-x4", "llama-3.1-405b", "nf4", SHORT),
    ("cpu-64g", "llama-3-8b", "none", SHORT),
)


def summary(machine_name: str, model: str, job: str) -> dict[str, Any]:
    """What a reviewer reads of one plan."""
    machine = load_profile(machine_name)
    steps = job_planning(
        machine, shape_model(parse_shape(model)), JOBS[job], Workload(),
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


def hf_summary(machine_name: str, name: str, quantize: Quantize, job: str) -> dict[str, Any]:
    """The same of a checkpoint under the transformers engine."""
    machine = load_profile(machine_name)
    made = plan_checkpoint_job(
        machine, shape(name), JOBS[job], Workload(), make_budget(machine, None, None),
        Knobs(quantize=quantize), default_overheads(machine.gpus),
    )  # fmt: skip
    assert isinstance(made, JobPlan)
    engine = made.plan.engine
    assert isinstance(engine, TransformersSettings)
    return {
        "sequences": engine.n_seq_max,
        "n_ctx": engine.n_ctx,
        "n_ubatch": engine.n_ubatch,
        "devices": list(dict.fromkeys(device for _, device in engine.device_map)),
        "bytes": {device.id: device.planned_bytes for device in made.plan.devices},
        "requests_per_hour": _figure(made.predicted.items_per_hour),
        "bound_by": made.predicted.bound_by,
        "speedup": None if made.speedup is None else _figure(made.speedup),
        "levers": [lever.what for lever in made.levers],
    }


def _figure(value: float) -> float:
    return float(f"{value:.3g}")


def all_plans() -> dict[str, Any]:
    """Every cell of the grid."""
    found = {" · ".join(cell): summary(*cell) for cell in CELLS}
    return found | {" · ".join(cell): hf_summary(*cell) for cell in HF_CELLS}


if __name__ == "__main__":
    PLANS.write_text(json.dumps(all_plans(), indent=1, ensure_ascii=False) + "\n")
