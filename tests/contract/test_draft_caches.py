"""Drafts on every kind of llama.cpp's caches: each chosen token is held against a run of its
request alone, a token at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_writer import write_random
from benchmarks.shapes import build_tiny
from loadmaster.engine.process import Engine
from loadmaster.engine.types import DraftLoad, EngineBuild, VirtualDevice
from loadmaster.model.source import read_model
from loadmaster.model.stamp import current_stamp
from loadmaster.plan.drafts import draft_settings
from loadmaster.plan.types import Sizing
from tests.contract.test_scheduling import Outcome, check
from tests.engine_parts import load_request, settings

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i * i) % 11 + 20 + n for i in range(60)] for n in range(2)]
N_OUT = 90
SIZES: dict[str, Any] = {
    "n_ctx": 1024, "n_seq_max": 3, "n_outputs_max": 16, "type_k": "f32", "type_v": "f32",
}  # fmt: skip


def opened(engine: Engine, path: Path, draft: Path | None = None, **changes: Any) -> None:
    """With drafts: looked up, or by another model of the same shape, which is mostly wrong."""
    load = load_request(path, settings(n_draft=7, **SIZES | changes))
    if draft is not None:
        own = settings(swa_full=True, **SIZES)
        stamp = current_stamp([draft])
        beside = DraftLoad(model_path=draft, model_stamp=stamp, files=(draft,), settings=own)
        load = replace(load, draft=beside)
    engine.load(load)


@pytest.mark.parametrize(
    ("shape", "changes", "others"),
    [
        ("llama-8b", {}, {}),
        ("llama-8b", {}, {"kv_unified": False}),
        ("deepseek2-lite", {}, {}),
        ("gemma3-12b", {"window": 32}, {}),
        ("gpt-oss-20b", {"window": 32}, {"kv_unified": False}),
    ],
    ids=["llama", "apart", "mla", "window", "window-apart"],
)
def test_what_was_not_accepted_leaves_no_trace(
    engine_build: EngineBuild, tmp_path: Path, shape: str, changes: dict[str, Any],
    others: dict[str, Any],
) -> None:  # fmt: skip
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    write_random(path, *build_tiny(shape, "f16", **changes))
    write_random(other, *build_tiny(shape, "f16", **changes), seed=9)
    for draft in (None, other):
        with Engine.start(engine_build) as engine:
            opened(engine, path, draft, **others)
            outcome = Outcome(engine, PROMPTS, N_OUT)
            wrong = outcome.stats.n_drafted_tokens - outcome.stats.n_accepted_tokens
            assert wrong > 8 or draft is None
            assert outcome.stats.n_drafted_tokens > 0
            check(outcome, N_OUT, engine_build, path)


def test_a_recurrent_state_is_never_given_a_draft(
    engine_build: EngineBuild, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    write_random(path, *build_tiny("mamba-2.8b", "f16"))
    with Engine.start(engine_build) as engine:
        opened(engine, path)
        outcome = Outcome(engine, PROMPTS, 20)
        assert outcome.stats.n_drafted_tokens == 0
        check(outcome, 20, engine_build, path)


@pytest.mark.parametrize("device", ["gpu:0", "cpu"])
def test_a_draft_model_takes_what_it_was_sized_at(
    engine_build: EngineBuild, demo_model: Path, stand_in_gpu: Callable[..., VirtualDevice],
    device: str,
) -> None:  # fmt: skip
    ours = settings(n_gpu_layers=3, layers_per_device=(3,), n_draft=7, n_outputs_max=16)
    own = draft_settings(read_model(demo_model), ours, device, n_gpus=1)
    load = load_request(demo_model, ours)
    draft = DraftLoad(
        model_path=demo_model, model_stamp=load.model_stamp, files=(demo_model,), settings=own
    )
    with Engine.start(engine_build, devices=[stand_in_gpu()]) as engine:
        alone, sizing = engine.size(demo_model, ours), engine.size(demo_model, own)
        assert isinstance(alone, Sizing)
        assert isinstance(sizing, Sizing)
        engine.load(replace(load, draft=draft))
        report = engine.commit_peak()
        assert sizing.on(device).model_bytes > 3_000_000
        for planned, measured in ((sizing, report.draft_buffers), (alone, report.buffers)):
            for row in measured:
                assert row == planned.on(row.device)
