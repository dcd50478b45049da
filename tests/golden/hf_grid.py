"""The fixed grid of machine × shape × quantization whose plans are kept in `hf_plans.json`.

After an intended change: `python -m tests.golden.hf_grid`, then read the difference.
"""

import json
from pathlib import Path
from typing import Any

from loadmaster.errors import UsageError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.types import Kind, Plan, Quantize, TransformersSettings
from tests.checkpoint_parts import plan, shape

PLANS = Path(__file__).with_name("hf_plans.json")
MACHINES = ("cpu-64g", "rtx3060-12g", "rtx4090-24g", "rtx3090-x2", "a100-80g-x4", "h100-80g-x8")
MODELS = ("llama-3-8b", "gemma-3-12b", "mixtral-8x7b", "llama-3-70b", "llama-3.1-405b")
_KINDS: tuple[Kind, ...] = ("model", "kv", "compute", "output", "overhead")
QUANTIZE: tuple[Quantize, ...] = ("none", "int8", "fp8", "nf4")


def cells() -> list[tuple[str, str, Quantize]]:
    return [(m, name, q) for m in MACHINES for name in MODELS for q in QUANTIZE]


def summary(model: CheckpointSpec, machine: str, quantize: Quantize) -> dict[str, Any]:
    """What a reviewer reads of one cell."""
    try:
        near = model.name == MODELS[0]  # of the others it takes too long
        outcome = plan(model, machine, quantize=quantize, alternatives=near)
    except UsageError as error:
        return {"refused": error.message}
    settings = outcome.engine
    assert isinstance(settings, TransformersSettings)
    found: dict[str, Any] = {
        "fits": isinstance(outcome, Plan),
        "n_ctx": settings.n_ctx,
        "compute_type": settings.compute_type,
        "layers": _layers(settings),
        "bytes": {
            device.id: {kind: device.of(kind) for kind in _KINDS} for device in outcome.devices
        },
    }
    if isinstance(outcome, Plan):
        speed = outcome.predicted.decode_tok_s
        found["decode_tok_s"] = None if speed is None else float(f"{speed:.4g}")
        found["bound_by"] = outcome.predicted.bound_by
    else:
        found["short"] = {one.device: one.bytes for one in outcome.shortfalls}
        found["nearest"] = [" ".join(one.flags) for one in outcome.nearest]
    return found


def _layers(settings: TransformersSettings) -> dict[str, int]:
    devices = [device for name, device in settings.device_map if ".layers." in name]
    devices = devices or [settings.device_map[0][1]]
    return {device: devices.count(device) for device in dict.fromkeys(devices)}


def all_cells() -> dict[str, Any]:
    models = {name: shape(name) for name in MODELS}
    return {f"{m} · {n} · {q}": summary(models[n], m, q) for m, n, q in cells()}


if __name__ == "__main__":
    PLANS.write_text(json.dumps(all_cells(), indent=1, ensure_ascii=False) + "\n")
