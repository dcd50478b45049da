"""The server's speed: beside its own engine without HTTP, and beside `llama-server`.

    python -m benchmarks.serve [fake|engine|peer] [--model demo|1b] [--rounds N] [--peer SHAPE]

    fake    the fake backend at a set token rate, which leaves the processors free: what HTTP adds
            to the time of the first text and between texts of a chat, alone (`_1`), arriving while
            a dozen others are answered (`_16`), and of 16 that arrive in the same moment (`_burst`)
    engine  tokens per second of the server over those of the same plan driven in-process, 1 and 16
            streams of chat, the demo model and a random 1B; rounds alternate, the figure is the
            median of the ratios within a round, and `ratio_vs_scheduler` the least of all
    peer    16 clients on the 1B: prompts of mixed lengths, then with 512 shared tokens before each.
            `llama-server` has the same file, threads and cells in all, in several shapes, of which
            the fastest runs again and is compared with; every round is the first one of a server.

The client keeps bytes and times and parses nothing meanwhile; its own processor time is reported
(`client_cpu_share`, of one processor), as is the server process's for each token. Without a part,
all of them run. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.decode import model_file
from benchmarks.peers import build_peers
from benchmarks.streaming.ours import CHAT, COMPLETION, Setting, bare, run_bare, serving
from benchmarks.streaming.peer import SHAPES, peer
from benchmarks.streaming.times import Run, median, percentile
from benchmarks.streaming.work import SEED, Asked, Texts, distinct_tokens
from loadmaster.engine.builds import find_build

Figures = dict[str, object]
STREAMS = (1, 16)
N_CTX = 1024  # of each sequence
# A token takes 50 ms, longer than texts are held together: each is an event of its own.
FAKE = {"tok_s": 20, "prefill_tok_s": 20_000}
FAKE_OUT = 16
ARRIVAL_S, ARRIVALS = 0.07, 60  # between two requests; how many in a round
ENGINE_OUT = {"demo": {1: 900, 16: 600}, "1b": {1: 64, 16: 32}}
ENGINE_PROMPT = {"demo": 64, "1b": 16}
ROUNDS = {"fake": 6, "engine": 5, "peer": 2}
PREFIX_TOKENS = 512
MIXED_PROMPT, SHARED_PROMPT, MIXED_OUT = (16, 256), (16, 96), (16, 64)

AT_LEAST = {"ratio_vs_scheduler": 0.97, "mixed_throughput_ratio": 1.0,
            "shared_throughput_ratio": 1.2}  # fmt: skip
AT_MOST = {"added_ttft_p50_ms": 3.0, "added_inter_token_p99_ms": 2.0,
           "mixed_prefilled_tokens_ratio": 1.05, "shared_prefilled_tokens_ratio": 1.05,
           "mixed_ttft_p95_ratio": 1.0, "shared_ttft_p95_ratio": 1.0}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the user chose."""

    models: Sequence[str]
    rounds: int | None
    n_threads: int
    shapes: Sequence[str]

    def n_rounds(self, part: str) -> int:
        return self.rounds or ROUNDS[part]

    def setting(
        self, path: Path, n_parallel: int, fake: dict[str, object] | None = None
    ) -> Setting:
        return Setting(
            path=path, n_parallel=n_parallel, n_ctx=N_CTX, n_threads=self.n_threads, fake=fake
        )


def note(name: str, run: Run) -> Run:
    """Print a run."""
    n = run.n_generated
    print(
        f"{name:28} {run.seconds:7.2f} s  {run.tok_s:8.1f} tok/s  generated {n:6}  prefilled "
        f"{run.n_prefilled:6}  ttft p50 {1e3 * median(run.ttfts_s):8.1f} p95 "
        f"{1e3 * percentile(run.ttfts_s, 0.95):8.1f} ms  per token: server "
        f"{1e6 * run.parent_cpu_s / n:7.1f}, client {1e6 * run.client_cpu_s / n:6.1f} us",
        flush=True,
    )
    return run


# -- the fake backend


def fake(bench: Bench) -> Figures:
    """What HTTP adds where the engine leaves the processors free."""
    path = model_file("demo")
    setting, texts = bench.setting(path, max(STREAMS), dict(FAKE)), Texts(path)
    rounds = bench.n_rounds("fake")
    figures: Figures = {}
    with bare(setting) as opened, serving(setting) as server:
        print(server.command)

        def both(name: str, n: int, delays_s: Sequence[float] = ()) -> dict[str, Run]:
            asked = [Asked(text=texts.text(40), n_out=FAKE_OUT) for _ in range(n)]
            return {
                "server": note(f"{name} server", server.run(CHAT, asked, delays_s)),
                "bare": note(f"{name} bare", run_bare(opened, CHAT, asked, delays_s)),
            }

        both("warm-up", max(STREAMS))
        cases = {
            "1": [both("one", 1) for _ in range(4 * rounds)],
            "16": [both("arriving", len(delays), delays) for delays in [_arrivals(rounds)]],
            "burst": [both("burst", max(STREAMS)) for _ in range(rounds)],
        }
    for name, runs in cases.items():
        figures |= {f"{key}_{name}": value for key, value in _added(runs).items()}
    for key in ("added_ttft_p50_ms", "added_inter_token_p99_ms"):
        figures[key] = max(float(str(figures[f"{key}_{n}"])) for n in STREAMS)
    return figures


def _arrivals(rounds: int) -> list[float]:
    """Moments so far apart that about 12 answers are under way: never more than may run."""
    dice = random.Random(SEED)
    return [ARRIVAL_S * (index + dice.random()) for index in range(ARRIVALS * rounds)]


def _added(rounds: Sequence[dict[str, Run]]) -> Figures:
    """What the server adds: the difference of the medians, and of the percentiles."""
    ttfts, gaps = dict[str, list[float]](), dict[str, list[float]]()
    for who in ("server", "bare"):
        streams = [stream for runs in rounds for stream in runs[who].streams]
        ttfts[who] = [stream.ttft_s for stream in streams]
        gaps[who] = [gap for stream in streams for gap in stream.gaps_s]
    return {
        f"added_{name}_p{100 * share:.0f}_ms": round(
            1e3 * (percentile(values["server"], share) - percentile(values["bare"], share)), 3
        )
        for name, values in (("ttft", ttfts), ("inter_token", gaps))
        for share in (0.5, 0.95, 0.99)
    }


# -- the engine


def engine(bench: Bench) -> Figures:
    """The server over the same plan in this process."""
    figures: Figures = {}
    ratios: list[float] = []
    for name in bench.models:
        path = model_file(name)
        setting, texts = bench.setting(path, max(STREAMS)), Texts(path)
        with bare(setting) as opened, serving(setting) as server:
            print(server.command)
            for n in STREAMS:
                by_server, by_engine = partial(server.run, CHAT), partial(run_bare, opened, CHAT)
                found = _beside(bench, name, n, texts, by_server, by_engine)
                figures |= {f"{name}_{key}_{n}": value for key, value in found.items()}
                ratios.append(float(str(found["ratio"])))
    return {**figures, "ratio_vs_scheduler": min(ratios)}


def _beside(
    bench: Bench,
    name: str,
    n: int,
    texts: Texts,
    by_server: Callable[[Sequence[Asked]], Run],
    by_engine: Callable[[Sequence[Asked]], Run],
) -> Figures:
    pairs: list[tuple[Run, Run]] = []
    for turn in range(bench.n_rounds("engine") + 1):
        asked = [
            Asked(text=texts.text(ENGINE_PROMPT[name]), n_out=ENGINE_OUT[name][n]) for _ in range(n)
        ]
        calls = [("server", by_server), ("bare", by_engine)]
        if turn % 2:
            calls.reverse()
        found = {who: note(f"{name} {who} {n}", call(asked)) for who, call in calls}
        if turn:  # the first round warms up
            pairs.append((found["server"], found["bare"]))
    servers = [server for server, _ in pairs]
    seconds = sum(run.seconds for run in servers)
    return {
        "ratio": round(median(ours.tok_s / theirs.tok_s for ours, theirs in pairs), 4),
        "tok_s": round(median(run.tok_s for run in servers), 2),
        "server_us_per_token": round(
            1e6 * sum(r.parent_cpu_s for r in servers) / sum(r.n_generated for r in servers), 1
        ),
        "client_cpu_share": round(sum(run.client_cpu_s for run in servers) / seconds, 4),
    }


# -- llama-server


def peers(bench: Bench) -> Figures:
    """16 clients, without and with a shared beginning."""
    path = model_file(bench.models[-1])
    n, texts = max(STREAMS), Texts(path)
    rounds = bench.n_rounds("peer")
    mixed = [texts.mixed(n, MIXED_PROMPT, MIXED_OUT) for _ in range(rounds)]
    shared = []
    for _ in range(rounds):
        prefix = texts.text(PREFIX_TOKENS)
        shared.append(texts.mixed(n, SHARED_PROMPT, MIXED_OUT, prefix))
    figures: Figures = {}
    for kind, jobs in (("mixed", mixed), ("shared", shared)):
        runs = _contest(bench, path, kind, jobs)
        figures |= {f"{kind}_{key}": value for key, value in _compared(path, jobs, runs).items()}
    return figures


def _contest(
    bench: Bench, path: Path, kind: str, jobs: Sequence[Sequence[Asked]]
) -> dict[str, list[Run]]:
    tool = build_peers(names=["llama-server"])["llama-server"]
    setting = bench.setting(path, max(STREAMS))
    cells = setting.n_ctx * setting.n_parallel
    runs: dict[str, list[Run]] = {}
    shapes = bench.shapes
    for asked in jobs:
        with serving(setting) as server:
            print(server.command)
            server.run(COMPLETION, [Asked(text=" 1", n_out=4)])
            runs.setdefault("ours", []).append(note(f"{kind} ours", server.run(COMPLETION, asked)))
        for shape in shapes:
            with peer(tool, path, shape, cells, bench.n_threads) as other:
                print(other.command)
                other.run([Asked(text=" 1", n_out=4)])
                runs.setdefault(shape, []).append(note(f"{kind} {shape}", other.run(asked)))
        shapes = [min(shapes, key=lambda shape: runs[shape][0].seconds)]
    return runs


def _compared(path: Path, jobs: Sequence[Sequence[Asked]], runs: dict[str, list[Run]]) -> Figures:
    ours = runs.pop("ours")
    n_distinct = sum(distinct_tokens(path, asked) for asked in jobs)
    best = max(runs, key=lambda shape: (len(runs[shape]), -runs[shape][0].seconds))
    pairs = zip(ours, runs[best], strict=True)
    return {
        "seconds_ours": [round(run.seconds, 2) for run in ours],
        "seconds_by_shape": {
            name: [round(run.seconds, 2) for run in those] for name, those in runs.items()
        },
        "prefilled_tokens_ratio": round(sum(run.n_prefilled for run in ours) / n_distinct, 4),
        "ttft_p50_s": round(median(t for run in ours for t in run.ttfts_s), 3),
        "ttft_p95_s": round(_ttft(ours), 3),
        "ttft_p50_s_best": round(median(t for run in runs[best] for t in run.ttfts_s), 3),
        "ttft_p95_s_by_shape": {name: round(_ttft(those), 3) for name, those in runs.items()},
        "best_shape": best,
        "throughput_ratio": round(median(a.tok_s / b.tok_s for a, b in pairs), 3),
        "ttft_p95_ratio": round(_ttft(ours) / _ttft(runs[best]), 3),
    }


def _ttft(runs: Sequence[Run]) -> float:
    return percentile([t for run in runs for t in run.ttfts_s], 0.95)


PARTS: dict[str, Callable[[Bench], Figures]] = {"fake": fake, "engine": engine, "peer": peers}


def broken(figures: Figures) -> list[str]:
    """The figures that miss their bounds."""
    low = [name for name, least in AT_LEAST.items() if float(str(figures.get(name, least))) < least]
    high = [name for name, most in AT_MOST.items() if float(str(figures.get(name, most))) > most]
    return sorted(low + high)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 when a bound is broken."""
    arguments = _parser().parse_args(argv)
    start = time.monotonic()
    bench = Bench(
        models=arguments.model or ["demo", "1b"],
        rounds=arguments.rounds,
        n_threads=arguments.threads or os.cpu_count() or 1,
        shapes=arguments.peer or list(SHAPES),
    )
    figures: Figures = {}
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            figures |= part(bench)
    failed = broken(figures)
    print(json.dumps({
        "benchmark": "serve", **figures, "failed": failed, "engine": find_build().id,
        "threads": bench.n_threads, "machine": platform.machine(), "seed": SEED,
        "seconds": round(time.monotonic() - start, 1),
    }))  # fmt: skip
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="one of them; default: all")
    parser.add_argument("--model", choices=["demo", "1b"], action="append")
    parser.add_argument("--rounds", type=int, help="fewer or more than the parts have")
    parser.add_argument("--peer", choices=list(SHAPES), action="append", help="only this shape")
    parser.add_argument("--threads", type=int, help="of the engines; default: all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
