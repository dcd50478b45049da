"""`--draft` on the command line: with the demo model, and with the fake backend."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_writer import tiny_llama, write_random
from tests.cli_parts import Run

LONG = ("--temp", "0", "-n", "140", "--raw", "-c", "512", "--json")
QUOTE = "import os\nimport sys\n\n\ndef main():\n    print(os.getcwd(), sys.argv)\n\n\n" * 3


def answer(run: Run, *words: str) -> dict[str, Any]:
    code, out, err = run("run", "demo", *words)
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.mark.engine
def test_the_demo_model_drafts_for_itself(run: Run) -> None:
    plain = answer(run, QUOTE, *LONG)
    drafted = answer(run, QUOTE, *LONG, "--draft", "demo")
    assert drafted["text"] == plain["text"]
    assert "drafts" not in plain
    assert drafted["drafts"]["drafted"] > 0
    assert drafted["drafts"]["accepted"] >= 0.9 * drafted["drafts"]["drafted"]
    (row,) = [row for row in drafted["memory"] if row["kind"] == "draft"]
    assert row["measured_bytes"] == row["planned_bytes"] > 5_000_000
    assert drafted["plan"]["draft"]["device"] == "cpu"


@pytest.mark.engine
def test_guesses_are_looked_up(run: Run) -> None:
    plain = answer(run, QUOTE, *LONG)
    drafted = answer(run, QUOTE, *LONG, "--draft", "lookup")
    assert drafted["text"] == plain["text"]
    assert drafted["plan"]["engine"]["n_draft"] == 15


def test_the_line_after_an_answer_counts_drafts(run: Run) -> None:
    words = ("run", "demo", "Hello", "-n", "400", "--backend", "fake", "--draft", "lookup")
    code, _, err = run(*words)
    assert code == 0
    assert " drafted accepted" in err.splitlines()[-1]


@pytest.mark.parametrize("given", ["off", None])
def test_without_drafts_nothing_of_them_is_said(run: Run, given: str | None) -> None:
    words = ["run", "demo", "Hello", "-n", "400", "--backend", "fake"]
    code, _, err = run(*words, *(["--draft", given] if given else []))
    assert code == 0
    assert "draft" not in err


def test_a_plan_shows_the_draft_models_lines(run: Run) -> None:
    code, out, _ = run("plan", "demo", "--draft", "demo", "--machine", "rtx4090-24g", "-c", "512")
    assert code == 0
    assert "loadmaster demo: weights, 512 cells" in out
    assert "drafts on gpu:0: it does not pay, not even if 80% of its tokens are right" in out
    assert "--draft " in out


def test_a_model_with_other_tokens_is_refused(run: Run, tmp_path: Path) -> None:
    other = write_random(tmp_path / "other.gguf", *tiny_llama())
    code, _, err = run("plan", "demo", "--draft", str(other))
    assert code == 2
    assert "`tiny` cannot draft for `loadmaster demo`: its vocabulary is another, token " in err


def test_a_draft_that_is_not_there_is_an_error(run: Run) -> None:
    code, _, err = run("plan", "demo", "--draft", "no/such.gguf")
    assert code == 4
    assert "no/such.gguf" in err
