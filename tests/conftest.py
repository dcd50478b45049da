"""Fixtures that need the built engine, the demo model or a stand-in GPU."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from loadmaster.engine import builds
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.machine.types import SizingRules
from loadmaster.units import GIB, Bytes

CUDA_RULES = SizingRules(
    alignment_bytes=128, row_padding=512, offload_min_batch=32, pinned_host=True
)


@pytest.fixture(scope="session")
def engine_build() -> EngineBuild:
    """The engine build that a user would get; `make engine` makes one."""
    return builds.find_build()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The model that ships with the package."""
    return Path(str(files("loadmaster") / "data" / "demo.gguf"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny safetensors model with random weights."""
    from tests.hf_parts import write_llama

    return write_llama(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def stand_in_gpu() -> Callable[..., VirtualDevice]:
    """Make a GPU of any size that exists in the worker alone and enforces its limit."""

    def make(total_bytes: int = GIB, index: int = 0) -> VirtualDevice:
        return VirtualDevice(id=f"gpu:{index}", total_bytes=Bytes(total_bytes), rules=CUDA_RULES)

    return make
