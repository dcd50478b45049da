"""Checkpoints as MODEL: folders, the Hub's cache, repositories, shapes; through the command too."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.hostile_server import COMMIT, Content, HostileServer, hub_path, hub_routes
from loadmaster.errors import DamagedFileError, NotFoundError, UsageError
from loadmaster.interfaces.cli.main import run
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.model.hf_pooling import MODULES, POOLING
from loadmaster.model.hf_source import is_checkpoint, read_checkpoint
from loadmaster.plan.types import DoesNotFit, Quantize
from loadmaster.tasks.comparison import expand
from loadmaster.tasks.locating import locate_header, locate_model
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.pull import pull
from tests import checkpoint_parts as parts
from tests import remote_parts

REPO = remote_parts.REPO
HUB = f"hf:{REPO}"
ON = ["--machine", "rtx3060-12g", "--json"]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remote_parts.isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = parts.write_checkpoint(tmp_path / "served", shards=3)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    return folder


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    served = {path.name: path for path in local.iterdir()}
    files = {hub_path(REPO, name): path for name, path in served.items()}
    with HostileServer(files, routes=hub_routes(REPO, served)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def comparable(model: AnyModel) -> CheckpointSpec:
    assert isinstance(model, CheckpointSpec)
    where = Path("x")
    return replace(
        model, folder=where, name="", files=(), header_bytes=model.file_bytes, remote=False
    )


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert run(["plan", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


# ---- the Hub


def test_a_repository_is_read_as_its_files_are(server: HostileServer, local: Path) -> None:
    located = locate_header(HUB)
    assert comparable(located.model) == comparable(read_checkpoint(local))
    assert located.model.name == REPO.partition("/")[2]
    assert f"loadmaster pull {HUB} --safetensors" in located.notes[0]


def test_how_a_repository_pools_is_read_too(server: HostileServer, tmp_path: Path) -> None:
    folder = parts.without_output(tmp_path / "embeds")
    (folder / POOLING).parent.mkdir()
    (folder / POOLING).write_text(json.dumps({"pooling_mode_lasttoken": True}))
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Pooling", "Dense")]
    (folder / MODULES).write_text(json.dumps(kinds))
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    server.routes |= hub_routes(REPO, {name: folder / name for name in names})
    server.files |= {hub_path(REPO, name): Content(folder / name) for name in names}
    model = locate_header(HUB).model
    assert comparable(model) == comparable(read_checkpoint(folder))
    assert (model.pooling, comparable(model).dense_after_pooling) == ("last", True)


def test_what_is_pulled_is_found_and_planned_alike(server: HostileServer, local: Path) -> None:
    served = {path.name: path for path in local.iterdir()} | {"pytorch_model.bin": b"no"}
    server.routes |= hub_routes(REPO, served)
    pulled = pull(HUB, remote_parts.options(), remote_parts.Watcher())
    assert {file.path.name for file in pulled.files} == {path.name for path in local.iterdir()}
    assert comparable(read_checkpoint(pulled.path)) == comparable(read_checkpoint(local))
    located = locate_header(HUB)
    assert comparable(located.model) == comparable(read_checkpoint(local))
    assert not any("not downloaded" in note for note in located.notes)  # it is here


def test_safetensors_beside_a_gguf_are_pulled_when_asked_for(
    server: HostileServer, local: Path
) -> None:
    served = {path.name: path for path in local.iterdir()} | {"m-Q8_0.gguf": b"GGUF"}
    server.routes |= hub_routes(REPO, served)
    options = replace(remote_parts.options(), safetensors=True)
    assert is_checkpoint(pull(HUB, options, remote_parts.Watcher()).path)
    with pytest.raises(NotFoundError, match="no config"):
        pull(f"{HUB}:Q8_0", options, remote_parts.Watcher())


def test_safetensors_are_what_quantize_means_beside_any_number_of_ggufs(
    server: HostileServer,
) -> None:
    folder = pull(HUB, remote_parts.options(), remote_parts.Watcher()).path
    for label in ("Q8_0", "Q4_0"):
        (folder / f"m-{label}.gguf").write_bytes(b"GGUF")
    assert isinstance(locate_model(HUB, "nf4").model, CheckpointSpec)
    with pytest.raises(UsageError, match="has 2 GGUF models"):
        locate_model(HUB)


@pytest.mark.parametrize("named", ["/m-Q8_0.gguf", ":Q8_0"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_safetensors_do_not_stand_for_a_gguf_that_is_named(
    server: HostileServer, named: str, quantize: Quantize | None
) -> None:
    pull(HUB, remote_parts.options(), remote_parts.Watcher())
    with pytest.raises(NotFoundError, match="is not on this machine"):
        locate_model(HUB + named, quantize)
    with pytest.raises(UsageError, match="has safetensors and no GGUF"):
        locate_header(HUB + named, quantize)


def test_little_is_read_and_only_once(server: HostileServer) -> None:
    first = locate_header(HUB).model
    assert 0 < first.header_bytes < 100_000
    n_bytes = server.traffic.body_bytes
    assert comparable(locate_header(HUB).model) == comparable(first)
    assert server.traffic.body_bytes - n_bytes < 20_000  # the listing alone


def test_what_is_on_the_disk_are_holes(server: HostileServer) -> None:
    model = locate_header(HUB).model
    shards = [file.path for file in model.files[1:]]
    assert all(path.stat().st_blocks * 512 <= 8192 for path in shards)
    assert sum(path.stat().st_size for path in shards) == model.file_bytes


def test_code_in_a_repository_is_not_run(server: HostileServer, local: Path) -> None:
    served = {path.name: path for path in local.iterdir()} | {"modeling_x.py": b"print(1)"}
    server.routes |= hub_routes(REPO, served)
    with pytest.raises(DamagedFileError, match=r"modeling_x\.py"):
        locate_header(HUB)


def test_a_gguf_comes_first_unless_quantize_is_given(server: HostileServer, local: Path) -> None:
    served = {path.name: path for path in local.iterdir()} | {"m-Q8_0.gguf": b"GGUF"}
    server.routes |= hub_routes(REPO, served)
    assert isinstance(locate_header(HUB, "nf4").model, CheckpointSpec)
    with pytest.raises(NotFoundError):  # the GGUF is looked for, and is not served
        locate_header(HUB)
    assert expand([HUB]) == (f"{HUB}/m-Q8_0.gguf",)
    assert expand([HUB], "nf4") == (f"{HUB} --quantize nf4",)


def test_a_snapshot_of_the_cache_is_used_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = parts.write_checkpoint(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    model = locate_header(HUB).model
    assert isinstance(model, CheckpointSpec)
    assert (model.folder, model.name) == (snapshot, REPO.partition("/")[2])
    assert not model.remote


# ---- shapes


def test_a_shape_by_its_label_or_by_the_flag() -> None:
    by_label = locate_header("shape:llama-3-8b@nf4")
    by_flag = locate_header("shape:llama-3-8b", "nf4")
    assert by_label.model == by_flag.model
    assert by_label.quantize == by_flag.quantize == "nf4"
    assert by_label.model.weight_bytes == 2 * 8_030_261_248
    with pytest.raises(UsageError, match="two quantizations"):
        locate_header("shape:llama-3-8b@int8", "nf4")


@pytest.mark.parametrize(
    ("name", "n_weights"),
    [("llama-3.1-405b", 405_853_388_800), ("mixtral-8x7b", 46_702_792_704),
     ("qwen2.5-7b", 7_615_616_512), ("qwen3-30b-a3b", 30_532_122_624),
     ("gemma-2-9b", 9_241_705_984)],
)  # fmt: skip
def test_shapes_have_the_published_number_of_weights(name: str, n_weights: int) -> None:
    assert parts.shape(name).weight_bytes == 2 * n_weights


def test_families_that_are_planned_as_gguf_alone() -> None:
    with pytest.raises(NotFoundError, match="as a GGUF alone"):
        locate_header("shape:gpt-oss-20b@nf4")


# ---- the command


def test_plan_of_a_folder(local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, str(local), "--quantize", "nf4", *ON)
    engine = document["engine"]
    assert isinstance(engine, dict)
    assert (engine["quantize"], engine["double_quant"]) == ("nf4", True)
    assert run(["plan", str(local), "--quantize", "int8", "--machine", "rtx3060-12g"]) == 0
    text = capsys.readouterr().out
    assert "INT8" in text
    assert "all 3 layers on gpu:0" in text
    assert "--quantize int8" in text


def test_a_comparison_has_a_small_cache_too_unless_one_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--compare", "shape:llama-3-8b@nf4", "--machine", "rtx3060-12g", "--json"]
    rows = planned(capsys, *words)["candidates"]
    assert isinstance(rows, list)
    assert [(row["type_k"], row["type_v"]) for row in rows] == [("bf16", "bf16"), ("q8_0", "q8_0")]
    fixed = planned(capsys, *words, "--kv", "q4_0")["candidates"]
    assert isinstance(fixed, list)
    assert [row["type_k"] for row in fixed] == ["q4_0"]


def test_several_gpus_end_with_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "shape:llama-3-70b@nf4", "--machine", "rtx4090-x2"]) == 0
    text = capsys.readouterr().out
    assert "vllm serve meta-llama/Meta-Llama-3-70B-Instruct --tensor-parallel-size 2" in text
    assert "--max-model-len 8192 --quantization bitsandbytes" in text


def test_another_machine_is_among_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "shape:llama-3.1-405b@nf4", "--machine", "rtx4090-x8"]
    assert run(words) == 3
    assert "--machine a100-80g-x4" in capsys.readouterr().err


@pytest.mark.parametrize("header_only", [True, False])
def test_a_machine_is_proposed_where_one_can_be_named(local: Path, header_only: bool) -> None:
    outcome = Planner(str(local), PlanOptions(ram="64MiB"), header_only=header_only).plan()
    assert isinstance(outcome, DoesNotFit)
    proposed = {flag for one in outcome.nearest for flag in one.flags}
    assert ("--machine" in proposed) is header_only


def test_engines_in_one_table(local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shape:llama-3-8b@Q4_K_M", "shape:llama-3-8b@NF4", str(local), "--compare"]
    document = planned(capsys, *words, *ON)
    rows = document["candidates"]
    assert isinstance(rows, list)
    found = {(row["model"], row["quantization"], row["engine"]) for row in rows}
    assert found == {
        ("llama-3-8b", "Q4_K_M", "llama.cpp"), ("llama-3-8b", "NF4", "transformers"),
        ("served", "BF16", "transformers"), ("served", "INT8", "transformers"),
        ("served", "NF4", "transformers"),
    }  # fmt: skip
    mmlu = {row["quantization"]: row["mmlu"] for row in rows if row["model"] == "llama-3-8b"}
    assert mmlu["NF4"]["value"] == 63.42
    assert "transformers rows" in mmlu["NF4"]["source"]
    assert run(["plan", *words, "--machine", "rtx3060-12g"]) == 0
    text = capsys.readouterr().out
    assert "engine" in text.splitlines()[2]
    assert f"{local} --quantize nf4" not in text.split("take")[0]


def test_a_gguf_is_not_quantized_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "--quantize", "nf4", "--machine", "cpu-64g"]) == 2
    assert "is a GGUF in" in capsys.readouterr().err


def test_a_folder_of_pickled_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"pytorch_model\.bin holds pickled weights"):
        locate_header(str(tmp_path))


def test_a_folder_without_a_model_says_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no safetensors in") as caught:
        locate_header(str(tmp_path))
    assert "a GGUF file" in (caught.value.hint or "")
    (parts.write_checkpoint(tmp_path / "m") / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"no config\.json in"):
        locate_header(str(tmp_path / "m"))
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(DamagedFileError, match="is a folder") as named:
        locate_header(str(tmp_path))
    assert "a.gguf" in (named.value.hint or "")


def test_what_a_run_will_miss_is_said_by_the_plan(local: Path) -> None:
    assert locate_header(str(local)).notes == (
        "tokenizer.json is missing: it runs when that is there",
    )
    (local / "tokenizer.json").write_text("{}")
    assert locate_header(str(local)).notes == ()


def test_weights_that_are_to_be_quantized_are_pulled_as_safetensors() -> None:
    for quantize, command in ((None, f"`loadmaster pull {HUB}`"), ("nf4", "--safetensors`")):
        with pytest.raises(NotFoundError, match="not on this machine") as caught:
            locate_model(HUB, quantize)  # type: ignore[arg-type]
        assert (caught.value.hint or "").endswith(command)


# ---- a plan's file


@pytest.fixture
def no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


def refused_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, change: Callable[[], object]
) -> str:
    """What a run says of a plan, when something happened to the model after it was made."""
    document = planned(capsys, model, *ON)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    change()
    assert run(["run", "--plan", str(tmp_path / "plan.json"), "hi"]) in (4, 7)
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_input")
def test_a_plan_without_weights_is_not_run(
    server: HostileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused_run(capsys, tmp_path, "shape:llama-3-8b@nf4", bool)
    assert "is a plan for a shape: dimensions without weights" in said
    said = refused_run(capsys, tmp_path, HUB, bool)
    assert f"`{REPO.partition('/')[2]}` was planned from its header alone" in said


@pytest.mark.usefixtures("no_input")
def test_which_files_changed_is_not_guessed(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = local / "model-00003-of-00003.safetensors"
    said = refused_run(capsys, tmp_path, str(local), lambda: os.utime(last, (1, 1)))
    assert "one of the 4 files in `served` changed on disk" in said
