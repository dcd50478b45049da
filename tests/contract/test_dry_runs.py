"""What a dry run says is what a load takes, on each of several GPUs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gguf_writer import write_random
from benchmarks.shapes import build_tiny
from loadmaster.engine.process import Engine
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.plan.types import Sizing
from tests.engine_parts import load_request, settings

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("n_ubatch", [16, 128])  # below 32 tokens norms are pinned to devices too
@pytest.mark.parametrize("layers", [(2, 3), (1, 2)])
def test_two_gpus_take_what_was_sized(
    engine_build: EngineBuild,
    tmp_path: Path,
    stand_in_gpu: Callable[..., VirtualDevice],
    layers: tuple[int, int],
    n_ubatch: int,
) -> None:
    path = write_random(tmp_path / "m.gguf", *build_tiny("llama-8b", "q8_0"))
    wanted = settings(
        n_gpu_layers=sum(layers), layers_per_device=layers, n_batch=n_ubatch, n_ubatch=n_ubatch
    )
    with Engine.start(engine_build, devices=[stand_in_gpu(index=i) for i in (0, 1)]) as engine:
        sizing = engine.size(path, wanted)
        engine.load(load_request(path, wanted))
        assert isinstance(sizing, Sizing)
        assert engine.memory().buffers == sizing.buffers
