"""The transformers engine's timers answer every question of `doctor --measure`, on small sizes; and
what torch is told of its cap."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.timing import (
    Question,
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeRead,
    TimeSmall,
    TimeSteps,
)
from loadmaster.tasks.proving import allocator_caps
from loadmaster.units import GIB
from tests import checkpoint_parts as parts
from tests.hf_parts import load_request, write_llama

prepare()

from loadmaster.engine.backends.transformers import cuda  # noqa: E402
from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402

PRODUCTS = TimeProducts(
    device="cpu", n_threads=1, type="bf16", repacked=False, n_in=64, n_out=128, n_matrices=3,
    points=((4, 2), (1, 3)), runs=2,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "f32", "nf4", "nf4-double", "int8"])
def test_products_of_every_kind(kind: str) -> None:
    seconds = Transformers().time(replace(PRODUCTS, type=kind))
    assert seconds is not None
    assert len(seconds) == 4
    assert min(seconds) > 0


@pytest.mark.parametrize(
    "question",
    [
        TimeAttention(
            device="cpu", n_threads=1, type="bf16", head_dim=16, n_head=8, n_head_kv=2, n_cells=64,
            n_tokens=n_tokens, n_visible=64, n_layers=2, runs=2,
        )
        for n_tokens in (1, 32)
    ]
    + [
        TimeSmall(device="cpu", n_threads=1, operation=name, width=64, n_tokens=8, n_ops=2, runs=2)
        for name in ("norm", "gate", "rope", "sample")
    ],
    ids=str,
)  # fmt: skip
def test_attention_and_small_operations(question: Question) -> None:
    seconds = Transformers().time(question)
    assert seconds is not None
    assert len(seconds) == 2
    assert min(seconds) > 0


@pytest.mark.parametrize(
    "question",
    [
        TimeProducts(
            device="cpu", n_threads=1, type="q4_K", repacked=False, n_in=64, n_out=64, n_matrices=1,
            points=((1, 1),), runs=1,
        ),
        TimeSmall(
            device="cpu", n_threads=1, operation="copy", width=8, n_tokens=1, n_ops=1, runs=1
        ),
        TimeLink(device="cpu", size_bytes=1 << 20, pinned=False, runs=1),
        TimeRead(n_threads=1, size_bytes=1 << 20, runs=1),
        TimeSteps(depth=4, n_sequences=1, n_steps=2),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_cannot_time_has_no_answer(question: Question) -> None:
    assert Transformers().time(question) is None


def test_steps_of_an_open_model(tmp_path: Path) -> None:
    backend = Transformers()
    backend.load(load_request(write_llama(tmp_path)), lambda _: True)
    steps = backend.time(TimeSteps(depth=100, n_sequences=2, n_steps=3))
    assert steps is not None
    assert len(steps) == 2 + 3, "two chunks of the first prompt, then a step for each token"
    prompts = TimeSmall(
        device="cpu", n_threads=1, operation="part", width=0, n_tokens=2, n_ops=1, runs=3
    )
    assert len(backend.time(prompts) or ()) == 3
    backend.close()


def test_torch_may_allocate_the_cap_less_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parts.fitting(parts.shape(), quantize="nf4", vram="8GiB")
    gpu = plan.device("gpu:0")
    (context,) = (item.bytes for item in gpu.items if item.why == "cuda context")
    caps = allocator_caps(plan)
    assert caps == {"gpu:0": 8 * GIB - context}
    told: dict[str, float] = {}

    def properties(place: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=12 * GIB)

    def fraction(value: float, place: Any) -> None:
        told[str(place)] = value

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
    cuda.cap({**caps, "cpu": GIB})
    assert told == {"cuda:0": pytest.approx((8 * GIB - context) / (12 * GIB))}
