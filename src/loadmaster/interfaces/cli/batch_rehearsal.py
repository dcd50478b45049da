"""A rehearsal: a few items run first, measured beside predicted, before a night is committed."""

import sys
from datetime import datetime

import click

from loadmaster.interfaces.cli.batch_render import finish_time
from loadmaster.interfaces.cli.batch_watch import RunProgress
from loadmaster.interfaces.cli.progress import duration
from loadmaster.interfaces.cli.render import table
from loadmaster.plan.simulate import JobPrediction
from loadmaster.tasks.batch.opening import OpenJob
from loadmaster.tasks.batch.progress import RunState


def rehearsal_text(
    state: RunState, n_run: int, n_sequences: int, predicted: JobPrediction | None, now: datetime
) -> str:
    """The table of a rehearsal, and what the rest takes at the measured rate."""
    left, left_s = state.counts.left, state.left_s or 0.0
    measured = (_per_hour(n_run, state.run_s), f"{_rate(state):.1f}", duration(left_s))
    promised = ("-", "-", "-")
    if predicted is not None:
        share = left / (left + n_run)
        promised = (
            f"{predicted.items_per_hour:.0f}",
            f"{predicted.generated_tok_s:.1f}",
            duration(predicted.seconds * share),
        )
    names = ("requests per hour", "tok/s generated", f"the other {left} items")
    rows = [("", "measured", "predicted"), *zip(names, measured, promised, strict=True)]
    text = table(rows, right=(1, 2))
    if n_run < n_sequences:
        text += f"\n{n_run} items kept {n_run} of {n_sequences} sequences busy: more go faster"
    return f"{text}\nat the measured rate it ends at {finish_time(left_s, now)}"


def _per_hour(count: int, seconds: float) -> str:
    return f"{count * 3600 / seconds:.0f}" if seconds else "-"


def _rate(state: RunState) -> float:
    return state.generated_tokens / state.run_s if state.run_s else 0.0


def goes_on(state: RunState, n_run: int, job: OpenJob, progress: RunProgress, *, yes: bool) -> bool:
    """Show the rehearsal, and ask where there is someone to ask."""
    progress.finish()
    n_sequences = job.model.n_sequences
    progress.say(rehearsal_text(state, n_run, n_sequences, job.predicted, datetime.now()))
    if not state.counts.left or yes:
        return True
    if not sys.stdin.isatty():
        progress.say("no terminal to ask on: `--yes` goes on after a rehearsal")
        return False
    return click.confirm("run the rest?", default=True, err=True)
