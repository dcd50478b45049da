"""Caches in 8 and 4 bits of the transformers engine: what rounding costs, and that prompts may be
cut, shared, saved and answered together as with plain ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.types import SequenceWork
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.hf_ledger import caches_by_device
from tests.hf_parts import load_request, settings

prepare()

from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402
from loadmaster.engine.backends.transformers.kept import GroupedCells  # noqa: E402
from loadmaster.engine.backends.transformers.opened import OpenModel  # noqa: E402

BITS = {"q8_0": 8, "q4_0": 4}
# Of the spread of all logits, what rounding keys and values may move one by in the mean: a random
# model with heads of 16, where nothing evens out.
MEAN_SHIFT = {"q8_0": 0.02, "q4_0": 0.25}
TEXT = [(7 * i * i + 3 * i) % 250 + 1 for i in range(90)]
FAMILIES = ("llama", "mistral", "gemma2")


def opened(folder: Path, kind: str) -> Transformers:
    backend = Transformers()
    request = load_request(folder, n_seq_max=4, n_ctx=4 * 160, type_k=kind, type_v=kind)
    backend.load(request, lambda _: True)
    return backend


def logits(model: OpenModel, chunks: Sequence[int], seq_id: int = 0) -> Any:
    """The logits after each chunk of the text, fed one after another."""
    rows, at = [], 0
    model.slots.remove(seq_id, 0)
    for size in chunks:
        part = tuple(TEXT[at : at + size])
        done = model.step([SequenceWork(seq_id=seq_id, tokens=part, position=at, sample=True)])
        assert done is not None
        rows.append(done[1])
        at += size
    return torch.cat(rows)


def rounded(kind: str, rows: Any) -> Any:
    cells = GroupedCells(BITS[kind], (1, 1, rows.shape[0], rows.shape[1]), rows)
    return cells.decode(cells.code(rows))


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 1 / 254), ("q4_0", 1 / 8)])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_no_element_is_off_by_more_than_its_step(kind: str, most: float, width: int) -> None:
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(1)) * 30
    rows[3], rows[4, :5] = 0, 5e4
    found = rounded(kind, rows)
    group = {16: 16, 64: 32, 80: 16}[width]
    peaks = rows.abs().unflatten(-1, (-1, group)).amax(-1).repeat_interleave(group, -1)
    assert bool(((found - rows).abs() <= peaks * (most + 1e-3)).all())
    assert not bool(found[3].any())


@pytest.mark.parametrize("kind", sorted(BITS))
def test_numbers_are_those_of_ggml(kind: str) -> None:
    rows = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    named = GGMLQuantizationType[kind.upper()]
    theirs = quants.dequantize(quants.quantize(rows.numpy(), named), named)
    steps = (rows.abs().unflatten(-1, (-1, 32)).amax(-1) / (127 if kind == "q8_0" else 8)).numpy()
    apart = np.abs(rounded(kind, rows).numpy() - theirs) / steps.repeat(32, -1)
    assert apart.max() < 1.01  # where a scale in F16 tips the balance between two numbers
    assert (apart > 0.5).mean() < 0.01


def test_what_is_larger_than_a_scale_can_say_stays_finite() -> None:
    rows = torch.full((1, 32), 3e38)
    assert all(bool(rounded(kind, rows).isfinite().all()) for kind in BITS)


@pytest.mark.parametrize("kind", sorted(BITS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_those_of_a_plain_cache(models: Any, family: str, kind: str) -> None:
    chunks = [40, *[1] * 50]
    expected, found = (_logits_of(models(family), one, chunks) for one in ("f32", kind))
    assert float((found - expected).abs().mean()) <= MEAN_SHIFT[kind] * float(expected.std())
    assert float((found - expected).abs().max()) > 0  # it is rounded


def _logits_of(folder: Path, kind: str, chunks: Sequence[int]) -> Any:
    backend = opened(folder, kind)
    found = logits(backend._model, chunks)
    backend.close()
    return found


@pytest.mark.parametrize("kind", sorted(BITS))
@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_not_matter_how_a_prompt_is_cut(models: Any, family: str, kind: str) -> None:
    backend = opened(models(family), kind)
    whole = logits(backend._model, [90])[-1]
    for chunks in ([17, 30, 43], [50, *[1] * 40], [89, 1]):
        assert torch.allclose(logits(backend._model, chunks, 2)[-1], whole, atol=0.02), chunks
    backend.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_side_by_side_are_as_alone(models: Any, family: str) -> None:
    backend = opened(models(family), "q8_0")
    model = backend._model
    alone = [logits(model, [length, 1])[-1] for length in (10, 33, 80)]
    model.slots.clear()
    for slot, length in enumerate((10, 33, 80)):
        logits(model, [length], slot)
    work = [
        SequenceWork(seq_id=slot, tokens=(TEXT[length],), position=length, sample=True)
        for slot, length in enumerate((10, 33, 80))
    ]
    done = model.step(work)
    assert done is not None
    for row, expected in zip(done[1], alone, strict=True):
        assert torch.allclose(row, expected, atol=0.02)
    backend.close()


@pytest.mark.parametrize("kind", sorted(BITS))
def test_copies_and_saved_states_go_on_alike(models: Any, kind: str) -> None:
    backend = opened(models("llama"), kind)
    model = backend._model
    logits(model, [60])
    assert backend.share(0, 1, 60)
    backend.restore_state(2, backend.save_state(0))
    work = [
        SequenceWork(seq_id=slot, tokens=tuple(TEXT[60:70]), position=60, sample=True)
        for slot in range(3)
    ]
    rows = [done[1] for one in work if (done := model.step([one])) is not None]
    assert len(rows) == 3
    assert all(torch.equal(row, rows[0]) for row in rows)
    backend.close()


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.002), ("q4_0", 0.1)])
def test_a_trained_model_says_nearly_the_same(kind: str, most: float) -> None:
    """Kullback-Leibler divergence from the plain cache, over 150 tokens."""
    folder = Path(__file__).parents[1] / "data" / "demo"
    text = (folder / "config.json").read_text()
    expected, found = (_logs_of(folder, text, one) for one in ("f32", kind))
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < float(divergence) < most


def _logs_of(folder: Path, text: str, kind: str) -> Any:
    backend = opened(folder, kind)
    tokens = backend.tokenize(text, add_special=True, parse_special=False)[:150]
    rows = [
        done[1]
        for at, token in enumerate(tokens)
        if (done := backend._model.step(
            [SequenceWork(seq_id=0, tokens=(token,), position=at, sample=True)]
        )) is not None
    ]  # fmt: skip
    backend.close()
    return torch.log_softmax(torch.cat(rows).float(), -1)


# -- transformers' own caches


def planned_bytes(folder: Path, n_ctx: int) -> int:
    given = settings(n_ctx=n_ctx, n_seq_max=1)
    return sum(caches_by_device(read_checkpoint(folder), given)["cpu"])


def cache_bytes(cache: Any) -> int:
    """What its tensors show; a window is a view of one cell more."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("static", [True, False])
def test_what_is_planned_is_what_their_caches_take(models: Any, family: str, static: bool) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    folder, n_cells = models(family), 90
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if static:
        cache: Any = StaticCache(config=model.config, max_cache_len=n_cells)
    else:
        cache = DynamicCache(config=model.config)
    n_fed = 20 if static else n_cells
    with torch.inference_mode():
        model(torch.tensor([TEXT[:n_fed]]), past_key_values=cache)
    expected = planned_bytes(folder, n_cells)
    if not static:  # of a window, theirs keeps the token that is yet to come out
        windows = sum(getattr(layer, "is_sliding", False) for layer in cache.layers)
        expected -= windows * 2 * cache.layers[0].keys[:, :, :1].nbytes
    assert cache_bytes(cache) == expected
