"""Decode of a safetensors model through loadmaster, beside transformers' bare `generate()`.

    python -m benchmarks.hf_decode [--rounds 5] [--tokens 64] [--quantize none|nf4|int8]

Both decode greedily from the same prompt, alone and eight prompts together, on a random model of
about 100 million weights in BF16 with the same threads, each in a process of its own that is closed
before the other begins. `generate()` runs with the cache that grows, its default, and with a static
one of the same length, not compiled; the faster of the two is what ours is compared with. Figures
are medians over rounds of the ratio within a round, because the speed of shared cores drifts. The
last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.hf_models import write_model
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import find_python_build
from loadmaster.engine.types import DoneEvent, GenerateRequest, LoadRequest, SamplingParams
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.stamp import model_stamp
from loadmaster.plan.types import Quantize, TransformersSettings

N_PROMPT, N_TOGETHER = 64, 8
AT_LEAST = 0.95
QUANTIZE: tuple[Quantize, ...] = ("none", "nf4", "int8")


def settings_for(quantize: Quantize, n_threads: int) -> TransformersSettings:
    """What both are given."""
    return TransformersSettings(
        quantize=quantize,
        double_quant=False,
        compute_type="bf16",
        device_map=(("", "cpu"),),
        attention="sdpa",
        n_ctx=512 * N_TOGETHER,
        n_seq_max=N_TOGETHER,
        n_ubatch=512,
        type_k="bf16",
        type_v="bf16",
        n_threads=n_threads,
    )


def prompts(n: int) -> list[list[int]]:
    """Prompts of equal length that share nothing."""
    return [[(7 * i * i + 31 * k + i) % 8000 + 3 for i in range(N_PROMPT)] for k in range(n)]


def ours(folder: Path, settings: TransformersSettings, n_tokens: int) -> dict[str, float]:
    """Tokens per second of one request, and of eight together, from the first token on."""
    model = read_checkpoint(folder)
    with Engine.start(find_python_build(), backend="transformers") as engine:
        engine.load(
            LoadRequest(
                model_path=folder, model_stamp=model_stamp(model), settings=settings,
                ram_cap_bytes=None,
            ),
            files=[stamp.path for stamp in model.files],
        )  # fmt: skip
        engine.commit_peak()
        _seconds(engine, prompts(1), 8, "warm")
        return {
            "one": _rate(engine, prompts(1), n_tokens, "one"),
            "eight": _rate(engine, prompts(N_TOGETHER), n_tokens, "eight"),
        }


def _rate(engine: Engine, rows: list[list[int]], n_tokens: int, name: str) -> float:
    """Decode alone, as of `generate()`: what prompts and first tokens take is taken off. The first
    request's own clock would count the prompts of those that came after it."""
    first = min(_seconds(engine, rows, 1, f"{name}-first-{turn}") for turn in range(2))
    return len(rows) * n_tokens / (_seconds(engine, rows, n_tokens + 1, name) - first)


def _seconds(engine: Engine, rows: list[list[int]], n_tokens: int, name: str) -> float:
    started = time.perf_counter()
    streams = [
        engine.generate(
            GenerateRequest(
                request_id=f"{name}-{index}",
                prompt=tuple(row),
                max_tokens=n_tokens,
                sampling=SamplingParams(temperature=0),
                ignore_eos=True,
                prefix_scope=f"{name}-{index}",
            )
        )
        for index, row in enumerate(rows)
    ]
    ends = [event for stream in streams for event in stream if isinstance(event, DoneEvent)]
    if any(end.n_generated != n_tokens for end in ends):
        raise RuntimeError(f"unexpected ends: {ends}")
    return time.perf_counter() - started


def bare(folder: Path, settings: TransformersSettings, n_tokens: int) -> dict[str, float]:
    """`generate()` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.hf_decode", "--bare", str(folder)]
    words += ["--quantize", settings.quantize, "--tokens", str(n_tokens)]
    words += ["--threads", str(settings.n_threads)]
    environment = {**os.environ, "USE_HUB_KERNELS": "NO", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bare_child(folder: Path, settings: TransformersSettings, n_tokens: int) -> dict[str, float]:
    """The same tokens by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(settings.n_threads)
    made: Any = {
        "none": None,
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[settings.quantize]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=made,
        attn_implementation=settings.attention,
    )  # fmt: skip

    def seconds(rows: list[list[int]], n: int, **cache: Any) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                torch.tensor(rows), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                eos_token_id=-1, pad_token_id=0, **cache,
            )  # fmt: skip
        return time.perf_counter() - started

    def rate(rows: list[list[int]], **cache: Any) -> float:
        """Decode alone: what the prompt and its first token take is taken off."""
        seconds(rows, 4, **cache)
        first = min(seconds(rows, 1, **cache) for _ in range(2))
        return len(rows) * n_tokens / (seconds(rows, n_tokens + 1, **cache) - first)

    one, eight = prompts(1), prompts(N_TOGETHER)
    static = {"cache_implementation": "static", "disable_compile": True}
    return {
        "one": rate(one), "eight": rate(eight),
        "one_static": rate(one, **static), "eight_static": rate(eight, **static),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run all rounds; 1 when a ratio is below its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quantize", choices=QUANTIZE, default="none")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    settings = settings_for(options.quantize, options.threads)
    if options.bare:
        print(json.dumps(bare_child(options.bare, settings, options.tokens)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", "llama")
        rounds = [_round(model, settings, options.tokens, i) for i in range(options.rounds)]
    figures = _figures(rounds)
    failed = [name for name in ("ratio", "ratio_eight") if figures[name] < AT_LEAST]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
    print(json.dumps({
        "benchmark": "hf_decode", **figures, "quantize": options.quantize,
        "n_tokens": options.tokens, "n_threads": options.threads, "rounds": rounds,
        "machine": platform.processor() or platform.machine(), **versions, "failed": failed,
    }))  # fmt: skip
    return 1 if failed else 0


def _round(
    folder: Path, settings: TransformersSettings, n_tokens: int, number: int
) -> dict[str, dict[str, float]]:
    """Both contestants, in an order that turns."""
    found = {}
    contestants = [("ours", ours), ("bare", bare)]
    for name, run in contestants if number % 2 == 0 else contestants[::-1]:
        found[name] = run(folder, settings, n_tokens)
        print(name, {key: round(rate, 2) for key, rate in found[name].items()}, flush=True)
    return found


def _figures(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    def median(who: str, what: str) -> float:
        return round(statistics.median(one[who][what] for one in rounds), 2)

    def ratio(what: str) -> float:
        found = (
            one["ours"][what] / max(one["bare"][what], one["bare"][f"{what}_static"])
            for one in rounds
        )
        return round(statistics.median(found), 3)

    return {
        "ratio": ratio("one"),
        "ratio_eight": ratio("eight"),
        "ours_tok_s": median("ours", "one"),
        "bare_tok_s": median("bare", "one"),
        "bare_static_tok_s": median("bare", "one_static"),
        "ours_eight_tok_s": median("ours", "eight"),
        "bare_eight_tok_s": median("bare", "eight"),
        "bare_eight_static_tok_s": median("bare", "eight_static"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
