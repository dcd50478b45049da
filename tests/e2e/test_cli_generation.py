"""Sampling options and JSON schemas on the command line, with the fake backend."""

import json
from functools import partial
from pathlib import Path

import pytest

from loadmaster.engine.types import SamplingParams
from loadmaster.interfaces.cli.settings import changed
from loadmaster.plan import overhead
from loadmaster.tasks.chat import ChatSettings
from tests.cli_parts import Run

FLAG = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'


@pytest.fixture
def run(run: Run) -> Run:
    """Run the fake engine with these options."""
    return partial(run, "run", "demo", "Hello", "-n", "64", "--backend", "fake")


@pytest.mark.parametrize("from_file", [False, True])
def test_the_answer_is_json_of_the_schema(run: Run, tmp_path: Path, from_file: bool) -> None:
    file = tmp_path / "schema.json"
    file.write_text(FLAG)
    code, out, err = run("--json-schema", str(file) if from_file else FLAG, "-q")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"ok": False}


def test_a_schemas_memory_is_planned(run: Run) -> None:
    plans = [
        json.loads(run("--json", *words)[1])["plan"] for words in ((), ("--json-schema", FLAG))
    ]
    totals = [sum(item["bytes"] for item in plan["devices"][-1]["items"]) for plan in plans]
    assert totals[1] - totals[0] == overhead.SCHEMA_BYTES + 4096 * overhead.SCHEMA_TOKEN_BYTES


@pytest.mark.parametrize(
    ("schema", "code", "words"),
    [
        ('{"type": "strin"}', 2, "Invalid type: strin"),
        ("[1]", 2, "not an object"),
        ("{", 2, "no JSON"),
        ("missing.json", 4, "is not there"),
    ],
)
def test_a_bad_schema_is_an_error(run: Run, schema: str, code: int, words: str) -> None:
    found, out, err = run("--json-schema", schema, "-q")
    assert (found, out) == (code, "")
    assert words in err


def test_sampling_options_reach_the_engine(run: Run) -> None:
    words = "--typical-p 0.9 --repeat-penalty 1.1 --frequency-penalty 0.5 --presence-penalty -0.5"
    _, out, _ = run(*words.split(), "--repeat-last-n", "-1", "--json", "--seed", "1")
    sampling = json.loads(out)["sampling"]
    assert sampling["typical_p"] == 0.9
    assert sampling["repeat_penalty"] == 1.1
    assert (sampling["frequency_penalty"], sampling["presence_penalty"]) == (0.5, -0.5)
    assert sampling["repeat_last_n"] == -1


def test_an_option_out_of_range_is_refused(run: Run) -> None:
    code, _, err = run("--typical-p", "0")
    assert code == 2
    assert "--typical-p" in err


def test_a_chat_sets_them_too() -> None:
    settings = changed(ChatSettings(), "presence_penalty", "1.5")
    assert settings.sampling.presence_penalty == 1.5
    assert changed(settings, "presence_penalty", "").sampling == SamplingParams()
