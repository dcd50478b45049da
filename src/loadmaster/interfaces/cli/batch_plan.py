"""`loadmaster batch plan`: when a file of requests would be done, and under which plan."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.options import (
    common_options,
    machine_option,
    plan_options,
    read_plan_options,
    sequence_options,
)
from loadmaster.interfaces.cli.progress import duration
from loadmaster.plan.codec import plan_to_json
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.simulate import JobPrediction
from loadmaster.plan.types import AnySettings, EngineSettings, TransformersSettings
from loadmaster.schema import to_json
from loadmaster.tasks.batch.outline import FileOutline
from loadmaster.tasks.batch.planning import FilePlan, plan_file
from loadmaster.tasks.planning import PlanOptions

_SHOWN_CONSIDERED = 5


@click.command("plan")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-m", "--model", required=True, metavar="MODEL", help="As for `loadmaster plan`.")
@plan_options
@machine_option
@sequence_options(
    sequences="Requests that run at the same time; default: as many as end the job soonest.",
    cells="Tokens of all sequences together; default: what they need at their ends.",
)
@click.option(
    "--output-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    metavar="X",
    help="Answers take this share of the tokens they may take; default: 1.",
)
@common_options
def plan(
    path: Path, model: str, n_sequences: int | None, n_cells: int | None, output_share: float,
    as_json: bool, quiet: bool, debug: bool, **given: Any,
) -> None:  # fmt: skip
    """Show how long a file of requests takes, without running it.

    Chooses the number of sequences, their cells, the types of the cache, n_ubatch and the placement
    so that the last request ends soonest inside the budget. MODEL may be a model that is not here,
    or a shape (`shape:llama-3-70b@Q4_K_M`); then four characters count as a token. Of a folder or a
    repository with safetensors --quantize says what its weights become.

    Exit code 3: nothing fits.
    """
    options = _options(read_plan_options(given), n_sequences, n_cells)
    found = plan_file(path, model, options, output_share=output_share)
    now = datetime.now().astimezone()
    if as_json:
        click.echo(json.dumps(file_plan_json(found, now), ensure_ascii=False, indent=1))
        return
    click.echo(file_plan_text(found, now))


def _options(options: PlanOptions, n_sequences: int | None, n_cells: int | None) -> PlanOptions:
    return replace(
        options,
        workload=replace(options.workload, kind="batch", n_cells=n_cells),
        knobs=replace(options.knobs, n_seq_max=n_sequences),
    )


# ---- text


def file_plan_text(found: FilePlan, now: datetime) -> str:
    """Everything `batch plan` prints."""
    made = found.job
    blocks = [
        _file_line(found.file),
        render.headline(made.plan),
        render.ledger(made.plan.devices),
        _settings_text(made),
        _prediction_text(made, now),
        _levers_text(made),
        _considered_text(made),
        render.notes_text(found.notes),
    ]
    return "\n\n".join(block for block in blocks if block)


def _file_line(file: FileOutline) -> str:
    job = file.job
    if not job.output_tokens:
        return f"{file.path.name}: {job.n_items} inputs, {job.prompt_tokens} tokens to embed"
    return (
        f"{file.path.name}: {job.n_items} requests, {job.prompt_tokens} prompt tokens of which "
        f"{job.distinct_tokens} are distinct, {job.output_tokens} to generate"
    )


def _settings_text(made: JobPlan) -> str:
    engine = made.plan.engine
    rows = [
        ("sequences", str(engine.n_seq_max), "requests that run at the same time"),
        ("cells", str(engine.n_ctx), f"{engine.type_k}/{engine.type_v}, {_arrangement(engine)}"),
        ("n_ubatch", str(engine.n_ubatch), "tokens of a step"),
    ]
    on_gpu = any(device.id != "cpu" for device in made.plan.devices)
    if on_gpu and isinstance(engine, EngineSettings):
        rows.append(("op-offload", "on" if engine.op_offload else "off", _streams(engine)))
    return "settings\n" + render.table(rows, right={1})


def _streams(engine: EngineSettings) -> str:
    if not engine.op_offload:
        return "weights in RAM are multiplied there"
    return f"weights in RAM go to the GPU from {engine.op_offload_min_batch} tokens a step on"


def _arrangement(engine: AnySettings) -> str:
    if engine.kv_unified or engine.n_seq_max == 1:
        return "of all sequences together"
    each = engine.n_ctx // engine.n_seq_max
    if isinstance(engine, EngineSettings):
        return f"{each} for each sequence, which share none"
    return f"{each} for each sequence; what prompts share is copied, not fed again"


def _prediction_text(made: JobPlan, now: datetime) -> str:
    predicted = made.predicted
    if predicted.basis == "unknown":
        return f"predicted time: {render.UNMEASURED}"
    basis = "measured" if predicted.basis == "measured" else "a table of"
    ends = now + timedelta(seconds=predicted.seconds)
    lines = [
        f"predicted: {duration(predicted.seconds)}, so begun now it ends {ends:%a %d %b %H:%M}",
        f"  {_rates_text(predicted)}",
        f"  bound by {_shares(predicted)}; from {basis} bandwidths",
    ]
    if made.alone is not None and made.speedup is not None and made.speedup > 1:
        lines.append(
            f"  one request at a time: {duration(made.alone.seconds)}, "
            f"{made.speedup:.1f} times as long"
        )
    return "\n".join(lines)


def _rates_text(predicted: JobPrediction) -> str:
    if not predicted.generated_tokens:
        rate = predicted.prefilled_tokens / predicted.seconds if predicted.seconds else 0.0
        return f"{predicted.items_per_hour:.0f} inputs per hour, {rate:.1f} tok/s"
    return (
        f"{predicted.items_per_hour:.0f} requests per hour, "
        f"{predicted.generated_tok_s:.1f} tok/s generated; "
        f"{predicted.prefilled_tokens} tokens to prefill"
    )


def _shares(predicted: JobPrediction) -> str:
    """`link 41 %, attention 30 %`."""
    causes = sorted(predicted.costs.items(), key=lambda pair: -pair[1])
    return ", ".join(
        f"{cause} {100 * seconds / predicted.seconds:.0f} %"
        for cause, seconds in causes[:3]
        if seconds >= 0.05 * predicted.seconds
    )


def _levers_text(made: JobPlan) -> str:
    if not made.levers:
        return ""
    rows = [(lever.what, duration(lever.seconds)) for lever in made.levers]
    return "what would end it sooner\n" + render.table(rows, right={1})


def _considered_text(made: JobPlan) -> str:
    if made.predicted.basis == "unknown" or len(made.considered) < 2:
        return ""
    slots = isinstance(made.plan.engine, TransformersSettings)  # always one for each
    rows = [("sequences", "cells", "cache", "n_ubatch", "estimated", "")]
    rows += [
        (
            str(it.n_seq_max),
            str(it.n_ctx),
            it.type_k,
            str(it.n_ubatch),
            duration(it.seconds),
            "" if it.kv_unified or slots or it.n_seq_max == 1 else "a cache for each",
        )
        for it in made.considered[:_SHOWN_CONSIDERED]
    ]
    title = "considered" if slots else "considered, before the engine was asked for sizes"
    return f"{title}\n" + render.table(rows, right={0, 1, 3, 4})


# ---- JSON


def file_plan_json(found: FilePlan, now: datetime) -> Mapping[str, Any]:
    """The plan as `plan --json` has it, and the job beside it."""
    made, file = found.job, found.file
    known = made.predicted.basis != "unknown"
    return {
        **plan_to_json(replace(made.plan, notes=found.notes)),
        "job": {
            "file": str(file.path),
            "lines": file.n_lines,
            "lines_tokenized": file.n_sampled,
            "bad_lines": file.n_bad,
            "lengths": file.job.lengths,
            "embeddings": not made.job.output_tokens,
            "requests": made.job.n_items,
            "prompt_tokens": made.job.prompt_tokens,
            "distinct_tokens": made.job.distinct_tokens,
            "output_tokens": made.job.output_tokens,
            "longest": made.job.longest,
            "predicted": _predicted_json(made.predicted) if known else None,
            "ends": (now + timedelta(seconds=made.predicted.seconds)).isoformat()
            if known
            else None,
            "one_at_a_time": _predicted_json(made.alone) if known and made.alone else None,
            "speedup": made.speedup if known else None,
            "levers": [to_json(lever) for lever in made.levers],
            "considered": [to_json(it) for it in made.considered],
        },
    }


def _predicted_json(predicted: JobPrediction) -> Mapping[str, Any]:
    return {
        "seconds": predicted.seconds,
        "requests_per_hour": predicted.items_per_hour,
        "generated_tok_s": predicted.generated_tok_s,
        "prefilled_tokens": predicted.prefilled_tokens,
        "steps": predicted.n_steps,
        "peak_cells": predicted.peak_cells,
        "preempted": predicted.n_preempted,
        "bound_by": predicted.bound_by,
        "seconds_by_cause": dict(predicted.costs),
        "basis": predicted.basis,
    }
