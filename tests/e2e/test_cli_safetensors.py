"""A safetensors model through the commands people type, on the transformers engine."""

import json
import math
from pathlib import Path

import pytest

from loadmaster.engine import python_build
from tests.cli_parts import Run, in_own_process
from tests.hf_parts import write_base

SMALL = ("-c", "256", "-ub", "64", "--temp", "0", "-n", "8")


@pytest.mark.parametrize("kv", ["bf16", "q8_0"])
def test_an_answer_under_a_plan_that_holds(checkpoint: Path, kv: str) -> None:
    words = ("run", str(checkpoint), "Hello", "--quantize", "nf4", "--kv", kv, "--json", *SMALL)
    code, out, err = in_own_process(*words)
    assert code == 0, err
    value = json.loads(out)
    assert value["finish_reason"] in ("stop", "length")
    assert 0 < value["usage"]["completion_tokens"] <= 8
    assert value["plan"]["engine"]["quantize"] == "nf4"
    assert value["plan"]["engine"]["type_k"] == kv
    assert value["attention"].startswith("sdpa: ")
    rows = {row["kind"]: row for row in value["memory"]}
    for kind in ("model", "kv"):
        assert rows[kind]["planned_bytes"] == rows[kind]["measured_bytes"]
    assert rows["total"]["measured_bytes"] <= rows["total"]["planned_bytes"]


def test_a_plan_file_is_run_as_it_is(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = run("plan", str(checkpoint), "--json", "-c", "256", "-ub", "64")
    assert code == 0, err
    file = tmp_path / "plan.json"
    file.write_text(out)
    code, out, err = run("run", "--plan", str(file), "-n", "4", "--json", stdin="Hello")
    assert code == 0, err
    assert json.loads(out)["plan"]["engine"]["n_ctx"] == 256


def test_a_conversation_goes_on_from_the_cells_it_has(run: Run, checkpoint: Path) -> None:
    code, out, err = run("chat", str(checkpoint), "--json", *SMALL, stdin="Hello\nAgain\n")
    assert code == 0, err
    first, second = map(json.loads, out.splitlines())
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] > 0


def test_a_job_runs_as_many_sequences_as_fit(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i in range(6)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run(
        "batch", "run", "-i", str(source), "-o", str(target), "-m", str(checkpoint),
        "--served-model-name", "m", "--rehearse", "2", "--yes",
    )  # fmt: skip
    assert code == 0, err
    assert "6 sequences" in err
    assert "requests per hour" in err, "the rehearsal's table"
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert {one["custom_id"] for one in answers} == {f"r{i}" for i in range(6)}
    assert all(one["response"]["status_code"] == 200 for one in answers)


def test_a_job_of_embeddings_has_vectors_of_length_one(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings",
         "body": {"model": "m", "input": "a text " * (i + 1)}}
        for i in range(6)
    ]  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run(
        "batch", "run", "-i", str(source), "-o", str(target), "-m", str(checkpoint),
        "--served-model-name", "m",
    )  # fmt: skip
    assert code == 0, err
    answers = [json.loads(line)["response"]["body"] for line in target.read_text().splitlines()]
    vectors = [answer["data"][0]["embedding"] for answer in answers]
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * 6)
    assert len({tuple(vector) for vector in vectors}) == 6


def test_a_bench_measures_beside_what_is_predicted(run: Run, checkpoint: Path) -> None:
    words = ("bench", str(checkpoint), "--positions", "0", "--sequences", "2", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["phase"], row["n_sequences"]) for row in rows] == [
        ("prefill", 1), ("decode", 1), ("decode", 2),
    ]  # fmt: skip
    assert all(row["measured_tok_s"] > 0 for row in rows)


def test_a_model_saved_without_its_output_is_planned_for_vectors_and_writes_no_text(
    run: Run, tmp_path: Path
) -> None:
    base = str(write_base(tmp_path / "base"))
    code, out, err = run("plan", base, "--ctx", "256")
    assert code == 0, err
    assert "planned for vectors (mean pooling) of texts of up to 256 tokens" in out
    file = tmp_path / "plan.json"
    file.write_text(run("plan", base, "--json")[1])
    for words in (("run", base, "Hello"), ("chat", base), ("run", "--plan", str(file), "Hello")):
        code, _, err = run(*words)
        assert code == 2
        assert "writes no text" in err
        assert "/v1/embeddings" in err


def test_without_the_extra_it_says_what_to_type(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_build, "_version", lambda package: None)
    code, _, err = run("run", str(checkpoint), "Hello")
    assert code == 7
    assert 'pip install "loadmaster[hf]"' in err
