"""A rehearsal: a few items run first, measured beside predicted, before a night is committed."""

import sys
from contextlib import suppress
from datetime import datetime

import click

from loadmaster.interfaces.cli.batch_render import finish_time
from loadmaster.interfaces.cli.batch_watch import RunProgress
from loadmaster.interfaces.cli.progress import duration
from loadmaster.interfaces.cli.render import table
from loadmaster.plan.simulate import JobPrediction
from loadmaster.tasks.batch.opening import OpenJob
from loadmaster.tasks.batch.policy import Window
from loadmaster.tasks.batch.progress import RunState


def rehearsal_text(
    state: RunState,
    n_run: int,
    n_sequences: int,
    predicted: JobPrediction | None,
    now: datetime,
    window: Window | None = None,
) -> str:
    """The table of a rehearsal, and what the rest takes at the measured rate."""
    left, left_s = state.counts.left, state.left_s or 0.0
    measured = (_per_hour(n_run, state.run_s), f"{_rate(state):.1f}", duration(left_s))
    promised = ("-", "-", "-")
    if predicted is not None:
        share = left / (left + n_run)
        promised = (
            f"{predicted.items_per_hour:.0f}",
            f"{_promised_rate(predicted):.1f}",
            duration(predicted.seconds * share),
        )
    made = "tok/s generated" if state.generated_tokens else "tok/s embedded"
    names = ("requests per hour", made, f"the other {left} items")
    rows = [("", "measured", "predicted"), *zip(names, measured, promised, strict=True)]
    text = table(rows, right=(1, 2))
    if n_run < n_sequences:
        text += f"\n{n_run} items kept {n_run} of {n_sequences} sequences busy: more go faster"
    return f"{text}\nat the measured rate it ends at {finish_time(left_s, now, window)}"


def _per_hour(count: int, seconds: float) -> str:
    return f"{count * 3600 / seconds:.0f}" if seconds else "-"


def _rate(state: RunState) -> float:
    tokens = state.generated_tokens or state.prompt_tokens
    return tokens / state.run_s if state.run_s else 0.0


def _promised_rate(predicted: JobPrediction) -> float:
    tokens = predicted.generated_tokens or predicted.prefilled_tokens
    return tokens / predicted.seconds if predicted.seconds else 0.0


def goes_on(state: RunState, n_run: int, job: OpenJob, progress: RunProgress, *, yes: bool) -> bool:
    """Show the rehearsal, and ask where there is someone to ask."""
    progress.finish()
    n_sequences = job.model.n_sequences
    now, window = datetime.now(), progress.window
    progress.say(rehearsal_text(state, n_run, n_sequences, job.predicted, now, window))
    if not state.counts.left or yes:
        return True
    if not sys.stdin.isatty():
        progress.say("no terminal to ask on: `--yes` goes on after a rehearsal")
        return False
    with progress.asking(), suppress(click.Abort):  # Ctrl-C and Ctrl-D are a no
        return click.confirm("run the rest?", default=True, err=True)
    return False
