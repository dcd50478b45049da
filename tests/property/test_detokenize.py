"""The text of a stream does not depend on where the tokens cut its bytes."""

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.engine.detokenize import TextStream

texts = st.text(alphabet=st.sampled_from("abé🙂\n "), max_size=24)
stops = st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=3), max_size=3)
cuts = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def pieces(raw: bytes, sizes: list[int]) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        size = sizes[len(found) % len(sizes)]
        found.append(raw[at : at + size])
        at += size
    return found


def stream(raw: bytes, sizes: list[int], stop: list[str]) -> tuple[str, bool]:
    out = TextStream(stop)
    text = ""
    for piece in pieces(raw, sizes):
        text += out.feed(piece)
        if out.stopped:
            break
    return text + out.flush(), out.stopped


@given(texts, cuts, stops)
def test_text_ends_before_the_first_stop_string(
    text: str, sizes: list[int], stop: list[str]
) -> None:
    shown, stopped = stream(text.encode(), sizes, stop)
    assert stopped == any(word in text for word in stop)
    assert text.startswith(shown)
    assert not any(word in shown for word in stop)
    if not stopped:
        assert shown == text


@given(texts, stops)
def test_byte_by_byte_the_earliest_completed_stop_wins(text: str, stop: list[str]) -> None:
    shown, stopped = stream(text.encode(), [1], stop)
    if stopped:
        rest = text[len(shown) :]
        assert any(rest.startswith(word) for word in stop)


@given(st.binary(max_size=24), cuts)
def test_any_bytes_become_text(raw: bytes, sizes: list[int]) -> None:
    shown, _ = stream(raw, sizes, [])
    assert shown == raw.decode("utf-8", "replace")


@given(texts, cuts)
def test_nothing_is_said_before_it_is_whole(text: str, sizes: list[int]) -> None:
    out = TextStream()
    shown = ""
    for piece in pieces(text.encode(), sizes):
        shown += out.feed(piece)
        assert text.startswith(shown)
