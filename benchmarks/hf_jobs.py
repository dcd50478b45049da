"""How long jobs on safetensors models take, beside what `batch plan` predicted.

    python -m benchmarks.hf_jobs [--jobs N]

Measures torch on this machine as `doctor --measure` does, then runs small jobs under the plan that
`batch run` would take: the demo model and a random Llama of 290 million weights in BF16 and NF4.
Nothing else may run meanwhile. The last line is one JSON object; `time_error_pct` is the predicted
time less the measured one, in per cent of it.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.hf_models import write_model
from loadmaster.plan.types import Knobs, Quantize
from loadmaster.settings import HOME
from loadmaster.tasks import doctor
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.jobs import Run
from loadmaster.tasks.batch.opening import identify, open_for_job
from loadmaster.tasks.batch.policy import BatchSettings
from loadmaster.tasks.batch.progress import Unwatched
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.progress import Silent

AT_MOST_PCT = 25.0
DEMO = Path(__file__).parents[1] / "tests" / "data" / "demo"
LARGER = {"hidden_size": 1024, "num_hidden_layers": 20, "vocab_size": 32_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model as it is loaded, and requests of equal lengths."""

    model: str  # `demo` or `larger`
    quantize: Quantize
    n_items: int
    prompt: int
    output: int
    n_sequences: int | None = None


CASES = (
    Case(model="demo", quantize="none", n_items=64, prompt=64, output=32),
    Case(model="larger", quantize="none", n_items=8, prompt=64, output=16),
    Case(model="larger", quantize="none", n_items=2, prompt=128, output=12, n_sequences=1),
    Case(model="demo", quantize="nf4", n_items=32, prompt=64, output=32),
    Case(model="larger", quantize="nf4", n_items=8, prompt=64, output=8),
)


def lines(case: Case) -> str:
    """A file of completions of prompts that share nothing, greedy."""
    rows = []
    for index in range(case.n_items):
        prompt = [(7 * i * i + 31 * index + i) % 200 + 3 for i in range(case.prompt)]
        body = {"model": "m", "prompt": prompt, "max_tokens": case.output, "temperature": 0}
        line = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
        rows.append(json.dumps(line))
    return "\n".join(rows) + "\n"


def run_case(case: Case, model: Path, folder: Path) -> dict[str, object]:
    """Plan, open and run one job."""
    file = folder / "in.jsonl"
    file.write_text(lines(case))
    settings, names = identify(
        BatchSettings(
            model=str(model),
            served_names=("m",),
            n_sequences=case.n_sequences,
            plan=PlanOptions(knobs=Knobs(quantize=case.quantize)),
        )
    )
    shelf = batch_jobs.open_shelf()
    job_id = batch_jobs.submit(
        shelf, file, settings, names, output_path=folder / "out.jsonl", error_path=None
    )
    with Run(shelf, job_id) as work:
        job = open_for_job(work.settings, work.store, Silent())
        with closing(job.model.opened):
            executor = work.attach(job.model, Unwatched())
            started = time.perf_counter()
            reason = executor.run()
            seconds = time.perf_counter() - started
            generated = executor.state().generated_tokens
        work.end(reason)
    assert job.predicted is not None, "this machine was measured"
    return {
        "model": case.model,
        "quantize": case.quantize,
        "job": f"{case.n_items} × {case.prompt}+{case.output}",
        "sequences": job.model.n_sequences,
        "tokens": [generated, case.n_items * case.output],
        "predicted_s": round(job.predicted.seconds, 2),
        "measured_s": round(seconds, 2),
        "time_error_pct": round(100 * (job.predicted.seconds - seconds) / seconds, 1),
        "bound_by": job.predicted.bound_by,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the cases; 1 when a prediction is off by more than its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(CASES), help="the first so many cases")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ[HOME.name] = str(home / "home")
        models = {"demo": DEMO, "larger": write_model(home / "larger", "llama", **LARGER)}
        doctor.measure_python(lambda what: print("measuring", what, flush=True))
        for number, case in enumerate(CASES[: options.jobs]):
            folder = home / str(number)
            folder.mkdir()
            rows.append(run_case(case, models[case.model], folder))
            print(rows[-1], flush=True)
    errors = [float(str(row["time_error_pct"])) for row in rows]
    failed = [row["job"] for row, error in zip(rows, errors, strict=True) if _is_off(error)]
    versions = {one: metadata.version(one) for one in ("torch", "transformers", "bitsandbytes")}
    print(json.dumps({
        "benchmark": "hf_jobs", "time_error_pct": max(errors, key=abs), "rows": rows,
        "machine": platform.processor() or platform.machine(), **versions, "failed": failed,
    }))  # fmt: skip
    return 1 if failed else 0


def _is_off(error_pct: float) -> bool:
    return abs(error_pct) > AT_MOST_PCT


if __name__ == "__main__":
    raise SystemExit(main())
