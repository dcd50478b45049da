"""Bodies of requests: what is no JSON object, and what is nested too deeply."""

import json

import pytest

from loadmaster.errors import UsageError
from loadmaster.interfaces.http.bodies import DEPTH_LIMIT, parse_object


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"1", b"null", b"{", b'{"a": NaN}', b'{"a": Infinity}', b"\xff", b'{"a": "\xff"}'],
)
def test_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_object(raw)
    assert refusal.value.http_status == 400


def test_the_refusal_does_not_quote_the_body() -> None:
    with pytest.raises(UsageError) as refusal:
        parse_object(b'{"prompt": "my secret", oops}')
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("bracket", ["[]", '{"a":}'])
def test_nesting_has_a_limit(bracket: str) -> None:
    def nested(depth: int) -> bytes:
        opening, closing = bracket[:-1], bracket[-1]
        inner = opening * depth + "1" + closing * depth
        return f'{{"v": {inner}}}'.encode()

    assert parse_object(nested(DEPTH_LIMIT - 2))
    for depth in (DEPTH_LIMIT + 1, 1000, 100_000):
        with pytest.raises(UsageError, match="nested"):
            parse_object(nested(depth))


def test_a_wide_object_is_no_deep_one() -> None:
    assert parse_object(json.dumps({"v": [[]] * 1000}).encode())
