"""What `batch plan` predicts on machines that are not here, as the table of docs/batch-planning.md.

    python -m benchmarks.batch_predictions [--write]

Bounds stand for compute buffers and tables for bandwidths, so the figures are arithmetic and the
same everywhere. `--write` puts the table into the page. The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.shapes.library import parse_shape, shape_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.batch import ItemClass, JobOutline
from loadmaster.plan.budget import make_budget
from loadmaster.plan.forecast import forecast
from loadmaster.plan.job_planning import JobPlan, job_planning
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.simulate import JobPrediction, simulate
from loadmaster.plan.types import CPU, EngineSettings, Knobs, Override, Workload
from loadmaster.units import GIB, Bytes

PAGE = Path(__file__).parents[1] / "docs" / "batch-planning.md"
BEGIN, END = "<!-- table: python -m benchmarks.batch_predictions --write -->", "<!-- end -->"


def job(count: int, prompt: int, output: int, shared: int = 0) -> JobOutline:
    """Items of equal lengths, with one prefix for all."""
    item = ItemClass(count=count, prompt_tokens=prompt, output_tokens=output, shared_tokens=shared)
    return JobOutline(classes=(item,), prefix_tokens=shared)


JOBS = {
    "96 × 512+32": job(96, 512, 32),
    "128 × 512+128": job(128, 512, 128),
    "128 × 512+128, 400 shared": job(128, 512, 128, 400),
    "10,000 × 512+128, 400 shared": job(10_000, 512, 128, 400),
}
ZERO, WAVE, SHARED, NIGHT = JOBS
CASES = (
    *(("rtx4090-24g", "shape:llama-3-70b@Q4_K_M", name) for name in JOBS),
    ("rtx3090", "shape:llama-3-70b@Q4_K_M", NIGHT),
    ("rtx3090-x2", "shape:llama-3-70b@Q4_K_M", NIGHT),
    ("rtx5090-32g", "shape:llama-3-70b@Q4_K_M", NIGHT),
    ("rtx4090-24g", "shape:gpt-oss-120b@MXFP4", NIGHT),
    ("rtx3060-12g", "shape:llama-3-8b@Q8_0", NIGHT),
    ("h100-80g", "shape:llama-3-70b@Q4_K_M", NIGHT),
    ("m3max-128g", "shape:llama-3-70b@Q4_K_M", NIGHT),
    ("cpu-64g", "shape:llama-3-8b@Q4_K_M", NIGHT),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One job on one machine."""

    machine: str
    shape: str
    job: str
    made: JobPlan

    def cells(self) -> Sequence[str]:
        """As the page has it."""
        engine, predicted = self.made.plan.llamacpp, self.made.predicted
        gpus = [device for device in self.made.plan.devices if device.id != CPU]
        weights = sum(device.of("model") for device in gpus)
        cache = sum(device.of("kv") for device in gpus)
        speedup = self.made.speedup
        return (
            self.machine,
            self.shape.removeprefix("shape:"),
            self.job,
            f"{engine.n_seq_max} / {engine.n_ctx:,}" + ("" if engine.kv_unified else " apart"),
            f"{engine.type_k}, {engine.n_ubatch}",
            f"{weights / GIB:.1f} + {cache / GIB:.1f}" if gpus else "–",
            f"{predicted.generated_tok_s:.1f}",
            f"{predicted.items_per_hour:,.0f}",
            "–" if speedup is None else f"{speedup:.1f} ×",
            predicted.bound_by,
        )


HEAD = (
    "machine", "model", "job", "sequences / cells", "cache, n_ubatch", "VRAM: weights + cache, GiB",
    "tok/s generated", "requests per hour", "against one at a time", "bound by",
)  # fmt: skip


def made_for(machine: Machine, model: ModelSpec, asked: JobOutline) -> JobPlan:
    """The plan, without an engine."""
    steps = job_planning(
        machine, model, asked, Workload(), make_budget(machine, None, None), Knobs(),
        default_overheads(machine.gpus), None,
    )  # fmt: skip
    try:
        next(steps)
    except StopIteration as end:
        made: JobPlan = end.value
        return made
    raise AssertionError("without an engine there is nothing to ask")


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines)


# ---- the published anchor


def zero_inference() -> JobPrediction:
    """ZeRO-Inference's own arrangement by our sums: an A6000, all weights of a 4-bit 70B in RAM and
    sent for every pass, the caches in VRAM, 96 sequences of 512 in and 32 out, prompts first."""
    base = load_profile("rtx3090")
    gpu = replace(
        base.gpus[0], name="RTX A6000", total_bytes=Bytes(48 * GIB), bandwidth_bytes_s=768 * 10**9
    )
    machine = replace(base, gpus=(_with_link(gpu),))
    model = shape_model(parse_shape("shape:llama-3-70b@Q4_K_M"))
    settings = EngineSettings(
        n_gpu_layers=model.n_layer + 1,
        layers_per_device=(model.n_layer + 1,),
        overrides=(Override(pattern="weight$", device=CPU),),
        n_ctx=96 * 544, n_seq_max=96, n_batch=96 * 512, n_ubatch=96 * 512, n_outputs_max=96,
        type_k="f16", type_v="f16", flash_attn=True, offload_kqv=True, op_offload=True,
        op_offload_min_batch=1, swa_full=False, kv_unified=False, load_mode="none",
        use_extra_bufts=False, n_threads=16, n_threads_batch=16,
    )  # fmt: skip
    found = forecast(machine, model, settings)
    return simulate(found.traffic, found.rates, settings, JOBS[ZERO])


def _with_link(gpu: Gpu) -> Gpu:
    return replace(gpu, link_bytes_s=25 * 10**9)  # PCIe 4.0 ×16 from page-locked memory


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_predictions")
    parser.add_argument("--write", action="store_true", help="put it into the page")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    rows = [
        Row(
            machine=machine,
            shape=shape,
            job=name,
            made=made_for(load_profile(machine), shape_model(parse_shape(shape)), JOBS[name]),
        )
        for machine, shape, name in CASES
    ]
    anchor = zero_inference()
    text = table(rows)
    print(text)
    print(f"ZeRO-Inference's arrangement: {anchor.generated_tok_s:.1f} tok/s {anchor.costs}")
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    figures = {
        f"{row.machine} · {row.shape} · {row.job}": {
            "requests_per_hour": round(row.made.predicted.items_per_hour, 1),
            "speedup": row.made.speedup and round(row.made.speedup, 2),
        }
        for row in rows
    }
    print(json.dumps({
        "benchmark": "batch_predictions", "rows": figures,
        "zero_inference_tok_s": round(anchor.generated_tok_s, 1), "published_tok_s": 23.44,
        "seconds": round(time.monotonic() - start, 1),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
