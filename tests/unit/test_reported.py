"""Log-probabilities come with the text they belong to."""

from loadmaster.engine.reported import Reported
from loadmaster.engine.types import TokenLogprob


def logprob(raw: bytes) -> TokenLogprob:
    return TokenLogprob(token=len(raw), raw=tuple(raw), logprob=-1.0)


def test_a_token_waits_for_its_text() -> None:
    reported = Reported()
    first, second = logprob(b"ab"), logprob(b"cd")
    reported.add(first)
    reported.add(second)
    assert reported.take("abc") == (first,)
    assert reported.take("") == ()
    assert reported.take("d") == (second,)


def test_a_character_of_two_tokens() -> None:
    reported = Reported()
    halves = [logprob(part) for part in (b"\xc3", b"\xa9")]
    reported.add(halves[0])
    assert reported.take("") == ()
    reported.add(halves[1])
    assert reported.take("é") == tuple(halves)


def test_a_token_shown_in_part_comes_at_the_end() -> None:
    reported = Reported()
    shown, hidden = logprob(b"abc"), logprob(b"def")
    reported.add(shown)
    reported.add(hidden)
    assert reported.take("ab") == ()
    assert reported.waiting
    assert reported.take("", ended=True) == (shown,)
    assert not reported.waiting


def test_a_control_token_comes_with_the_text_before_it() -> None:
    reported = Reported()
    tokens = [logprob(b"a"), logprob(b"")]
    for one in tokens:
        reported.add(one)
    assert reported.take("a") == tuple(tokens)
