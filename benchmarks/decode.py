"""Decode through loadmaster's worker, beside the bare engine, in one run.

    python -m benchmarks.decode [--rounds 7] [--tokens 128] [--model demo|1b]

Three contestants decode the same number of tokens greedily from one token on, on the same file with
the same settings and threads: our worker (scheduler, sampler, text and pipe included), a bare loop
of `llama_decode` and a greedy sampler over ctypes, and `llama-bench` from the same source. Each
round runs all of them, in an order that turns; figures are medians over rounds of the ratio within
a round, because the speed of shared cores drifts. `ram_bandwidth_share` is weight bytes per token
times tokens per second, over the rate at which this machine's cores read a large array (numpy
sums, one thread per core, best of five). The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.gguf_writer import write_random
from benchmarks.peers import build_peers
from benchmarks.shapes import build
from loadmaster.engine.builds import find_build
from loadmaster.engine.process import Engine
from loadmaster.engine.types import DoneEvent, GenerateRequest, LoadRequest, SamplingParams
from loadmaster.model.source import read_model
from loadmaster.model.stamp import model_stamp
from loadmaster.plan.choices import base_settings, first_choice
from loadmaster.plan.types import EngineSettings, Knobs, Workload
from loadmaster.settings import cache_folder
from loadmaster.tasks.planning import demo_model

N_CTX = 1024
READ_BYTES = 1 << 30
# Llama 3.2 1B: the published checkpoint's numbers, random weights.
ONE_B = {"n_layer": 16, "n_embd": 2048, "n_head": 32, "n_head_kv": 8, "head_dim": 64, "n_ff": 8192,
         "tokenizer": "bpe"}  # fmt: skip


def settings_for(path: Path, n_threads: int) -> EngineSettings:
    """What `loadmaster run` would take on the CPU, at a fixed n_ctx."""
    model, workload, knobs = read_model(path), Workload(n_ctx=N_CTX), Knobs(op_offload=False)
    choice = first_choice(model, workload, knobs)
    return base_settings(choice, workload, knobs, n_gpus=0, n_threads=n_threads)


def ours(path: Path, settings: EngineSettings, n_tokens: int) -> float:
    """Tokens per second of a request's decode phase, as its DoneEvent says."""
    model = read_model(path)
    with Engine.start(find_build()) as engine:
        request = LoadRequest(
            model_path=path, model_stamp=model_stamp(model), settings=settings, ram_cap_bytes=None
        )
        engine.load(request)
        engine.commit_peak()
        generate = GenerateRequest(
            request_id="decode",
            prompt=(1,),
            max_tokens=n_tokens + 1,  # the first comes out of the prompt
            sampling=SamplingParams(temperature=0),
            ignore_eos=True,
        )
        done = next(it for it in engine.generate(generate) if isinstance(it, DoneEvent))
    if done.finish_reason != "length" or done.n_generated != n_tokens + 1:
        raise RuntimeError(f"unexpected end: {done}")
    return n_tokens / done.decode_s


def bare_loop(path: Path, settings: EngineSettings, n_tokens: int) -> float:
    """The same in a process of its own, by `benchmarks.bare_loop`."""
    build = find_build()
    environment = {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": str(build.lib_dir),
        "PYTHONPATH": str(build.python_dir),
    }
    words = [sys.executable, str(Path(__file__).with_name("bare_loop.py")), str(path)]
    words += [str(settings.n_ctx), str(settings.n_ubatch), str(settings.n_threads), str(n_tokens)]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def llama_bench(tool: Path, path: Path, settings: EngineSettings, n_tokens: int) -> float:
    """`llama-bench`'s text generation test, one repetition after its own warm-up."""
    words = [str(tool), "-m", str(path), "-p", "0", "-n", str(n_tokens), "-r", "1", "-o", "json"]
    words += ["-t", str(settings.n_threads), "-fa", "1", "-ub", str(settings.n_ubatch)]
    words += ["-lm", "none"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(found.stdout)[0]["avg_ts"])


def read_bytes_s(n_threads: int) -> float:
    """Bytes per second of summing a large array with every thread on its own part."""
    data = np.ones(READ_BYTES // 8)
    parts = np.array_split(data, n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, READ_BYTES / (time.perf_counter() - start))
    return best


def model_file(name: str) -> Path:
    """The demo model, or a random 1B written once to the cache."""
    if name == "demo":
        return demo_model()
    path = cache_folder() / "benchmarks" / "random-1b-q4_K_M.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        write_random(partial, *build("llama-3b", "q4_K_M", **ONE_B), seed=1)
        partial.rename(path)
    return path


def measure(
    name: str, rounds: int, n_tokens: int, tool: Path, read_rate: float
) -> dict[str, object]:
    """All contestants on one model."""
    path = model_file(name)
    settings = settings_for(path, os.cpu_count() or 1)
    contestants = {
        "ours": lambda: ours(path, settings, n_tokens),
        "loop": lambda: bare_loop(path, settings, n_tokens),
        "llama_bench": lambda: llama_bench(tool, path, settings, n_tokens),
    }
    order = list(contestants)
    speeds: dict[str, list[float]] = {key: [] for key in order}
    for turn in range(rounds):
        shift = turn % len(order)
        for key in order[shift:] + order[:shift]:
            speeds[key].append(contestants[key]())
        print(name, turn, {key: round(values[-1], 1) for key, values in speeds.items()}, flush=True)
    model = read_model(path)
    read = model.weight_bytes - (0 if model.tied_output else model.tensors[0].size_bytes)
    median = {key: statistics.median(values) for key, values in speeds.items()}
    return {
        f"{name}_tok_s": {key: round(value, 2) for key, value in median.items()},
        f"{name}_ratio_vs_loop": _ratio(speeds, "loop"),
        f"{name}_ratio_vs_llama_bench": _ratio(speeds, "llama_bench"),
        f"{name}_ram_bandwidth_share": round(read * median["ours"] / read_rate, 3),
    }


def _ratio(speeds: dict[str, list[float]], peer: str) -> float:
    pairs = zip(speeds["ours"], speeds[peer], strict=True)
    return round(statistics.median(our / theirs for our, theirs in pairs), 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", choices=["demo", "1b"], action="append")
    arguments = parser.parse_args()
    tool = build_peers(names=["llama-bench"])["llama-bench"]
    read_rate = read_bytes_s(os.cpu_count() or 1)
    figures: dict[str, object] = {}
    names = arguments.model or ["demo", "1b"]
    for name in names:
        figures |= measure(name, arguments.rounds, arguments.tokens, tool, read_rate)
    for key in ("ratio_vs_loop", "ratio_vs_llama_bench", "ram_bandwidth_share"):
        figures[key] = figures[f"{names[-1]}_{key}"]
    where = {
        "engine": find_build().id, "threads": os.cpu_count(), "machine": platform.machine(),
        "read_gb_s": round(read_rate / 1e9, 1), "rounds": arguments.rounds,
        "tokens": arguments.tokens,
    }  # fmt: skip
    print(json.dumps({"benchmark": "decode", **where, **figures}))


if __name__ == "__main__":
    main()
