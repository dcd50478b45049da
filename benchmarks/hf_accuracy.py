"""Are plans of safetensors models true? Planned bytes beside those that the engine then holds.

    python -m benchmarks.hf_accuracy [--family llama …]

Random models of several families and the demo model are opened on the CPU in BF16, NF4 with and
without double quantization, and LLM.int8; each in a process of its own, that reads a prompt and
decodes. Shapes up to 405B are made on the meta device, where the libraries count for themselves.
The last line of the output is one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.hf_models import FAMILIES, write_model
from loadmaster.engine.meter import process_memory
from loadmaster.machine.detect import detect_machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.shapes.checkpoints import shape_checkpoint
from loadmaster.model.shapes.library import load_shape
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_planner import plan_checkpoint
from loadmaster.plan.hf_weights import loaded_tensors
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import CPU, Knobs, Plan, Quantize, TransformersSettings, Workload

MODES: Mapping[str, tuple[Quantize, bool]] = {
    "bf16": ("none", False), "nf4": ("nf4", False), "nf4-double": ("nf4", True),
    "int8": ("int8", False),
}  # fmt: skip
SHAPES = ("llama-3.2-1b", "llama-3-8b", "qwen3-30b-a3b", "llama-3-70b", "llama-3.1-405b")
DEMO = Path(__file__).parents[1] / "tests" / "data" / "demo"
N_CTX = 1024
N_DECODED = 16
# What a figure may be at the most.
AT_MOST = {
    "weight_error_bytes": 0,
    "kv_error_bytes": 0,
    "peak_above_plan_pct": 0,
    "meta_error_bytes": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Run all cases; 1 when a figure is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=[*FAMILIES, "demo"])
    parser.add_argument("--case", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.case:
        print(json.dumps(measure(Path(arguments.case[0]), arguments.case[1])))
        return 0
    started = time.monotonic()
    rows = list(_rows(arguments.family or [*FAMILIES, "demo"]))
    meta = {} if arguments.family else dict(_meta())
    figures = _figures(rows, meta)
    failed = [name for name, most in AT_MOST.items() if figures.get(name, 0) > most]
    where = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({
        "benchmark": "hf_accuracy", **where, **_versions(), **figures, "cases": rows,
        "seconds": round(time.monotonic() - started, 1), "failed": failed,
    }))  # fmt: skip
    return 1 if failed else 0


def _rows(families: list[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as root:
        for family in families:
            folder = DEMO if family == "demo" else write_model(Path(root) / family, family)
            for mode in MODES:
                row = {"family": family, "mode": mode, **_in_child(folder, mode)}
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                yield row


def _in_child(folder: Path, mode: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.hf_accuracy", "--case", str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{folder.name} in {mode} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan_here(model: CheckpointSpec, mode: str) -> Plan:
    """The plan for this machine's CPU."""
    quantize, double = MODES[mode]
    machine = replace(detect_machine(), gpus=())
    outcome = plan_checkpoint(
        machine, model, Workload(n_ctx=min(N_CTX, model.n_ctx_train), n_seq_max=2),
        make_budget(machine), Knobs(quantize=quantize, double_quant=double),
        default_overheads(()), alternatives=False,
    )  # fmt: skip
    assert isinstance(outcome, Plan), outcome
    return outcome


# ---- one case, in a process of its own


def measure(folder: Path, mode: str) -> dict[str, Any]:
    """Open the model under its plan, read a prompt, decode; planned beside measured."""
    from loadmaster.engine.backends.transformers.environment import prepare

    prepare()
    from loadmaster.engine.backends.transformers.opened import OpenModel, filler
    from loadmaster.engine.backends.transformers.weights import load_weights

    model = read_checkpoint(folder)
    plan = plan_here(model, mode)
    settings = plan.engine
    assert isinstance(settings, TransformersSettings)
    with _Peak() as peak:
        opened = OpenModel(load_weights(model, settings, lambda _: None), model, settings)
        buffers = {row.device: row for row in opened.buffers()}[CPU]
        n_prompt = min(settings.n_ubatch, opened.n_ctx_seq - N_DECODED - 1)
        opened.step([filler(0, n_prompt, 0)])
        for index in range(N_DECODED):
            opened.step([filler(0, 1, n_prompt + index)])
    host = plan.device(CPU)
    # The parent's share of the process line is not in this process.
    planned = host.planned_bytes - default_overheads(()).process_bytes
    return {
        "weight_error_bytes": buffers.model_bytes - host.of("model"),
        "kv_error_bytes": buffers.context_bytes - host.of("kv"),
        "planned_bytes": planned,
        "peak_bytes": peak.bytes,
        "peak_of_plan_pct": round(100 * peak.bytes / planned, 1),
    }


class _Peak:
    """The most private memory that this process has while the block runs."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, process_memory().own_bytes)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


# ---- shapes on the meta device


def _meta() -> Iterator[tuple[str, dict[str, int]]]:
    """By shape and mode: our sum less that of the modules that the libraries put in place. In NF4
    they count values alone: scales are made with the data."""
    for name in SHAPES:
        model = shape_checkpoint(load_shape(name))
        for mode, (quantize, double) in MODES.items():
            settings = replace(_SETTINGS, quantize=quantize, double_quant=double)
            ours = loaded_tensors(model, settings)
            if quantize != "none":
                scales = sum(sum(tensor.allocations[1:]) for tensor in ours if tensor.is_quantized)
            else:
                scales = 0
            planned = sum(tensor.size_bytes for tensor in ours) - scales
            yield f"{name} {mode}", {"planned": planned, "counted": _counted(model, quantize)}


_SETTINGS = TransformersSettings(
    quantize="none", double_quant=False, compute_type="bf16", device_map=(("", CPU),),
    attention="sdpa", n_ctx=N_CTX, n_seq_max=1, n_ubatch=512, type_k="bf16", type_v="bf16",
    n_threads=1,
)  # fmt: skip


def _counted(model: CheckpointSpec, quantize: Quantize) -> int:
    """accelerate's sum over a model of transformers without data, its matrices replaced as a load
    replaces them."""
    import torch
    from accelerate.utils import compute_module_sizes
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    layer = model.layers[0]
    config = CONFIG_MAPPING[model.architecture](
        hidden_size=model.n_embd, intermediate_size=model.n_ff, vocab_size=model.n_vocab,
        num_hidden_layers=model.n_layer, num_attention_heads=layer.n_head,
        num_key_value_heads=layer.n_head_kv, head_dim=layer.k_width // layer.n_head_kv,
        tie_word_embeddings=model.tied_output, num_experts=model.n_expert or 1,
        num_local_experts=model.n_expert or 1, moe_intermediate_size=model.n_ff_expert,
    )  # fmt: skip
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.tie_weights()
    bits = {"none": None, "nf4": 4, "fp4": 4, "int8": 8}[quantize]
    sizes = compute_module_sizes(made)
    total = int(sizes[""])
    if bits is not None:
        total -= sum(
            (2 * 8 - bits) * module.weight.numel() // 8
            for name, module in made.named_modules()
            if type(module) is torch.nn.Linear and name != "lm_head"
        )
    tied = made.get_input_embeddings().weight.nbytes if model.tied_output else 0
    counted_twice = tied and "lm_head" in sizes and sizes["lm_head"] == tied
    return total - (tied if counted_twice else 0)


# ---- figures


def _figures(rows: list[dict[str, Any]], meta: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    large = [row for row in rows if row["family"] != "demo"] or rows
    return {
        "n_cases": len(rows),
        "weight_error_bytes": max(abs(row["weight_error_bytes"]) for row in rows),
        "kv_error_bytes": max(abs(row["kv_error_bytes"]) for row in rows),
        "peak_of_plan_min_pct": min(row["peak_of_plan_pct"] for row in large),
        "peak_of_plan_max_pct": max(row["peak_of_plan_pct"] for row in rows),
        "peak_above_plan_pct": max(0.0, max(row["peak_of_plan_pct"] for row in rows) - 105),
        "meta_error_bytes": max(
            (abs(row["planned"] - row["counted"]) for row in meta.values()), default=0
        ),
        "meta": meta,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "accelerate")}


if __name__ == "__main__":
    raise SystemExit(main())
