"""`batch plan` and the batch workload of `plan`, for safetensors models."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loadmaster.engine.process import Engine
from loadmaster.interfaces.cli.batch_plan import plan as batch_plan
from loadmaster.interfaces.cli.batch_run import submit
from loadmaster.interfaces.cli.plan import command as plan_command
from loadmaster.jobs.store import JobStore
from loadmaster.plan.codec import plan_from_json
from loadmaster.tasks.batch.jobs import open_shelf
from tests import checkpoint_parts as parts

SHAPE = "shape:llama-3-8b@nf4"
ON = ("--machine", "rtx3060-12g")


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape has no tokenizer: no worker is started to find that out."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(Engine, "start", started)


def requests(path: Path, n: int, url: str = "/v1/chat/completions", **body: Any) -> Path:
    bodies = body or {"messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 40}
    line = {"method": "POST", "url": url, "body": {"model": "m", **bodies}}
    path.write_text("".join(json.dumps({"custom_id": f"r{i}", **line}) + "\n" for i in range(n)))
    return path


def printed(command: Any, *words: str) -> str:
    found = CliRunner().invoke(command, list(words), catch_exceptions=False)
    assert found.exit_code == 0
    return found.stdout


def test_a_file_gets_sequences_a_time_and_levers(tmp_path: Path) -> None:
    file = str(requests(tmp_path / "in.jsonl", 300))
    text = printed(batch_plan, file, "-m", SHAPE, *ON)
    assert "requests per hour" in text
    assert "for each sequence; what prompts share is copied, not fed again" in text
    assert "so begun now it ends" in text
    assert "one request at a time:" in text
    assert "\nconsidered\n" in text
    assert "op-offload" not in text
    assert "GPUs twice as fast" in text


def test_the_json_is_a_plan_with_the_job_beside_it(tmp_path: Path) -> None:
    file = str(requests(tmp_path / "in.jsonl", 64))
    value = json.loads(printed(batch_plan, file, "-m", SHAPE, *ON, "--json"))
    job = value.pop("job")
    plan = plan_from_json(value)
    assert plan.workload.kind == "batch"
    assert job["predicted"]["seconds"] > 0
    assert job["predicted"]["requests_per_hour"] == plan.predicted.jobs_per_hour
    assert job["speedup"] > 1
    assert job["considered"][0]["n_seq_max"] == plan.engine.n_seq_max


def test_numbers_that_are_given_are_kept(tmp_path: Path) -> None:
    file = str(requests(tmp_path / "in.jsonl", 64))
    words = (file, "-m", SHAPE, *ON, "--json", "-np", "5", "-ub", "256")
    engine = json.loads(printed(batch_plan, *words))["engine"]
    assert (engine["n_seq_max"], engine["n_ubatch"]) == (5, 256)


def test_embeddings_of_a_checkpoint_are_planned_as_vectors(tmp_path: Path) -> None:
    file = requests(tmp_path / "in.jsonl", 50, "/v1/embeddings", input="word " * 40)
    value = json.loads(printed(batch_plan, str(file), "-m", SHAPE, *ON, "--json"))
    assert value["job"]["embeddings"] is True
    assert value["engine"]["pooling"] == "mean"
    assert value["job"]["predicted"]["seconds"] > 0


def test_the_batch_workload_counts_what_is_shared_once() -> None:
    words = (SHAPE, *ON, "--workload", "batch", "-np", "16", "-c", "1024", "--json")
    alike = json.loads(printed(plan_command, *words, "--shared-tokens", "400"))
    apart = json.loads(printed(plan_command, *words))
    one = json.loads(printed(plan_command, SHAPE, *ON, "-c", "1024", "--json"))
    assert apart["workload"]["kind"] == "batch"
    rates = [value["predicted"]["jobs_per_hour"] for value in (alike, apart, one)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.5 * rates[2]


def test_a_submitted_job_knows_its_folder_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    parts.write_checkpoint(tmp_path / "model")
    file = requests(tmp_path / "in.jsonl", 2)
    words = (str(file), "--hold", "-m", "model", "--served-model-name", "m", "--quantize", "nf4")
    job_id = printed(submit, *words).strip().splitlines()[0]
    with JobStore(open_shelf().path(job_id), read_only=True) as store:
        settings = json.loads(store.job().settings)
    assert settings["model"] == str(tmp_path / "model")
    assert settings["plan"]["knobs"]["quantize"] == "nf4"
