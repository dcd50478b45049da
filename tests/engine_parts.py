"""Settings and requests for tests of the engine, and what its choices are held against."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadmaster.engine.process import Engine
from loadmaster.engine.types import EngineBuild, GenerateRequest, LoadRequest, SamplingParams
from loadmaster.model.stamp import current_stamp
from loadmaster.plan.types import EngineSettings
from loadmaster.units import Bytes

SETTINGS = EngineSettings(
    n_gpu_layers=0,
    layers_per_device=(),
    overrides=(),
    n_ctx=256,
    n_seq_max=1,
    n_batch=64,
    n_ubatch=64,
    n_outputs_max=1,
    type_k="f16",
    type_v="f16",
    flash_attn=True,
    offload_kqv=True,
    op_offload=True,
    op_offload_min_batch=32,
    swa_full=False,
    kv_unified=True,
    load_mode="none",
    use_extra_bufts=True,
    n_threads=1,
    n_threads_batch=1,
)
GREEDY = SamplingParams(temperature=0)
# What is closer to the best is as good: kernels and CPUs round differently.
WRONG_LOGITS = 0.05
_FORCED = Path(__file__).parents[1] / "benchmarks" / "batching" / "forced.py"


def settings(**changes: Any) -> EngineSettings:
    """Small settings of a CPU engine, with some of them changed."""
    return replace(SETTINGS, **changes)


def load_request(
    path: Path, engine_settings: EngineSettings = SETTINGS, ram_cap_bytes: Bytes | None = None
) -> LoadRequest:
    """A load of a file as it is now."""
    return LoadRequest(
        model_path=path,
        model_stamp=current_stamp([path]),
        settings=engine_settings,
        ram_cap_bytes=ram_cap_bytes,
    )


def request(
    request_id: str, prompt: list[int], max_tokens: int | None = 8, **changes: Any
) -> GenerateRequest:
    """A greedy request that does not stop by itself."""
    fields: dict[str, Any] = {"sampling": GREEDY, "ignore_eos": True} | changes
    return GenerateRequest(
        request_id=request_id, prompt=tuple(prompt), max_tokens=max_tokens, **fields
    )


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The worker stands still: all that is asked meanwhile is there when it goes on."""
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine.pid, signal.SIGCONT)


def gaps(
    build: EngineBuild, path: Path, prompts: Sequence[list[int]], outputs: Sequence[list[int]]
) -> list[float]:
    """The best logit less the chosen one, of every token: of a run alone, fed the same tokens."""
    requests = [{"prompt": p, "output": o} for p, o in zip(prompts, outputs, strict=True)]
    engine = {"LLAMA_CPP_LIB_PATH": str(build.lib_dir), "PYTHONPATH": str(build.python_dir)}
    found = subprocess.run(
        [sys.executable, str(_FORCED), str(path), "512", "1"], input=json.dumps(requests),
        env={**os.environ, **engine}, text=True, capture_output=True, check=True,
    )  # fmt: skip
    rows: list[list[float]] = json.loads(found.stdout.splitlines()[-1])
    return [gap for row in rows for gap in row]
