"""The load generator of the server's benchmark: bytes and times to streams."""

import json
from typing import Any

import pytest

from benchmarks.streaming.client import Received, StreamError, stream_of
from benchmarks.streaming.times import Run, Stream, percentile

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"


def text(words: str) -> bytes:
    return event(choices=[{"delta": {"content": words}}])


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


def received(*reads: bytes) -> Received:
    """Read `i` came at second `i + 1`."""
    found = Received(start_s=0.5)
    for index, read in enumerate(reads):
        found.raw += read
        found.ends.append(len(found.raw))
        found.times.append(index + 1.0)
    return found


def test_a_text_has_the_time_of_its_last_byte() -> None:
    usage = event(
        usage={
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
    )
    first, second = chunk(text("one")), chunk(text(" two"))
    reads = [
        HEAD + chunk(b": ping\n\n"), first[:20], first[20:] + second,
        chunk(usage + DONE) + chunk(b""),
    ]  # fmt: skip
    stream = stream_of(received(*reads))
    assert (stream.text, stream.times, stream.end_s) == ("one two", [3.0, 3.0], 4.0)
    assert (stream.n_prompt, stream.n_cached, stream.n_generated) == (7, 3, 2)
    assert (stream.ttft_s, stream.gaps_s) == (2.5, [])


def test_an_event_may_be_cut_by_chunks() -> None:
    whole = text("cut")
    reads = [HEAD + chunk(whole[:9]), chunk(whole[9:]), chunk(DONE) + chunk(b"")]
    assert stream_of(received(*reads)).times == [2.0]


def test_what_llama_server_computed_is_counted_apart() -> None:
    last = event(usage={"prompt_tokens": 9, "completion_tokens": 1}, timings={"prompt_n": 4})
    assert stream_of(received(HEAD + chunk(last + DONE) + chunk(b""))).n_cached == 5


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}",
        HEAD + chunk(text("no end")) + chunk(b""),
        HEAD + chunk(b'data: {"error": {"message": "the worker died"}}\n\n') + chunk(b""),
    ],
)
def test_what_is_no_whole_stream_is_an_error(raw: bytes) -> None:
    with pytest.raises(StreamError):
        stream_of(received(raw))


def test_a_run_is_as_long_as_all_its_streams() -> None:
    streams = [
        Stream(start_s=1.0, end_s=4.0, times=[2.0, 3.0, 3.0, 4.0], n_generated=4, n_prompt=8),
        Stream(start_s=1.5, end_s=6.0, times=[5.0], n_generated=6, n_prompt=8, n_cached=8),
    ]
    run = Run(streams=streams, client_cpu_s=0.0)
    assert (run.seconds, run.tok_s, run.n_prefilled) == (5.0, 2.0, 8)
    assert run.ttfts_s == [1.0, 3.5]
    assert streams[0].gaps_s == [1.0, 1.0]


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]
