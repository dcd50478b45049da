"""What a folder says of how its vectors are made."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import DamagedFileError, UsageError
from loadmaster.model.hf_pooling import MODULES, POOLING, TEXT, read_pooling
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.hf_placement import device_map_of
from loadmaster.plan.types import Workload
from tests import checkpoint_parts as parts


def folder(path: Path, config: object, modules: object = None) -> Path:
    (path / POOLING).parent.mkdir(parents=True)
    (path / POOLING).write_text(json.dumps(config))
    if modules is not None:
        (path / MODULES).write_text(json.dumps(modules))
    return path


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_is_read(tmp_path: Path, config: dict[str, Any], pooling: str) -> None:
    found = read_pooling(folder(tmp_path, config))
    assert (found.pooling, found.dense) == (pooling, False)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
        {"pooling_mode": "weightedmean"},
    ],
)
def test_other_ways_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(DamagedFileError, match="pools in a way"):
        read_pooling(folder(tmp_path, config))


def test_a_folder_without_it_writes_text(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == TEXT
    assert read_pooling(folder(tmp_path, ["no object"])) == TEXT
    (tmp_path / POOLING).write_text("{")
    assert read_pooling(tmp_path) == TEXT


def test_a_plan_for_vectors_has_no_cells(tmp_path: Path) -> None:
    path = folder(parts.write_checkpoint(tmp_path / "m"), {"pooling_mode_lasttoken": True})
    model = read_checkpoint(path)
    assert model.pooling == "last"
    workload = Workload(n_ctx=256, n_seq_max=4)
    given = {"workload": workload, "n_ubatch": 256}
    text = parts.fitting(model, "cpu-64g", **given)
    vectors = parts.fitting(model, "cpu-64g", pooling="last", **given)
    assert text.device("cpu").of("kv") > 0 == vectors.device("cpu").of("kv")
    assert vectors.engine.pooling == "last"
    assert "--kv" not in [flag for one in vectors.alternatives for flag in one.flags]


def test_a_model_without_its_output_makes_vectors_alone(tmp_path: Path) -> None:
    whole = parts.spec(tmp_path)
    model = read_checkpoint(parts.without_output(tmp_path / "m"))
    assert (model.writes_text, model.pooling, model.tied_output) == (False, "mean", False)
    output = next(tensor for tensor in whole.tensors if tensor.role == "output")
    assert whole.weight_bytes - model.weight_bytes == output.size_bytes
    assert whole.writes_text
    with pytest.raises(UsageError, match="writes no text") as refused:
        parts.plan(model, "cpu-64g")
    assert "/v1/embeddings" in str(refused.value.hint)
    plan = parts.fitting(model, "cpu-64g", pooling="mean", n_ubatch=256)
    assert plan.predicted.decode_tok_s is None
    assert plan.predicted.prefill_tok_s
    assert any("planned for vectors (mean pooling)" in note for note in plan.notes)


def test_its_pooling_file_is_followed_and_a_tied_output_writes(tmp_path: Path) -> None:
    path = folder(parts.without_output(tmp_path / "m"), {"pooling_mode_lasttoken": True})
    assert read_checkpoint(path).pooling == "last"
    tied = read_checkpoint(parts.without_output(tmp_path / "t", tie_word_embeddings=True))
    assert (tied.writes_text, tied.pooling) == (True, None)


def test_an_output_that_is_missing_of_a_whole_model_is_a_missing_shard(tmp_path: Path) -> None:
    path = parts.write_checkpoint(tmp_path / "m")
    rows = {k: v for k, v in parts.LOADED["llama"]["tensors"].items() if k != "lm_head.weight"}
    parts.write_shard(path / "model.safetensors", rows)
    with pytest.raises(DamagedFileError, match="no `lm_head"):
        read_checkpoint(path)


def test_over_several_gpus_the_output_is_its_embedding(tmp_path: Path) -> None:
    model = read_checkpoint(parts.without_output(tmp_path / "m"))
    rows = dict(device_map_of(model, ["gpu:0", "gpu:0", "gpu:1"]))
    assert rows["lm_head"] == rows["model.embed_tokens"] == "gpu:0"


def test_a_dense_layer_and_ranks_are_refused(tmp_path: Path) -> None:
    kinds = ("Transformer", "Pooling", "Dense")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    checkpoint = parts.write_checkpoint(tmp_path / "m")
    model = read_checkpoint(folder(checkpoint, {"pooling_mode_mean_tokens": True}, modules))
    with pytest.raises(UsageError, match="dense layer"):
        parts.plan(model, "cpu-64g", pooling="mean")
    with pytest.raises(UsageError, match="ranks no documents"):
        parts.plan(model, "cpu-64g", pooling="rank")
    parts.fitting(model, "cpu-64g")  # text it writes all the same
