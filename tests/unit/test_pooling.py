"""A model opened for vectors: what its header says, and what its plan counts."""

from dataclasses import replace

import pytest

from loadmaster.model.hparams import has_formula, layers_of
from loadmaster.model.types import POOLINGS, LayerKind
from loadmaster.plan import memory, overhead
from loadmaster.plan.choices import base_settings, first_choice
from loadmaster.plan.types import EngineSettings, Knobs, Workload
from tests.toy import toy_model


def settings_of(knobs: Knobs, n_seq_max: int = 1, n_ctx: int = 2048) -> EngineSettings:
    workload = Workload(n_ctx=n_ctx, n_seq_max=n_seq_max)
    choice = first_choice(toy_model(), workload, knobs)
    return base_settings(choice, workload, knobs, n_gpus=0, n_threads=1)


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(None, None), (0, None), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank"), (5, None)],
)
def test_the_header_names_the_pooling(kind: int | None, pooling: str | None) -> None:
    model = toy_model()
    metadata = dict(model.metadata) | ({} if kind is None else {"llama.pooling_type": kind})
    assert replace(model, metadata=metadata).pooling == pooling


@pytest.mark.parametrize("n_seq_max", [1, 3, 8])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_token_of_a_step_is_an_output(pooling: str, n_seq_max: int) -> None:
    pooled = settings_of(Knobs(pooling=pooling, n_ubatch=100), n_seq_max)  # type: ignore[arg-type]
    assert pooled.pooling == pooling
    assert pooled.n_batch == pooled.n_ubatch == pooled.n_outputs_max >= 100
    assert pooled.n_ubatch % n_seq_max == 0


def test_an_output_has_logits_and_a_vector() -> None:
    model = toy_model()
    pooled = settings_of(Knobs(pooling="mean", n_ubatch=64))
    text = replace(pooled, pooling=None)
    assert memory.output_bytes(model, text) == 64 * 4 * model.n_vocab
    assert memory.output_bytes(model, pooled) == 64 * 4 * (model.n_vocab + model.n_embd)


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert", "gemma-embedding"])
def test_an_encoder_has_no_cache(architecture: str) -> None:
    metadata = {f"{architecture}.block_count": 2, f"{architecture}.attention.head_count": 4,
                f"{architecture}.embedding_length": 64}  # fmt: skip
    layers, known = layers_of(architecture, metadata, [])
    assert known
    assert has_formula(architecture)
    assert [layer.kind for layer in layers] == [LayerKind.NONE] * 2


def test_schemas_take_a_second_vocabulary() -> None:
    model, settings = toy_model(n_vocab=1000), settings_of(Knobs())
    plain, with_schemas = (
        sum(item.bytes for item in overhead.host_items(model, settings, overheads))
        for overheads in (
            overhead.default_overheads(()),
            overhead.default_overheads((), schemas=True),
        )
    )
    assert with_schemas - plain == overhead.SCHEMA_BYTES + 1000 * overhead.SCHEMA_TOKEN_BYTES
    assert overhead.default_overheads((), server=True).schemas
