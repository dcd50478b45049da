"""Safetensors checkpoints without weights for tests: headers as they are, data as holes."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.safetensors import BITS
from loadmaster.model.shapes.checkpoints import shape_checkpoint
from loadmaster.model.shapes.library import load_shape
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_planner import plan_checkpoint
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import DoesNotFit, Knobs, Plan, TransformersSettings, Workload

# Configs and tensors of random models that transformers 5.23.0 saved, and the bytes of every tensor
# that it held after loading them with torch 2.13.0 and bitsandbytes 0.50.2.
LOADED: Mapping[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "hf" / "loaded.json").read_text()
)
Rows = Mapping[str, tuple[str, Sequence[int]]]

SETTINGS = TransformersSettings(
    quantize="none",
    double_quant=False,
    compute_type="bf16",
    device_map=(("", "cpu"),),
    attention="sdpa",
    n_ctx=256,
    n_seq_max=1,
    n_ubatch=64,
    type_k="bf16",
    type_v="bf16",
    n_threads=1,
)


def header_bytes(tensors: Rows) -> tuple[bytes, int]:
    """A shard's length and JSON, and the size of its data."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw, at


def write_shard(path: Path, tensors: Rows) -> None:
    raw, data = header_bytes(tensors)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + data)


def write_checkpoint(
    folder: Path, family: str = "llama", *, shards: int = 1, **config: Any
) -> Path:
    """A checkpoint of a family; `config` replaces values of its config, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    row = LOADED[family]
    values = {k: v for k, v in (row["config"] | config).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {name: (dtype, shape) for name, (dtype, shape) in row["tensors"].items()}
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    files: dict[str, str] = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        write_shard(folder / file, {name: tensors[name] for name in part})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def without_output(folder: Path, family: str = "llama", **config: Any) -> Path:
    """A checkpoint that was saved without its output, as `AutoModel` has it."""
    write_checkpoint(folder, family, **config)
    rows = LOADED[family]["tensors"].items()
    kept = {name.removeprefix("model."): row for name, row in rows if name != "lm_head.weight"}
    write_shard(folder / "model.safetensors", {name: tuple(row) for name, row in kept.items()})
    return folder


def spec(folder: Path, family: str = "llama") -> CheckpointSpec:
    """The checkpoint of a family as the reader gives it."""
    return read_checkpoint(write_checkpoint(folder / family, family))


def shape(name: str = "llama-3-8b") -> CheckpointSpec:
    return shape_checkpoint(load_shape(name))


def plan(
    model: CheckpointSpec,
    machine: Machine | str = "rtx3060-12g",
    *,
    vram: str | None = None,
    ram: str | None = None,
    workload: Workload | None = None,
    alternatives: bool = True,
    **knobs: Any,
) -> Plan | DoesNotFit:
    """A plan on a shipped machine."""
    if isinstance(machine, str):
        machine = load_profile(machine)
    return plan_checkpoint(
        machine, model, workload or Workload(), make_budget(machine, vram, ram),
        replace(Knobs(), **knobs), default_overheads(machine.gpus), alternatives=alternatives,
    )  # fmt: skip


def fitting(model: CheckpointSpec, machine: Machine | str = "rtx3060-12g", **given: Any) -> Plan:
    outcome = plan(model, machine, **given)
    assert isinstance(outcome, Plan)
    return outcome
