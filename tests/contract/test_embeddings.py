"""Embeddings and ranks: what was sized is what is loaded, and company changes no vector."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.engine.process import Engine
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.errors import ContextLengthError, EngineRefusedError, UsageError
from loadmaster.model.source import read_model
from loadmaster.model.types import Pooling
from loadmaster.plan import memory
from loadmaster.plan.types import EngineSettings, Sizing
from tests.encoder_parts import write_bert, write_reranker
from tests.engine_parts import load_request, request, settings

pytestmark = pytest.mark.engine

TEXTS = ("def read(path):", "def read_file(path):", "the cat sat", "x", "class Error(Exception):")
Gpu = Callable[..., VirtualDevice]


def pooled(pooling: Pooling | None) -> EngineSettings:
    return settings(
        n_ctx=512, n_seq_max=4, n_batch=64, n_ubatch=64, n_outputs_max=64, pooling=pooling
    )


@pytest.fixture(scope="module", params=["llamacpp", "fake"])
def engine(
    request: pytest.FixtureRequest, engine_build: EngineBuild, demo_model: Path
) -> Iterator[Engine]:
    with Engine.start(engine_build, backend=request.param) as engine:
        engine.load(load_request(demo_model, pooled("mean")))
        yield engine


def tokens(engine: Engine, *texts: str) -> list[list[int]]:
    return [engine.tokenize(text, False) for text in texts]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_vectors_have_length_one_and_the_models_width(engine: Engine) -> None:
    vectors = engine.embed(tokens(engine, *TEXTS))
    assert engine.loaded is not None
    assert [len(vector) for vector in vectors] == [engine.loaded.n_embd] * len(TEXTS)
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * len(TEXTS))


def test_company_changes_no_vector(engine: Engine) -> None:
    prompts = tokens(engine, *TEXTS) * 4
    alone = [engine.embed([prompt])[0] for prompt in prompts[: len(TEXTS)]]
    for prompt_vector, expected in zip(engine.embed(prompts), alone * 4, strict=True):
        assert prompt_vector == pytest.approx(expected, abs=1e-4)


def test_unnormalized_vectors_point_the_same_way(engine: Engine) -> None:
    (prompt,) = tokens(engine, TEXTS[0])
    raw, scaled = engine.embed([prompt], normalize=False)[0], engine.embed([prompt])[0]
    assert dot(raw, scaled) == pytest.approx(math.hypot(*raw))


def test_no_prompts_no_vectors(engine: Engine) -> None:
    assert engine.embed([]) == []


@pytest.mark.parametrize("length", [0, 65])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(
    engine: Engine, length: int
) -> None:
    with pytest.raises(ContextLengthError) as refusal:
        engine.embed([[1], [1] * length])
    assert refusal.value.numbers == {"n_prompt": length, "n_ctx": 64}
    assert len(engine.embed([[1] * 64])) == 1


def test_tokens_outside_the_vocabulary_are_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="token 99999999"):
        engine.embed([[1, 99_999_999]])


def test_an_engine_for_embeddings_writes_no_text(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"for embeddings \(mean\)"):
        engine.generate(request("text", [1, 2], 1))
    with pytest.raises(UsageError, match="for ranks"):
        engine.rerank("a", ["b"])


@pytest.mark.parametrize("backend", ["llamacpp", "fake"])
def test_an_engine_for_text_embeds_nothing(
    backend: str, engine_build: EngineBuild, demo_model: Path
) -> None:
    with Engine.start(engine_build, backend=backend) as engine:
        engine.load(load_request(demo_model))
        with pytest.raises(UsageError, match="not for embeddings"):
            engine.embed([[1]])


# -- llama.cpp's own


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_similar_texts_lie_together(
    engine_build: EngineBuild, demo_model: Path, pooling: Pooling
) -> None:
    with Engine.start(engine_build) as engine:
        engine.load(load_request(demo_model, pooled(pooling)))
        read, read_file, cat, _, _ = engine.embed(tokens(engine, *TEXTS))
        assert dot(read, read_file) > 0.8 > dot(read, cat)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_what_was_sized_is_loaded_and_stays(
    engine_build: EngineBuild, demo_model: Path, stand_in_gpu: Gpu, pooling: Pooling
) -> None:
    on_gpu = replace(pooled(pooling), n_gpu_layers=2, layers_per_device=(2,))
    with Engine.start(engine_build, devices=[stand_in_gpu()]) as engine:
        sizing = engine.size(demo_model, on_gpu)
        assert isinstance(sizing, Sizing)
        engine.load(load_request(demo_model, on_gpu))
        before = engine.commit_peak(1.0)
        engine.embed([[1] * 64, [2] * 20, [3] * 20, [4] * 20] * 3)
        after = engine.memory()
        row = sizing.on("gpu:0")
        assert before.buffers == after.buffers == sizing.buffers
        assert after.device_peak_bytes["gpu:0"] == (
            row.model_bytes + row.context_bytes + row.compute_bytes
        )


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_embeds(engine_build: EngineBuild, tmp_path: Path, pooling: Pooling) -> None:
    path = write_bert(tmp_path / "bert.gguf")
    spec = read_model(path)
    assert spec.pooling == "mean"
    with Engine.start(engine_build) as engine:
        sizing = engine.size(path, pooled(pooling))
        assert isinstance(sizing, Sizing)
        engine.load(load_request(path, pooled(pooling)))
        engine.commit_peak(1.0)
        first, second = engine.embed([[1, 2, 3, 4], [5, 6]])
        assert engine.embed([[5, 6]])[0] == pytest.approx(second, abs=1e-4)
        assert len(first) == 64
        report = engine.memory()
    assert report.buffers == sizing.buffers
    wanted = pooled(pooling)
    assert memory.model_bytes(spec, wanted, {})["cpu"] == sizing.on("cpu").model_bytes
    assert sizing.on("cpu").context_bytes == sum(memory.kv_bytes(spec, wanted, {}).values()) == 0


def test_a_reranker_ranks(engine_build: EngineBuild, tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "rerank.gguf")
    with Engine.start(engine_build) as engine:
        loaded = engine.load(load_request(path, pooled("rank")))
        assert (loaded.pooling, loaded.n_embd) == ("rank", 2)
        engine.commit_peak(1.0)
        scores = engine.rerank("what is it", ["it is this", "no", "it is this"])
        assert scores[0] == pytest.approx(scores[2])
        assert all(0 <= score <= 1 for score in scores)  # qwen3: a softmax
        assert scores[0] != scores[1]


def test_a_model_without_a_classifier_does_not_rank(
    engine_build: EngineBuild, demo_model: Path
) -> None:
    with Engine.start(engine_build) as engine:
        with pytest.raises(EngineRefusedError, match="does not rank"):
            engine.load(load_request(demo_model, pooled("rank")))
        assert engine.failure is None


def test_the_fake_engine_ranks_by_letters(engine_build: EngineBuild, demo_model: Path) -> None:
    with Engine.start(engine_build, backend="fake") as engine:
        engine.load(load_request(demo_model, pooled("rank")))
        assert engine.rerank("abc", ["xaybzc", "ab", "x"]) == pytest.approx([1, 2 / 3, 0])


@pytest.mark.parametrize("changes", [{"n_ubatch": 32}, {"n_seq_max": 3}, {"n_outputs_max": 32}])
def test_sizes_that_cannot_pool_are_refused(
    engine_build: EngineBuild, demo_model: Path, changes: dict[str, int]
) -> None:
    uneven = replace(pooled("mean"), **changes)  # type: ignore[arg-type]
    with Engine.start(engine_build) as engine:
        with pytest.raises(EngineRefusedError, match="multiple of n_seq_max"):
            engine.load(load_request(demo_model, uneven))
        assert engine.failure is None
