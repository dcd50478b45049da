"""Predicted decode rates beside published ones: `python -m benchmarks.predict_published`.

The rows of `data/published.json` were chosen by the rule in it. Each is planned on its machine with
the placement it was measured under; nothing is fitted to a row. Compute buffers are bounds. The
last line is one JSON object.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadmaster.machine.bandwidth import gpu_bandwidth, ram_bandwidth
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.shapes.library import parse_shape, shape_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.patterns import number_regex
from loadmaster.plan.planner import make_plan
from loadmaster.plan.types import CPU, Budget, Knobs, Override, Plan, Workload
from loadmaster.units import GIB, Bytes

DATA = Path(__file__).parent / "data" / "published.json"
_N_CTX = 1024
# Beyond this a row is an outlier and gets an explanation.
OUTLIER_PCT = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published figure and the prediction for it; None: no plan fits."""

    label: str
    measured_tok_s: float
    predicted_tok_s: float | None
    bound_by: str
    n_expert: int
    kind: str  # what its bytes cross: `one GPU`, `several GPUs`, `unified`, `GPU and RAM`
    vram_share: float | None  # of the nominal bandwidth, if all bytes were read at one rate

    @property
    def error_pct(self) -> float:
        """Signed; a plan that does not fit counts as 100 % too low."""
        if self.predicted_tok_s is None:
            return -100.0
        return 100 * (self.predicted_tok_s / self.measured_tok_s - 1)


def machine_of(row: dict[str, Any]) -> Machine:
    """The profile with the parts that the published machine has instead."""
    machine = load_profile(row["profile"])
    machine = replace(machine, gpus=_gpus(machine.gpus[0], row))
    return _with_ram(machine, row["ram"]) if "ram" in row else machine


def _gpus(base: Gpu, row: dict[str, Any]) -> tuple[Gpu, ...]:
    total = row["gpu_gib"] * GIB if "gpu_gib" in row else base.total_bytes
    same = row["gpu"] == base.name
    card = replace(
        base,
        name=row["gpu"],
        total_bytes=Bytes(total),
        free_bytes=Bytes(total),
        bandwidth_bytes_s=base.bandwidth_bytes_s if same else gpu_bandwidth(row["gpu"], total),
    )
    return tuple(replace(card, id=f"gpu:{index}") for index in range(row["n_gpus"]))


def _with_ram(machine: Machine, ram: dict[str, Any]) -> Machine:
    total = ram["gib"] * GIB
    memory = replace(machine.ram, total_bytes=Bytes(total), available_bytes=Bytes(total))
    if "generation" in ram:
        bandwidth = ram_bandwidth(ram["generation"], ram["channels"])
        return replace(machine, ram=replace(memory, bandwidth_bytes_s=bandwidth))
    card = machine.gpus[0]  # unified: one memory, one bandwidth
    limit = min(card.total_bytes, total)
    gpu = replace(card, total_bytes=Bytes(limit), free_bytes=Bytes(limit))
    return replace(
        machine, ram=replace(memory, bandwidth_bytes_s=card.bandwidth_bytes_s), gpus=(gpu,)
    )


def knobs_of(row: dict[str, Any], model: ModelSpec) -> Knobs:
    """The published placement, fixed: the planner may not move matrices around it."""
    on_gpu = row.get("n_gpu_layers", model.n_layer + 1)
    on_cpu = model.n_layer + 1 - on_gpu
    overrides: tuple[Override, ...] = ()
    if on_cpu > 0:
        overrides = (Override(pattern=rf"^blk\.({number_regex(range(on_cpu))})\.", device=CPU),)
    return Knobs(
        n_gpu_layers=on_gpu,
        overrides=overrides,
        n_cpu_moe=row.get("n_cpu_moe"),
        type_k="f16",
        type_v="f16",
    )


def predict_row(row: dict[str, Any]) -> Row:
    """Plan a row on its machine and predict its decode rate at its position."""
    model = shape_model(parse_shape(f"shape:{row['model']}"))
    machine = machine_of(row)
    caps = {gpu.id: gpu.total_bytes for gpu in machine.gpus}
    caps[CPU] = machine.ram.total_bytes
    outcome = make_plan(
        machine,
        model,
        Workload(n_ctx=_N_CTX, prompt_tokens=row["position"]),
        Budget(caps=caps, origin=dict.fromkeys(caps, "all of it")),
        knobs_of(row, model),
        default_overheads(machine.gpus),
        None,
        alternatives=False,
    )
    plan = outcome if isinstance(outcome, Plan) else None
    count = f"{row['n_gpus']} x " if row["n_gpus"] > 1 else ""
    return Row(
        label=f"{count}{row['gpu']} {row['model']}",
        measured_tok_s=row["tok_s"],
        predicted_tok_s=plan.predicted.decode_tok_s if plan else None,
        bound_by=plan.predicted.bound_by if plan else "does not fit",
        n_expert=model.n_expert,
        kind=_kind(row, machine),
        vram_share=_share(row, model, machine),
    )


def _kind(row: dict[str, Any], machine: Machine) -> str:
    if "n_gpu_layers" in row or "n_cpu_moe" in row:
        return "GPU and RAM"
    if machine.gpus[0].unified_memory:
        return "unified"
    return "one GPU" if row["n_gpus"] == 1 else "several GPUs"


def _share(row: dict[str, Any], model: ModelSpec, machine: Machine) -> float | None:
    """What a dense model on GPUs alone was measured to get of the nominal bandwidth."""
    rate = machine.gpus[0].bandwidth_bytes_s
    if _kind(row, machine) == "GPU and RAM" or model.n_expert or not rate:
        return None
    embedding = next(t.size_bytes for t in model.tensors if t.name == "token_embd.weight")
    read = model.weight_bytes - (0 if model.tied_output else embedding)
    return float(row["tok_s"] * read / rate)


def cause(row: Row) -> str:
    """Which term an outlier points at. Named by what a row is, not by its value."""
    if row.predicted_tok_s is None:
        return "bounds: compute buffers that were not sized by the engine leave no room"
    if row.kind == "GPU and RAM" and row.n_expert:
        return (
            "experts in RAM: gathered small matrices and the CPU's arithmetic, which the table "
            "takes at the dense rate of the RAM"
        )
    if row.kind == "GPU and RAM":
        return (
            "RAM: the table takes 80 % of four nominal channels, these rows fit about half (the "
            "CPU's arithmetic or its memory's real clock), and they are of whole answers"
        )
    if row.label.startswith("Apple"):
        return (
            "unpacking: Metal's kernels for 4-bit weights wait for arithmetic on these chips; F16 "
            "on the same ones reaches 69 to 83 % of nominal"
        )
    return (
        "short steps: launches and unpacking take 0.5 to 3 ms a step, for which the table has no "
        "term; F16 and the 70B on such cards reach 74 to 89 % of nominal"
    )


def summary(rows: Iterable[Row]) -> dict[str, float | int]:
    """Median and 90th percentile of the errors without their signs."""
    errors = sorted(abs(row.error_pct) for row in rows)
    p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    return {"n": len(errors), "median": round(statistics.median(errors), 1), "p90": round(p90, 1)}


def predict_all(content: dict[str, Any]) -> list[Row]:
    """Every row of the data file."""
    return [predict_row(row) for row in content["rows"]]


def main() -> int:
    """Print every row, then the groups, then the figures."""
    print(json.dumps(published(), ensure_ascii=False))
    return 0


def published() -> dict[str, object]:
    """Predict every row and print it; the figures."""
    content = json.loads(DATA.read_text("utf-8"))
    rows = predict_all(content)
    for row in rows:
        predicted = "–" if row.predicted_tok_s is None else f"{row.predicted_tok_s:8.1f}"
        share = "" if row.vram_share is None else f"{100 * row.vram_share:4.0f} % of nominal"
        print(
            f"{row.label:48}{row.measured_tok_s:8.1f}{predicted:>9}{row.error_pct:+8.1f} %  "
            f"{row.kind:13} {row.bound_by:15} {share}"
        )
    groups = {kind: summary(r for r in rows if r.kind == kind) for kind in _kinds(rows)}
    for kind, figures in groups.items():
        print(f"{kind}: {figures['n']} rows, median {figures['median']} %, p90 {figures['p90']} %")
    outliers = [row for row in rows if abs(row.error_pct) > OUTLIER_PCT]
    for reason in dict.fromkeys(map(cause, outliers)):
        print(f"outliers, {sum(cause(row) == reason for row in outliers)}: {reason}")
    whole = summary(rows)
    return {
        "published_rows": whole["n"],
        "published_excluded": len(content["excluded"]),
        "published_median_error_pct": whole["median"],
        "published_p90_error_pct": whole["p90"],
        "published_bias_pct": round(statistics.median(r.error_pct for r in rows), 1),
        "published_outliers": {row.label: cause(row) for row in outliers},
        "published_by_kind": groups,
    }


def _kinds(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.kind for row in rows))


if __name__ == "__main__":
    sys.exit(main())
