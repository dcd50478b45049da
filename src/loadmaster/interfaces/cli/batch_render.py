"""Jobs as text and as JSON: tables, progress lines, finish times."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from loadmaster.interfaces.cli.progress import bar_line, duration
from loadmaster.interfaces.cli.render import table
from loadmaster.jobs.types import Counts, Job
from loadmaster.tasks.batch.policy import Window
from loadmaster.tasks.batch.progress import RunState

_STATE_CHARS = 40
_BARS = (30, 15, 5)  # columns of a bar


def state_line(
    state: RunState, now: datetime, window: Window | None = None, columns: int | None = None
) -> str:
    """`items ━━━── 45 %  450 done, 2 failed, 548 left  812 tok/s  2 h left, until 03:12`."""
    if state.waiting:
        return run_line(state.counts, state.waiting, columns=columns)
    rate = f"{state.tok_s:.0f} tok/s"
    if state.left_s is None or not state.counts.left:
        return run_line(state.counts, rate, columns=columns)
    ends = f"until {finish_time(state.left_s, now, window)}"
    longer = f"{duration(state.left_s)} left, {ends}"
    return run_line(state.counts, rate, (longer, ends), columns=columns)


def run_line(
    counts: Counts, fact: str, ends: Sequence[str] = (), *, columns: int | None = None
) -> str:
    """A bar, counts, a fact and the first of `ends`; where `columns` are few, the bar gets shorter
    and then another end takes its place."""
    lines = [
        "  ".join(filter(None, (_bar(counts, width), fact, end)))
        for end in ends or ("",)
        for width in _BARS
    ]
    fitting = (line for line in lines if columns is None or len(line) < columns)
    return next(fitting, lines[-1])


def _bar(counts: Counts, width: int) -> str:
    fraction = 1.0 if not counts.total else (counts.total - counts.left) / counts.total
    return bar_line("items", fraction, counts_text(counts), 0.0, width)


def finish_time(left_s: float, now: datetime, window: Window | None = None) -> str:
    """`03:12`, or with the day when that is another; nothing runs outside the window."""
    done = window.after(now, left_s) if window else now + timedelta(seconds=left_s)
    if done - now < timedelta(days=1):
        return f"{done:%H:%M}"
    return f"{done:%a %H:%M}" if done - now < timedelta(days=6) else f"{done:%a %d %b %H:%M}"


def counts_text(counts: Counts) -> str:
    """`450 done, 2 failed, 548 left`."""
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.done} done{failed}, {counts.left} left"


def jobs_table(rows: list[tuple[Job, str, Counts]]) -> str:
    """One line for each job."""
    lines: list[tuple[str, ...]] = [("ID", "MODEL", "STATE", "DONE", "FAILED", "LEFT", "CREATED")]
    for job, state, counts in rows:
        created = datetime.fromtimestamp(job.created_s)
        lines.append(
            (
                job.job_id, job.model, _cut(state), str(counts.done), str(counts.failed),
                str(counts.left), f"{created:%Y-%m-%d %H:%M}",
            )
        )  # fmt: skip
    return table(lines, right=(3, 4, 5))


def _cut(state: str) -> str:
    """A state with the beginning of its reason; `status` has all of it."""
    return state if len(state) <= _STATE_CHARS else f"{state[: _STATE_CHARS - 1]}…"


def job_text(job: Job, state: str, counts: Counts, log: Path) -> str:
    """Everything about one job; `log` has what it said in the background, if it ran there."""
    rows = [
        ("job", job.job_id),
        ("state", state),
        ("model", job.model),
        ("input", str(job.input_path or "-")),
        ("output", str(job.output_path or f"`loadmaster batch results {job.job_id}`")),
        ("items", counts_text(counts)),
        ("prompt tokens", f"{counts.prompt_tokens} ({counts.cached_tokens} of them shared)"),
        ("generated", f"{counts.generated_tokens} tokens"),
        ("ran for", duration(job.run_s)),
    ]
    if log.is_file():
        rows.append(("log", str(log)))
    return table(rows)


def job_json(job: Job, state: str, counts: Counts) -> dict[str, object]:
    """The same for programs."""
    return {
        "schema_version": 1,
        "job_id": job.job_id,
        "model": job.model,
        "state": job.state,
        "shown_state": state,
        "reason": job.reason,
        "input_path": None if job.input_path is None else str(job.input_path),
        "output_path": None if job.output_path is None else str(job.output_path),
        "error_path": None if job.error_path is None else str(job.error_path),
        "created_s": job.created_s,
        "started_s": job.started_s,
        "ended_s": job.ended_s,
        "run_s": job.run_s,
        "counts": {
            "total": counts.total,
            "done": counts.done,
            "failed": counts.failed,
            "left": counts.left,
        },
        "usage": {
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "generated_tokens": counts.generated_tokens,
        },
    }
