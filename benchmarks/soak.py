"""100,000 tiny requests with cancels through one engine: what it and its parent keep of them.

    python -m benchmarks.soak [--requests 100000] [--seed 0]

Real engine, demo model, 16 sequences in few cells. Prompts share beginnings, have scopes and
priorities; some requests have stop strings, log-probabilities or a seed; one in eight is cancelled,
at once or after its first event. Every request must end exactly once. Memory is RssAnon + VmSwap
of the worker and of this process; growth is from the end of the warm-up (the first 5 %) to the end,
by the medians of the samples around both. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from loadmaster.engine import builds
from loadmaster.engine.meter import process_memory
from loadmaster.engine.process import Engine
from loadmaster.engine.types import (
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    LoadRequest,
    SamplingParams,
)
from loadmaster.errors import LoadmasterError
from loadmaster.model.stamp import current_stamp
from loadmaster.plan.types import EngineSettings
from loadmaster.units import KIB, MIB, Bytes

DEMO = Path(str(files("loadmaster") / "data" / "demo.gguf"))
IN_FLIGHT = 48
SETTINGS = EngineSettings(
    n_gpu_layers=0, layers_per_device=(), overrides=(), n_ctx=512, n_seq_max=16, n_batch=128,
    n_ubatch=128, n_outputs_max=16, type_k="f16", type_v="f16", flash_attn=True, offload_kqv=True,
    op_offload=True, op_offload_min_batch=32, swa_full=False, kv_unified=True, load_mode="none",
    use_extra_bufts=True, n_threads=1, n_threads_batch=1,
)  # fmt: skip
_SAMPLES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What both processes hold at one moment."""

    n_ended: int
    worker_bytes: int
    parent_bytes: int
    worker_handles: tuple[int, int]  # open files, threads
    parent_handles: tuple[int, int]


@dataclass
class Tally:
    """Ends, counted on the watcher's thread."""

    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(IN_FLIGHT))
    reasons: Counter[str] = field(default_factory=Counter)
    live: set[str] = field(default_factory=set)
    n_twice: int = 0  # ends of requests that had ended
    first: deque[str] = field(default_factory=deque)  # had their first event, to be cancelled

    def sink(self, request_id: str, event: GenerateEvent | LoadmasterError) -> None:
        if isinstance(event, DoneEvent | LoadmasterError):
            reason = event.finish_reason if isinstance(event, DoneEvent) else "refused"
            self.reasons[reason] += 1
            self.n_twice += request_id not in self.live
            self.live.discard(request_id)
            self.room.release()
        elif request_id.endswith("late"):
            self.first.append(request_id)


def request_of(dice: random.Random, number: int) -> GenerateRequest:
    fate = dice.choice(["stay"] * 14 + ["early", "late"])
    beginning = [dice.randrange(20)] * (8 * dice.randrange(4))
    prompt = [*beginning, *(dice.randrange(300) for _ in range(dice.randint(1, 8)))]
    return GenerateRequest(
        request_id=f"{number}-{fate}",
        prompt=tuple(token + 5 for token in prompt),
        max_tokens=dice.randint(1, 6) if fate == "stay" else 40,
        sampling=SamplingParams(temperature=dice.choice([0.0, 0.8]), seed=number),
        stop=dice.choice([(), (), ("\n", "the end")]),
        ignore_eos=dice.random() < 0.5,
        priority=dice.choice([0, 1, 1, 1]),
        prefix_scope=dice.choice(["", "", f"key {number}"]),
        top_logprobs=dice.choice([None, None, None, 2]),
    )


def sample(engine: Engine, n_ended: int) -> Sample:
    worker, parent = process_memory(engine.pid), process_memory()
    return Sample(
        n_ended=n_ended,
        worker_bytes=worker.own_bytes,
        parent_bytes=parent.own_bytes,
        worker_handles=_handles(engine.pid),
        parent_handles=_handles(os.getpid()),
    )


def _handles(pid: int) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def soak(engine: Engine, n_requests: int, seed: int) -> tuple[list[Sample], Tally]:
    dice, tally, samples = random.Random(seed), Tally(), []
    every = max(1, n_requests // _SAMPLES)
    for number in range(n_requests):
        tally.room.acquire()
        request = request_of(dice, number)
        tally.live.add(request.request_id)
        engine.start_request(request, tally.sink)
        if request.request_id.endswith("early"):
            engine.cancel(request.request_id)
        while tally.first:
            engine.cancel(tally.first.popleft())
        if number % every == 0:
            samples.append(sample(engine, number))
            if len(samples) % (_SAMPLES // 10) == 0:
                print(_line(samples[-1]), flush=True)
    for _ in range(IN_FLIGHT):
        tally.room.acquire()
    samples.append(sample(engine, n_requests))
    return samples, tally


def _line(one: Sample) -> str:
    worker, parent = one.worker_bytes / MIB, one.parent_bytes / MIB
    return f"{one.n_ended:>7} requests  worker {worker:.2f} MiB  parent {parent:.2f} MiB"


def growth(values: list[int]) -> float:
    """From after the warm-up to the end, by medians of a twentieth of the samples."""
    part = max(1, len(values) // 20)
    return statistics.median(values[-part:]) - statistics.median(values[part : 2 * part])


def figures(samples: list[Sample], tally: Tally, n_requests: int) -> dict[str, object]:
    worker = growth([one.worker_bytes for one in samples])
    settled = samples[len(samples) // 20]
    last = samples[-1]
    return {
        "requests": n_requests,
        "ended_once": not tally.live and tally.n_twice == 0,
        "finish_reasons": dict(sorted(tally.reasons.items())),
        "worker_growth_bytes_per_request": round(worker / n_requests, 1),
        "worker_growth_kib": round(worker / KIB, 1),
        "parent_growth_mib": round(growth([one.parent_bytes for one in samples]) / MIB, 2),
        "worker_mib": round(last.worker_bytes / MIB, 1),
        "worker_fds": last.worker_handles[0] - settled.worker_handles[0],
        "worker_threads": last.worker_handles[1] - settled.worker_handles[1],
        "parent_fds": last.parent_handles[0] - settled.parent_handles[0],
        "parent_threads": last.parent_handles[1] - settled.parent_handles[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with Engine.start(builds.find_build()) as engine:
        engine.load(
            LoadRequest(
                model_path=DEMO,
                model_stamp=current_stamp([DEMO]),
                settings=SETTINGS,
                ram_cap_bytes=None,
                state_bytes=Bytes(4 * MIB),
            )
        )
        engine.commit_peak()
        samples, tally = soak(engine, options.requests, options.seed)
        stats = engine.stats()
    found = figures(samples, tally, options.requests) | {
        "preempted": stats.n_preempted,
        "restored": stats.n_restored,
        "reused_tokens": stats.n_reused_tokens,
        "left_running": stats.n_running + stats.n_queued + stats.n_cells_running,
        "state_bytes": stats.state_bytes,
        "elapsed_s": round(time.monotonic() - started, 1),
    }
    print(json.dumps({"benchmark": "soak", **found}))


if __name__ == "__main__":
    main()
