"""Compiled schemas over a vocabulary of bytes."""

import json
import random

import pytest

from loadmaster.engine.backends.grammar import Constraint, Grammars, byte_tokenizer
from loadmaster.errors import UsageError

END = 256
OBJECT = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
)


def allowed(constraint: Constraint) -> set[int]:
    bits = constraint.allowed()
    return {token for token in range(257) if bits[token // 32] >> token % 32 & 1}


def follow(constraint: Constraint, text: str) -> None:
    for byte in text.encode():
        assert byte in allowed(constraint)
        constraint.accept(byte)


def test_it_ends_where_nothing_can_follow() -> None:
    constraint = Grammars(byte_tokenizer).start(OBJECT)
    follow(constraint, '{"a": 1')
    assert not constraint.ended
    follow(constraint, "}")
    assert constraint.ended
    assert constraint.failure is None


def test_a_number_alone_ends_with_the_end_token() -> None:
    constraint = Grammars(byte_tokenizer).start('{"type": "integer"}')
    follow(constraint, "12")
    assert END in allowed(constraint)
    assert not constraint.ended
    constraint.accept(END)
    assert constraint.ended


def test_space_is_bounded() -> None:
    constraint = Grammars(byte_tokenizer).start(OBJECT)
    follow(constraint, "{\n" + " " * 20)
    assert allowed(constraint) == set(b'"')


def test_constraints_of_one_schema_go_their_own_ways() -> None:
    grammars = Grammars(byte_tokenizer)
    first, second = (
        grammars.start('{"enum": ["ab", "cd"]}'),
        grammars.start('{"enum": ["ab", "cd"]}'),
    )
    follow(first, '"a')
    assert allowed(second) == {ord('"')}
    follow(second, '"c')
    assert allowed(first) == {ord("b")}


def test_a_token_that_is_not_allowed_is_a_failure() -> None:
    constraint = Grammars(byte_tokenizer).start(OBJECT)
    constraint.accept(ord("x"))
    assert constraint.ended
    assert "cannot be followed" in str(constraint.failure)
    constraint.accept(ord("y"))  # nothing more happens


def test_a_schema_is_compiled_once_and_old_ones_are_forgotten() -> None:
    opened = []

    def open_tokenizer() -> object:
        opened.append(1)
        return byte_tokenizer()

    grammars = Grammars(open_tokenizer)
    for number in range(100):
        grammars.check(json.dumps({"const": number}))
    assert opened == [1]
    follow(grammars.start('{"const": 3}'), "3")


def test_a_failure_leaves_the_next_text_alone() -> None:
    grammars = Grammars(byte_tokenizer)
    bomb = json.dumps({"type": "string", "pattern": "(.*a.{200}){3}"})

    def followed() -> int:
        constraint = grammars.start(bomb)
        text = b'"' + bytes(random.Random(1).choices(b"ab", k=3000))
        return next(n for n, byte in enumerate(text) if _fails(constraint, byte))

    assert followed() == followed() > 1


def _fails(constraint: Constraint, byte: int) -> bool:
    constraint.allowed()
    constraint.accept(byte)
    return constraint.failure is not None


def test_a_bounded_string_may_be_long() -> None:
    constraint = Grammars(byte_tokenizer).start('{"type": "string", "maxLength": 3000}')
    follow(constraint, '"' + "x" * 3000)
    assert allowed(constraint) == {ord('"')}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type": "strin"}', "Invalid type"),
        ('{"oneOf": [{}, {"type": "string"}]}', "`anyOf`"),
        ('{"allOf": [{"$ref": "#"}]}', "no text fulfils it"),
        ("nonsense", "cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(schema: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Grammars(byte_tokenizer).check(schema)
