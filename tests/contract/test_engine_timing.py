"""The engine's timers answer every question of `doctor --measure`, on the CPU and on a card."""

from collections.abc import Iterator

import pytest

from loadmaster.engine import builds
from loadmaster.engine.process import Engine
from loadmaster.engine.timing import (
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeRead,
    TimeSmall,
)
from loadmaster.engine.types import VirtualDevice
from loadmaster.errors import EngineError
from loadmaster.machine.rules import CUDA
from loadmaster.units import GIB, MIB, Bytes

pytestmark = pytest.mark.engine
DEVICES = ("cpu", "gpu:0")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    card = VirtualDevice(id="gpu:0", total_bytes=Bytes(GIB), rules=CUDA)
    with Engine.start(builds.find_build(), devices=[card]) as started:
        yield started


def _products(device: str, quant: str, *, repacked: bool = False, experts: int = 0) -> TimeProducts:
    return TimeProducts(
        device=device,
        n_threads=1,
        type=quant,
        repacked=repacked,
        n_in=256,
        n_out=64,
        n_matrices=2,
        points=((1, 2), (8, 1)),
        runs=2,
        n_expert=experts,
        n_used=experts,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", ["q4_K", "q6_K", "q8_0", "f16", "bf16", "mxfp4", "iq3_xxs"])
def test_products_of_every_type_give_each_run_of_each_point(
    engine: Engine, device: str, quant: str
) -> None:
    for experts in (0, 4):
        seconds = engine.time(_products(device, quant, experts=experts))
        assert seconds is not None
        assert len(seconds) == 4
        assert min(seconds) > 0


def test_a_type_without_a_repacked_layout_has_no_time_in_it(engine: Engine) -> None:
    assert engine.time(_products("cpu", "f16", repacked=True)) is None
    assert engine.time(_products("gpu:0", "q4_0", repacked=True)) is None


@pytest.mark.parametrize("device", DEVICES)
def test_attention_and_the_small_operations_are_timed(engine: Engine, device: str) -> None:
    for kv in ("f16", "q8_0"):
        question = TimeAttention(
            device=device, n_threads=1, type=kv, head_dim=64, n_head=4, n_head_kv=2, n_cells=256,
            n_tokens=2, n_visible=16, n_layers=2, runs=2,
        )  # fmt: skip
        seconds = engine.time(question)
        assert seconds is not None
        assert len(seconds) == 2
    for operation in ("norm", "gate", "rope", "copy"):
        small = TimeSmall(
            device=device, n_threads=1, operation=operation, width=256, n_tokens=4, n_ops=3, runs=2
        )
        assert engine.time(small) is not None


def test_memory_and_the_link_are_timed_and_the_processor_has_no_link_buffer(
    engine: Engine,
) -> None:
    assert engine.time(TimeRead(n_threads=2, size_bytes=MIB, runs=2)) is not None
    for pinned in (True, False):
        link = TimeLink(device="gpu:0", size_bytes=MIB, pinned=pinned, runs=2)
        assert engine.time(link) is not None
    too_large = TimeLink(device="gpu:0", size_bytes=2 * GIB, pinned=False, runs=1)
    assert engine.time(too_large) is None  # the card has 1 GiB


def test_nonsense_is_refused_and_the_worker_goes_on(engine: Engine) -> None:
    with pytest.raises(EngineError, match="no device `gpu:9`"):
        engine.time(_products("gpu:9", "f16"))
    with pytest.raises(EngineError, match="refused"):
        engine.time(TimeRead(n_threads=0, size_bytes=MIB, runs=1))
    assert engine.time(TimeRead(n_threads=1, size_bytes=MIB, runs=1)) is not None
