"""The counters of `benchmarks.serve_faults` count what they are for: each is shown a fault."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import keeping, kills, leaving
from benchmarks.serving.client import Seen, ask, chat, verdict
from benchmarks.serving.tally import GRACE_S, Tally, fake_truth
from benchmarks.serving.truth import _token_ids
from loadmaster.engine.backends.fake_spec import ANSWER

STEP_S = 0.02
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'data: {"choices":[{"delta":{"content":"This"}}]}\n\n'
FINISH = b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"code":"engine_crashed"}}\n\n'
BUSY = b'HTTP/1.1 429 No\r\ncontent-length: 25\r\n\r\n{"error":{"code": "busy"}}'


def chunks(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


def answered(raw: bytes, *, closes: bool = True, limit_s: float = 60.0) -> Seen:
    """What a client sees of a server that says this and nothing else."""

    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        if not closes:
            await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        served.set()

    async def main() -> Seen:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            seen = await ask(server.sockets[0].getsockname()[1], chat(), limit_s)
            await served.wait()
        return seen

    return asyncio.run(main())


WHOLE = HEAD + chunks(TEXT, FINISH, DONE) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (WHOLE, "whole"),
        (HEAD + chunks(TEXT, ERROR) + b"0\r\n\r\n", "error"),
        (BUSY.replace(b"25", b"26"), "refused"),
        (HEAD + chunks(TEXT), "cut"),
        (HEAD + chunks(TEXT) + b"0\r\n\r\n", "cut"),
        (HEAD + chunks(TEXT, DONE) + b"0\r\n\r\n", "cut"),  # why it ended was not said
        (b"", "cut"),
        (HEAD + chunks(TEXT, ERROR, DONE) + b"0\r\n\r\n", "double"),
        (HEAD + chunks(TEXT, FINISH, DONE, TEXT) + b"0\r\n\r\n", "double"),
    ],
)
def test_every_end_has_its_name(raw: bytes, expected: str) -> None:
    assert verdict(answered(raw)) == expected


def test_a_request_without_an_end_hangs() -> None:
    seen = answered(HEAD + chunks(TEXT), closes=False, limit_s=0.1)
    tally = Tally()
    assert tally.add(seen, None) == "hung"
    assert tally.figures()["hung"] == 1


def test_what_ends_without_a_word_or_twice_is_unclear() -> None:
    tally = Tally()
    tally.add(answered(HEAD + chunks(TEXT)), None)
    tally.add(answered(HEAD + chunks(TEXT, ERROR, DONE) + b"0\r\n\r\n"), None)
    assert tally.figures()["unclear_ends"] == 2


def test_a_text_that_changed_is_seen_whole_or_not() -> None:
    tally, truth = Tally(), fake_truth(4)
    tally.add(answered(WHOLE), truth)
    assert tally.figures()["other_streams_changed"] == 0
    tally.add(answered(WHOLE.replace(b"This", b"Thxs")), truth)
    tally.add(answered(HEAD + chunks(TEXT.replace(b"This", b"Thxx"), ERROR) + b"0\r\n\r\n"), truth)
    tally.add(answered(WHOLE), fake_truth(5))  # a token is missing
    assert tally.figures()["other_streams_changed"] == 3


def test_the_fake_engine_says_its_answer_over_and_over() -> None:
    seen = Seen(status=200, text=(ANSWER * 3)[:100], dones=1, finish="length")
    assert fake_truth(100)(seen)
    assert not fake_truth(101)(seen)


class Rows:
    """A server that frees a sequence once it was asked so often after the time allowed."""

    def __init__(self, n_late: int) -> None:
        self.n_late = n_late
        self.allowed_s = time.monotonic() + STEP_S + GRACE_S

    async def row(self) -> dict[str, Any]:
        taken = self.n_late > 0
        self.n_late -= time.monotonic() > self.allowed_s
        return {"n_running": 2 + taken, "n_waiting": 0}


class Leaves:
    """A client that is gone."""

    def __init__(self) -> None:
        self.seen = Seen()

    def leave(self, *, reset: bool) -> float:
        self.seen.left = True
        return time.monotonic()


@pytest.mark.parametrize(("n_late", "late"), [(0, 0), (2, 1)])
def test_a_sequence_that_is_free_too_late_is_counted(n_late: int, late: int) -> None:
    tally = Tally()
    server: Any = Rows(n_late)
    ground = leaving.Ground(
        server=server, tally=tally, truth=None, beside_tokens=1, long_prompt="",
        decode_step_s=STEP_S, prefill_step_s=STEP_S,
    )  # fmt: skip
    client: Any = Leaves()
    asyncio.run(ground.left(client, "decode", reset=False, step_s=STEP_S))
    assert tally.figures()["late_frees"] == late


def test_a_queued_request_that_did_not_outlive_a_worker_is_lost() -> None:
    head = {"content-type": "text/event-stream"}
    crashed = Seen(status=200, headers=head, errors=["engine_crashed"], ended_s=3.0)
    spoke = Seen(status=200, headers=head, text="This", errors=["engine_crashed"], ended_s=3.5)
    tally = Tally()
    load = kills.fake_load()
    kills._count([crashed, spoke], 2.0, load, tally, broken=False)
    assert tally.figures()["queued_lost"] == 1
    assert tally.figures()["slowest_detection_s"] == 1.5


def test_the_demo_model_s_tokens_are_found_by_their_bytes() -> None:
    ids = _token_ids()
    assert ids[b"!"] == 3
    assert len(ids) > 4000
    assert all(isinstance(raw, bytes) for raw in ids)


def test_a_batchs_text_is_looked_for_outside_of_its_folder(tmp_path: Path) -> None:
    text, kept = "text-of-a-batch", tmp_path / "home" / "state"
    closed, open_ = kept / "jobs", kept / "open"
    for folder, mode in ((closed, 0o700), (open_, 0o755)):
        folder.mkdir(parents=True)
        folder.chmod(mode)
        (folder / "content").write_text(text)
        (folder / "content").chmod(0o644)
    (tmp_path / "home" / "log").write_text(text)
    (kept / text).touch(mode=0o600)
    hits = list(keeping.astray(text, [tmp_path], kept))
    found = {hit.partition(": ")[2] for hit in hits}
    assert len(hits) == 3
    assert found == {"outside of state", "its name", "others can read it"}
    assert keeping.count_kept(text, kept) == 3
