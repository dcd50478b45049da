"""Schemas of clients are tried out in a child: what takes too long or too much ends the child."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from loadmaster.engine.backends.grammar import Constraint, Grammars, byte_tokenizer
from loadmaster.engine.types import SCHEMA_FAILED, DoneEvent
from loadmaster.errors import UsageError
from loadmaster.tasks.api.generation import ANY_OBJECT
from loadmaster.tasks.api.openai_fields import Fields
from loadmaster.tasks.api.tool_requests import read_tools
from loadmaster.tasks.schema_trial import SchemaTrial
from loadmaster.tasks.serving.answer import failure_of

PATTERNS = [f'{{"pattern": ".*a.{{{i}}}"}}' for i in range(40)]
AT_ONCE = f'{{"type": "string", "allOf": [{", ".join(PATTERNS)}]}}'


@pytest.fixture
def trial() -> Iterator[SchemaTrial]:
    one = SchemaTrial(cpu_limit_s=0.5)
    yield one
    one.close()


def test_what_passes_is_known_from_then_on(trial: SchemaTrial) -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    assert not trial.knows(schema)
    trial.check(schema)
    assert trial.knows(schema)
    assert trial.knows(ANY_OBJECT)


def test_what_takes_for_ever_is_ended_and_the_next_one_is_tried(trial: SchemaTrial) -> None:
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"more than 0\.5 s") as refusal:
        trial.check(AT_ONCE)
    assert refusal.value.code == "schema_too_complex"
    assert time.monotonic() - started < 60
    assert not trial.knows(AT_ONCE)
    trial.check('{"const": 1}')


def test_what_is_told_to_people_may_be_long(trial: SchemaTrial) -> None:
    trial.check('{"type": "integer", "description": "' + "x" * 5000 + '"}')


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type": "strin"}', "Invalid type"),
        ('{"$ref": "#"}', "no text fulfils it"),
        ('{"$ref": "http://127.0.0.1:1/x.json"}', "cannot be used"),
        ("[]", "not an object"),
        ('{"const": "' + "x" * 5000 + '"}', "5000 bytes, 4096 are allowed"),
        ('{"properties": {"' + "x" * 5000 + '": {}}}', "5000 bytes, 4096 are allowed"),
        ('{"enum": ["' + "x" * 70_000 + '"]}', "65536 are allowed"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(
    trial: SchemaTrial, schema: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        trial.check(schema)


def test_each_tools_parameters_bring_definitions_of_their_own() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/a"}},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {"a": {"type": kind}},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [tool("f", "integer"), tool("g", "boolean")]
    schema = read_tools(Fields({"tools": tools, "tool_choice": "required"})).forced_schema
    assert schema is not None
    for text, fits in (
        ('{"name": "f", "arguments": {"x": 1', True),
        ('{"name": "g", "arguments": {"x": t', True),
        ('{"name": "g", "arguments": {"x": 1', False),
    ):
        assert follows(Grammars(byte_tokenizer).start(schema), text) == fits


def follows(constraint: Constraint, text: str) -> bool:
    for byte in text.encode():
        if not constraint.allowed()[byte // 32] >> byte % 32 & 1:
            return False
        constraint.accept(byte)
    return True


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (f"{SCHEMA_FAILED}: too many items", 400, "schema_too_complex"),
        ("the context is broken", 503, "engine_crashed"),
    ],
)
def test_a_schema_that_fails_on_the_way_is_its_senders_fault(
    reason: str, status: int, code: str
) -> None:
    failure = failure_of(
        DoneEvent(
            request_id="r", finish_reason="failed", n_prompt=1, n_cached=0, n_generated=4,
            prefill_s=0.0, decode_s=0.0, error=reason,
        )
    )  # fmt: skip
    assert (failure.http_status, failure.code) == (status, code)
    assert reason in failure.message
