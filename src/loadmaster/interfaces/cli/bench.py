"""`loadmaster bench`: measured speed beside predicted, under the plan that `run` would use."""

import json
from typing import Any

import click

from loadmaster.errors import UsageError
from loadmaster.interfaces.cli.options import common_options, plan_options, read_plan_options
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.interfaces.cli.render import UNMEASURED, headline, table
from loadmaster.plan.codec import plan_to_json
from loadmaster.tasks.bench import (
    DEFAULT_POSITIONS,
    DEFAULT_SEQUENCES,
    Bench,
    BenchRow,
    bench_model,
)


@click.command("bench")
@click.argument("model")
@click.option(
    "--positions",
    metavar="N,N…",
    default=",".join(map(str, DEFAULT_POSITIONS)),
    show_default=True,
    help="Cells in use when decode is timed.",
)
@click.option(
    "--sequences",
    metavar="N,N…",
    default=",".join(map(str, DEFAULT_SEQUENCES)),
    show_default=True,
    help="Sequences that decode together.",
)
@plan_options
@common_options
def command(
    model: str,
    positions: str,
    sequences: str,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Measure prefill, decode and many sequences under the plan, beside what was predicted.

    MODEL is a GGUF file, a folder of safetensors, or `demo`.
    Predictions rest on `loadmaster doctor --measure` where it was run, else on tables.
    """
    progress = TerminalProgress(quiet=quiet or as_json)
    bench = bench_model(
        model,
        read_plan_options(given),
        progress,
        positions=_numbers(positions, "--positions"),
        sequences=_numbers(sequences, "--sequences"),
    )
    click.echo(json.dumps(to_json(bench), ensure_ascii=False) if as_json else text(bench))


def text(bench: Bench) -> str:
    """The plan's headline and one line for each figure."""
    rows: list[tuple[str, ...]] = [("phase", "sequences", "position", "measured", "predicted", "")]
    rows += [_line(row) for row in bench.rows]
    basis = bench.plan.predicted.basis
    resting = (
        f"predicted from {basis} figures" if basis != "unknown" else f"predicted: {UNMEASURED}"
    )
    foot = f"tok/s of all sequences together; {resting}"
    return "\n".join([headline(bench.plan), "", table(rows, right={1, 2, 3, 4, 5}), "", foot])


def _line(row: BenchRow) -> tuple[str, ...]:
    predicted, error = row.predicted_tok_s, row.error_pct
    return (
        row.phase,
        str(row.n_sequences),
        str(row.depth),
        f"{row.measured_tok_s:.1f}",
        "–" if predicted is None else f"{predicted:.1f}",
        "" if error is None else f"{error:+.0f} %",
    )


def to_json(bench: Bench) -> dict[str, object]:
    """One object: the figures and the plan."""
    return {
        "schema_version": 1,
        "rows": [
            {
                "phase": row.phase,
                "n_sequences": row.n_sequences,
                "position": row.depth,
                "measured_tok_s": row.measured_tok_s,
                "predicted_tok_s": row.predicted_tok_s,
                "error_pct": row.error_pct,
            }
            for row in bench.rows
        ],
        "plan": plan_to_json(bench.plan),
    }


def _numbers(value: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise UsageError(f"`{value}` is not a list of numbers", hint=f"write `{option} 0,512`")
    return tuple(map(int, parts))
