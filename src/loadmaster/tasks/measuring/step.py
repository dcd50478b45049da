"""What a decode step costs outside its graph, from a model with next to no weights."""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loadmaster.engine import probe_model
from loadmaster.engine.process import Engine
from loadmaster.engine.timing import TimeSteps
from loadmaster.engine.types import LoadRequest
from loadmaster.model.source import read_model
from loadmaster.plan.choices import base_settings, first_choice
from loadmaster.plan.types import EngineSettings, Knobs, Workload

_PROBE_NODES_PER_LAYER = 20  # all operations: its products are as small as the rest


def probe_steps(engine: Engine, threads: int) -> tuple[float, ...]:
    """Decode steps of a model with next to no weights."""
    with tempfile.TemporaryDirectory(prefix="loadmaster-") as folder:
        path = Path(folder) / "probe.gguf"
        probe_model.write(path)
        request = LoadRequest(
            model_path=path,
            model_stamp="",
            settings=_probe_settings(path, threads),
            ram_cap_bytes=None,
        )
        engine.load(request)
        return engine.time(TimeSteps(depth=1, n_sequences=1, n_steps=64)) or ()


def step_s(seconds: Sequence[float], node_s: float | None) -> float | None:
    """A step less the operations in it; the first of `seconds` is the prompt's."""
    if len(seconds) < 2 or node_s is None:
        return None
    nodes = probe_model.N_LAYER * _PROBE_NODES_PER_LAYER
    return max(0.0, statistics.median(seconds[1:]) - nodes * node_s)


def _probe_settings(path: Path, threads: int) -> EngineSettings:
    model, workload = read_model(path), Workload(n_ctx=probe_model.N_CTX)
    knobs = Knobs(n_batch=64, n_ubatch=64, op_offload=False)
    choice = first_choice(model, workload, knobs)
    return base_settings(choice, workload, knobs, n_gpus=0, n_threads=threads)
