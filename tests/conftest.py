"""Fixtures that need the built engine, the demo model or a stand-in GPU; Hypothesis' profiles.

On every run Hypothesis tries the same few examples, so that no run fails by chance; in the night it
looks for others: `HYPOTHESIS_PROFILE=nightly make test`.
"""

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from loadmaster.engine import builds
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.machine.types import SizingRules
from loadmaster.units import GIB, Bytes

CUDA_RULES = SizingRules(
    alignment_bytes=128, row_padding=512, offload_min_batch=32, pinned_host=True
)
_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
hypothesis_settings.register_profile("short", derandomize=True, max_examples=40, **_COMMON)
hypothesis_settings.register_profile("nightly", max_examples=2000, **_COMMON)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


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
