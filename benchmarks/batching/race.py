"""A job run by both sides at one number of cells: who ended it, what it took, what was counted."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.batching.jobs import Job
from benchmarks.batching.llama_server import Options, run_peer
from benchmarks.batching.ours import Setup, opened, over_budget, plan_for, run_ours
from benchmarks.batching.outcome import Outcome
from benchmarks.peers import build_peers
from loadmaster.engine.types import EngineBuild
from loadmaster.machine.types import Machine

BEHIND = 1.15  # of the best peer's time: a peer is stopped when it cannot end by then

Figures = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all parts need."""

    build: EngineBuild
    machine: Machine
    n_threads: int
    rounds: int
    slots: Sequence[int]
    n_requests: int | None
    ample: bool


@dataclass(slots=True, kw_only=True)
class Race:
    """The runs of one job at one number of cells."""

    job: Job
    setup: Setup
    ours: list[Outcome] = field(default_factory=list)
    peers: dict[Options, list[Outcome]] = field(default_factory=dict)
    over_budget: int = 0

    @property
    def ours_s(self) -> float:
        return statistics.median(run.seconds for run in self.ours)

    @property
    def predicted_s(self) -> float:
        return self.setup.predicted_s or 0.0

    def peer_s(self, options: Options) -> float | None:
        """The median time of a peer that answered every request."""
        runs = self.peers.get(options, [])
        if not runs or any(run.cut or not run.whole for run in runs):
            return None
        return statistics.median(run.seconds for run in runs)

    def best(self) -> Options | None:
        """The fastest peer that answered every request."""
        timed = [options for options in self.peers if self.peer_s(options) is not None]
        return min(timed, key=lambda options: self.peer_s(options) or 0.0, default=None)

    def speedup(self, options: Options | None) -> float | None:
        seconds = None if options is None else self.peer_s(options)
        return None if seconds is None else round(seconds / self.ours_s, 3)


def run_race(bench: Bench, path: Path, job: Job, peers: Sequence[Options]) -> Race:
    """Ours and every peer once, then ours and the fastest again."""
    headline(job)
    setup, considered = plan_for(bench.build, bench.machine, path, job, bench.n_threads)
    print("\n".join(considered), flush=True)
    race = Race(job=job, setup=setup)
    run_once(race)
    tool = build_peers(names=["llama-server"])["llama-server"]
    for options in peers:
        best = race.best()
        limit = None if best is None else BEHIND * (race.peer_s(best) or 0.0)
        note(race.peers.setdefault(options, []),
              run_peer(tool, path, job, options, bench.n_threads, limit))  # fmt: skip
    for _ in range(bench.rounds - 1):
        run_once(race)
        best = race.best()
        if best is not None:
            note(race.peers[best], run_peer(tool, path, job, best, bench.n_threads, None))
    return race


def headline(job: Job) -> None:
    """Say what is to be done."""
    print(
        f"{job.name}: {len(job.items)} requests, {job.prompt_tokens} prompt tokens "
        f"({job.distinct_tokens} distinct), {job.output_tokens} out, {job.n_ctx} cells",
        flush=True,
    )


def run_once(race: Race) -> None:
    """Ours, in a worker of its own; its memory against the plan."""
    with opened(race.setup) as engine:
        note(race.ours, run_ours(engine, race.setup, race.job))
        race.over_budget += over_budget(race.setup, engine.memory())


def note(runs: list[Outcome], outcome: Outcome) -> None:
    """Keep a run, and print it."""
    runs.append(outcome)
    print(outcome.line(), flush=True)


def counts(race: Race) -> Figures:
    """What was done, before how fast."""
    best = race.best()
    peer = race.peers[best][0] if best else None
    return {
        "requests": len(race.job.items),
        "completed": race.ours[0].completed,
        "prefilled_tokens": race.ours[0].prefilled,
        "distinct_tokens": race.job.distinct_tokens,
        "prefilled_tokens_best": peer.prefilled if peer else None,
        "completed_by_peer": {o.name: runs[0].completed for o, runs in race.peers.items()},
        "over_budget": race.over_budget,
    }


def speeds(race: Race) -> Figures:
    """Seconds, and the ratios that are claimed."""
    best = race.best()
    return {
        "seconds_by_peer": {
            o.name: f">{runs[0].seconds:.0f}" if runs[0].cut else round(runs[0].seconds, 2)
            for o, runs in race.peers.items()
        },
        "best_peer": best.name if best else None,
        "speedup_vs_best": race.speedup(best),
        "speedup_vs_default": race.speedup(Options()),
        **predicted(race),
    }


def predicted(race: Race) -> Figures:
    """The plan's time beside the measured one."""
    return {
        "seconds_ours": round(race.ours_s, 2),
        "predicted_s": round(race.predicted_s, 2),
        "time_error_pct": round(100 * abs(race.predicted_s / race.ours_s - 1), 1),
    }
