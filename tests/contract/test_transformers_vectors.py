"""Embeddings of the transformers engine: vectors as transformers' own model makes them, company and
order change none, nothing is kept, and what cannot be pooled is refused."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import find_python_build
from loadmaster.errors import ContextLengthError, EngineError, EngineRefusedError, UsageError
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.types import Pooling
from tests.engine_parts import request
from tests.hf_parts import files_of, load_request, write_model, write_tokenizer

prepare()

from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402

PROMPTS = [[(7 * i * i + 3 * i + 11 * k) % 250 + 1 for i in range(n)]
           for k, n in enumerate((1, 9, 30, 64))]  # fmt: skip


def opened(folder: Path, pooling: Pooling, **changes: Any) -> Transformers:
    backend = Transformers()
    given = {"pooling": pooling, "n_seq_max": 4, "n_ubatch": 128} | changes
    backend.load(load_request(folder, **given), lambda _: True)
    return backend


def theirs(folder: Path, prompt: list[int], pooling: Pooling) -> Any:
    """transformers' own hidden states of one prompt alone, pooled."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor([prompt])).last_hidden_state[0]
    return {"mean": rows.mean(0), "last": rows[-1], "cls": rows[0]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_vectors_are_those_of_transformers(models: Any, family: str, pooling: Pooling) -> None:
    folder = models(family)
    backend = opened(folder, pooling)
    for vector, prompt in zip(backend.embed(PROMPTS), PROMPTS, strict=True):
        expected = theirs(folder, prompt, pooling)
        assert torch.allclose(torch.tensor(vector), expected, atol=2e-4, rtol=1e-3)
    backend.close()


@pytest.mark.parametrize("changes", [{}, {"quantize": "fp8"}, {"quantize": "int8"}])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_a_model_saved_without_its_output_makes_the_same_vectors(
    models: Any, tmp_path: Path, family: str, changes: Any
) -> None:
    from transformers import AutoModel

    whole, folder = models(family), tmp_path / "base"
    AutoModel.from_pretrained(whole, dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    model = read_checkpoint(folder)
    assert not model.writes_text
    other = opened(whole, "last", **changes)
    expected = other.embed(PROMPTS)
    other.close()
    backend = opened(folder, "last", **changes)
    assert backend.embed(PROMPTS) == expected
    given = load_request(folder, pooling="last", n_seq_max=4, n_ubatch=128, **changes)
    sizing = backend.size(given.model_path, given.settings)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    backend.close()
    with pytest.raises(EngineRefusedError, match="writes no text"):
        backend.load(load_request(folder, **changes), lambda _: True)


@pytest.mark.parametrize(
    "bits", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}]
)
def test_one_that_was_saved_so_in_few_bits_loads_as_it_is(
    models: Any, tmp_path: Path, bits: dict[str, bool]
) -> None:
    from transformers import AutoModel, BitsAndBytesConfig

    config = BitsAndBytesConfig(**bits)
    model = AutoModel.from_pretrained(
        models("llama"), dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    backend = opened(tmp_path, "mean", compute_type="bf16")
    given = load_request(tmp_path, pooling="mean", compute_type="bf16")
    sizing = backend.size(given.model_path, given.settings)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[1]])).last_hidden_state[0].float().mean(0)
    found = torch.tensor(backend.embed([PROMPTS[1]])[0])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.999
    backend.close()


def test_company_and_order_change_no_vector(models: Any) -> None:
    backend = opened(models("llama"), "mean")
    alone = [backend.embed([prompt])[0] for prompt in PROMPTS]
    turned = backend.embed(PROMPTS[::-1])[::-1]
    for vector, expected in zip(turned, alone, strict=True):
        assert vector == pytest.approx(expected, abs=1e-5)
    backend.close()


@pytest.mark.parametrize("changes", [{}, {"quantize": "nf4", "double_quant": True}])
def test_what_was_sized_is_loaded_and_no_cell_is_kept(models: Any, changes: Any) -> None:
    backend = Transformers()
    given = load_request(models("mistral"), pooling="mean", n_ubatch=128, **changes)
    sizing = backend.size(given.model_path, given.settings)
    loaded = backend.load(given, lambda _: True)
    backend.commit_peak(5.0)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    assert [row.context_bytes for row in backend.memory().buffers] == [0]
    assert (loaded.pooling, loaded.n_embd, loaded.n_embed_max) == ("mean", 64, 128)
    backend.close()
    assert backend.memory().buffers == ()


def test_a_step_beyond_its_size_is_an_error(models: Any) -> None:
    backend = opened(models("llama"), "last", n_ubatch=64)
    steps: list[list[list[int]]] = [[[1] * 65], [[1]] * 5, [[]]]
    for prompts in steps:
        with pytest.raises(EngineError, match="4 prompts and n_ubatch 64"):
            backend.embed(prompts)
    with pytest.raises(EngineError, match="writes text"):
        backend.step([])
    backend.close()


def test_an_interrupted_step_is_an_error_and_the_next_one_runs(models: Any) -> None:
    backend = opened(models("llama"), "mean")
    expected = backend.embed(PROMPTS)
    backend.interrupt()
    with pytest.raises(EngineError, match="interrupted"):
        backend.embed(PROMPTS)
    backend.resume()
    assert backend.embed(PROMPTS) == expected
    backend.close()


def test_a_model_that_looks_both_ways_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    for changes in ({}, {"pooling": "mean"}):
        backend = Transformers()
        with pytest.raises(EngineRefusedError, match="attends in both directions"):
            backend.load(load_request(folder, **changes), lambda _: True)


# -- through the worker


@pytest.fixture(scope="module")
def engine(models: Any) -> Iterator[Engine]:
    folder = models("llama")
    given = load_request(folder, pooling="mean", n_seq_max=4, n_ubatch=64)
    with Engine.start(find_python_build(), backend="transformers") as engine:
        engine.load(given, files=files_of(folder))
        engine.commit_peak()
        yield engine


def test_prompts_of_many_steps_come_back_in_order_and_of_length_one(
    engine: Engine, models: Any
) -> None:
    prompts = [PROMPTS[k % 4] for k in (3, 0, 1, 2, 1, 3, 0)]
    vectors = engine.embed(prompts)
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * 7)
    for vector, prompt in zip(vectors, prompts, strict=True):
        expected = theirs(models("llama"), prompt, "mean")
        assert vector == pytest.approx((expected / expected.norm()).tolist(), abs=1e-4)


def test_what_it_does_not_do_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextLengthError):
        engine.embed([[1] * 65])
    with pytest.raises(UsageError, match=r"for embeddings \(mean\)"):
        engine.generate(request("text", [1, 2], 1))
    with pytest.raises(UsageError, match="for ranks"):
        engine.rerank("a", ["b"])
