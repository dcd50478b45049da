"""`batch plan`: from a file to an outline, to a plan, to what is printed."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.interfaces.cli.batch_plan import plan as command
from loadmaster.interfaces.cli.plan import command as plan_command
from loadmaster.machine.profiles import __file__ as profiles_module
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.codec import plan_from_json
from loadmaster.plan.types import Knobs, Workload
from loadmaster.tasks.batch import outline as batch_outline
from loadmaster.tasks.batch.outline import FileOutline, read_outline
from loadmaster.tasks.batch.planning import plan_file
from loadmaster.tasks.planner import find_engine
from loadmaster.tasks.planning import PlanOptions, PlanRefusedError, demo_model

SYSTEM = "Answer in one word and in the language of the question, whatever that is. " * 4
PROFILES = Path(profiles_module).with_name("profiles")
FAKE = PlanOptions(backend="fake", machine="rtx3060-12g")


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return read_model(demo_model())


def chat(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"model": "demo", "messages": messages, "max_tokens": 20, **fields}


def write(path: Path, bodies: Sequence[dict[str, Any]], url: str = "/v1/chat/completions") -> Path:
    lines = [
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body})
        for i, body in enumerate(bodies)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def outline(path: Path, model: ModelSpec) -> FileOutline:
    """By the fake engine's vocabulary: a byte is a token."""
    return read_outline(path, model, find_engine("fake"), backend="fake")


def test_prompts_are_tokenized_and_what_they_share_is_found(
    tmp_path: Path, model: ModelSpec
) -> None:
    path = write(tmp_path / "in.jsonl", [chat(f"question {i}") for i in range(10)])
    file = outline(path, model)
    assert file.job.lengths == "exact"
    assert (file.n_lines, file.n_sampled, file.n_bad, file.n_unlimited) == (10, 10, 0, 0)
    assert file.job.n_items == 10
    assert file.job.output_tokens == 200
    assert file.job.prompt_tokens > 10 * len(SYSTEM)
    assert len(SYSTEM) < file.job.distinct_tokens < len(SYSTEM) + 10 * 120


def test_completions_count_every_prompt_and_every_choice(tmp_path: Path, model: ModelSpec) -> None:
    bodies = [{"model": "demo", "prompt": ["abcd", [1, 2, 3]], "max_tokens": 5, "n": 2}]
    job = outline(write(tmp_path / "in.jsonl", bodies, "/v1/completions"), model).job
    assert job.n_items == 4
    assert job.output_tokens == 20
    assert job.prompt_tokens == 2 * (4 + 3)
    assert job.distinct_tokens == 4 + 1 + 3 + 1  # a choice feeds its last token itself


def test_without_a_vocabulary_characters_are_counted(tmp_path: Path, model: ModelSpec) -> None:
    path = write(tmp_path / "in.jsonl", [chat(f"question {i}") for i in range(10)])
    job = read_outline(path, model, None).job
    assert job.lengths == "characters"
    assert job.prompt_tokens == pytest.approx(10 * (len(SYSTEM) + 30) / 4, rel=0.1)
    assert job.prefix_tokens > len(SYSTEM) // 4


def test_a_long_file_is_sampled_in_blocks(
    tmp_path: Path, model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_outline, "SAMPLE_LINES", 64)
    bodies = [chat(f"question {i:04}" + "!" * (900 if i == 77 else 0)) for i in range(1000)]
    path = write(tmp_path / "in.jsonl", bodies)
    file = outline(path, model)
    assert file.n_lines == 1000
    assert 48 <= file.n_sampled <= 65
    assert file.job.longest > 900, "the longest line is always looked at"
    assert file.job.lengths == "sample"
    assert file.job.n_items == pytest.approx(1000, rel=0.02)
    assert file.job.prefix_tokens < 2 * len(SYSTEM) + 200, "one prefix, however many items"


def test_bad_lines_and_missing_limits_are_counted(tmp_path: Path, model: ModelSpec) -> None:
    path = write(tmp_path / "in.jsonl", [chat("a"), chat("b", max_tokens=None)])
    path.write_text(path.read_text() + "not json\n\n")
    file = outline(path, model)
    assert (file.n_lines, file.n_bad, file.n_unlimited) == (3, 1, 1)
    assert file.job.output_tokens == pytest.approx(1.5 * (20 + 256), rel=0.4)


def test_files_without_a_line_to_run_are_refused(tmp_path: Path, model: ModelSpec) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        outline(tmp_path / "none.jsonl", model)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UsageError, match="has no lines"):
        outline(empty, model)


def embeddings(path: Path, *inputs: object) -> Path:
    return write(path, [{"model": "demo", "input": each} for each in inputs], "/v1/embeddings")


def test_inputs_of_embeddings_generate_nothing(tmp_path: Path, model: ModelSpec) -> None:
    file = outline(embeddings(tmp_path / "in.jsonl", "abc", ["abcd", [1, 2]]), model)
    assert (file.job.n_items, file.job.prompt_tokens, file.job.output_tokens) == (3, 9, 0)
    assert (file.n_bad, file.n_unlimited) == (0, 0)


def test_of_a_mixed_file_the_first_line_decides(tmp_path: Path, model: ModelSpec) -> None:
    path = embeddings(tmp_path / "in.jsonl", "abc")
    path.write_text(path.read_text() + write(tmp_path / "chat", [chat("a"), chat("b")]).read_text())
    file = outline(path, model)
    assert (file.n_bad, file.job.output_tokens) == (2, 0)


def test_embeddings_get_a_plan_for_vectors(tmp_path: Path) -> None:
    path = embeddings(tmp_path / "in.jsonl", *("a" * (1 + i % 40) for i in range(100)))
    found = plan_file(path, "demo", FAKE, output_share=0.5)
    engine, predicted = found.job.plan.llamacpp, found.job.predicted
    assert engine.pooling == "mean"
    assert (engine.n_seq_max, engine.n_ubatch, engine.n_ctx) == (16, 512, 512)
    assert (predicted.n_items, predicted.generated_tokens) == (100, 0)
    assert predicted.prefilled_tokens == found.file.job.prompt_tokens
    assert 100 / 16 <= predicted.n_steps <= 10
    assert found.job.speedup is not None
    assert found.job.speedup > 1
    assert not any("answers" in note for note in found.notes)


def test_an_embedding_plan_has_room_for_the_longest_input(tmp_path: Path) -> None:
    path = embeddings(tmp_path / "in.jsonl", "a", "b" * 900)
    assert plan_file(path, "demo", FAKE).job.plan.llamacpp.n_ubatch == 1024
    fixed = PlanOptions(backend="fake", machine="rtx3060-12g", workload=Workload(n_ctx=256))
    assert plan_file(path, "demo", fixed).job.plan.llamacpp.n_ubatch == 256


def test_the_command_says_what_embeddings_take(tmp_path: Path) -> None:
    path = embeddings(tmp_path / "in.jsonl", "abc", "defg")
    text = invoke(path, "--machine", "rtx3060-12g")
    assert "2 inputs, " in text
    assert "inputs per hour" in text
    assert "generated" not in text
    value = json.loads(invoke(path, "--machine", "rtx3060-12g", "--json"))
    assert value["job"]["embeddings"] is True
    assert value["engine"]["pooling"] == "mean"


def test_a_file_gets_a_plan_and_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [chat(f"question {i}") for i in range(40)])
    found = plan_file(path, "demo", FAKE)
    assert found.job.plan.engine.n_seq_max > 1
    assert found.job.predicted.basis == "table"
    assert found.job.predicted.n_items == 40
    half = plan_file(path, "demo", FAKE, output_share=0.5)
    assert half.job.job.output_tokens == 400
    assert half.job.predicted.seconds < found.job.predicted.seconds


def test_prompts_that_can_never_fit_are_counted_before_the_night(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [chat("x" * n) for n in (10, 3000, 20, 4000)])
    first, *_ = plan_file(path, "demo", FAKE).notes
    assert first.startswith("2 of 4 prompts are too long and will fail: up to 4")
    assert first.endswith("tokens, n_ctx is 2048")
    shorter = replace(FAKE, workload=Workload(n_ctx=128))
    assert plan_file(path, "demo", shorter).notes[0].startswith("4 of 4 prompts")


def test_a_budget_too_small_is_refused_with_its_ledger(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [chat("a")])
    options = PlanOptions(backend="fake", machine="cpu-64g", ram="1MiB", knobs=Knobs(n_seq_max=4))
    with pytest.raises(PlanRefusedError, match="does not fit"):
        plan_file(path, "demo", options)


def invoke(path: Path, *arguments: str) -> str:
    found = CliRunner().invoke(
        command, [str(path), "-m", "demo", "--backend", "fake", *arguments],
        catch_exceptions=False,
    )  # fmt: skip
    assert found.exit_code == 0
    return found.stdout


def test_the_command_prints_the_job_its_ledger_and_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [chat(f"question {i}") for i in range(40)])
    text = invoke(path, "--machine", "rtx3060-12g")
    assert "in.jsonl: 40 requests" in text
    assert "total" in text
    assert "begun now it ends" in text
    assert "requests per hour" in text
    assert "one request at a time" in text
    assert "--rehearse" in text


def test_json_holds_a_plan_that_runs_and_the_job(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [chat(f"question {i}") for i in range(40)])
    document = json.loads(
        invoke(path, "--machine", "rtx3060-12g", "--sequences", "4", "--cells", "4096", "--json")
    )
    job = document.pop("job")
    plan = plan_from_json(document)
    assert (plan.engine.n_seq_max, plan.engine.n_ctx) == (4, 4096)
    assert plan.workload.kind == "batch"
    assert job["requests"] == 40
    assert job["predicted"]["seconds"] > 0
    assert job["ends"] is not None
    assert job["considered"]


def test_unknown_bandwidths_give_no_time(tmp_path: Path) -> None:
    profile = json.loads((PROFILES / "cpu-64g.json").read_text())
    profile["machine"]["ram"]["bandwidth_bytes_s"] = None
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps(profile))
    path = write(tmp_path / "in.jsonl", [chat(f"question {i}") for i in range(10)])
    text = invoke(path, "--machine", str(unknown))
    assert "predicted time: unknown" in text
    assert "begun now" not in text
    assert re.search(r"sequences +(8|10) ", text)


def plan_json(*arguments: str) -> dict[str, Any]:
    found = CliRunner().invoke(
        plan_command,
        ["shape:llama-3-8b@Q8_0", "--backend", "fake", "--machine", "rtx3060-12g", "--json",
         *arguments],
        catch_exceptions=False,
    )  # fmt: skip
    assert found.exit_code == 0
    document: dict[str, Any] = json.loads(found.stdout)
    return document


def test_plan_takes_a_number_of_sequences() -> None:
    many = plan_json("--workload", "batch", "--sequences", "16", "--cells", "5000", "-c", "640")
    assert many["workload"]["kind"] == "batch"
    assert many["engine"]["n_seq_max"] == 16
    assert many["engine"]["n_ctx"] == 5120
    assert many["engine"]["kv_unified"]
    one = plan_json("--workload", "batch", "-c", "640")
    assert one["engine"]["n_seq_max"] == 1
    per_hour = [it["predicted"]["jobs_per_hour"] for it in (one, many)]
    assert per_hour[1] > 2 * per_hour[0]


def test_several_sequences_are_served_each_with_its_own_cells() -> None:
    served = plan_json("--sequences", "4", "-c", "512")
    assert served["workload"]["kind"] == "serve"
    assert served["engine"]["n_ctx"] == 2048


def test_shared_tokens_are_part_of_the_prompt() -> None:
    with pytest.raises(UsageError, match="leave nothing of a prompt"):
        plan_json("--workload", "batch", "--shared-tokens", "512", "--prompt-tokens", "512")
