"""What a client may not get away with: odd numbers, halves of characters, endless bodies."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from loadmaster.errors import UsageError
from loadmaster.interfaces.http import guard
from loadmaster.interfaces.http.bodies import parse_object
from loadmaster.tasks.api.openai_fields import MOST_ITEMS, BadFieldError
from loadmaster.tasks.api.openai_requests import parse_chat, parse_completion
from loadmaster.tasks.serving.types import parse_keep_alive

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": 1e999}', "too large"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\uDFFF\\ud83d"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_no_answer_could_hold_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_object(raw)


def test_whole_pairs_and_written_backslashes_pass() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse_object(b'{"a": "\\\\ud800"}') == {"a": "\\ud800"}


@pytest.mark.parametrize("key", ["9" * 5000, "\u00b2", "-1", "1.5", ""])
def test_a_bias_of_no_token_is_refused(key: str) -> None:
    with pytest.raises(BadFieldError) as refusal:
        parse_chat({**CHAT, "logit_bias": {key: 1}})
    assert refusal.value.param is not None
    assert refusal.value.param.startswith("logit_bias.")
    assert len(refusal.value.param) <= 32


@pytest.mark.parametrize("name", ["messages", "stop", "modalities"])
def test_lists_have_a_limit_with_its_number(name: str) -> None:
    with pytest.raises(BadFieldError, match=str(MOST_ITEMS)):
        parse_chat({**CHAT, name: ["x"] * (MOST_ITEMS + 1)})


def test_a_prompt_of_tokens_may_be_long_and_not_endless() -> None:
    assert len(parse_completion({"prompt": [1] * 100_000}).prompts[0]) == 100_000
    with pytest.raises(BadFieldError, match="1048576"):
        parse_completion({"prompt": [1] * ((1 << 20) + 1)})


@pytest.mark.parametrize("text", ["1e300", "99999999999h", "inf"])
def test_a_time_without_end_is_for_good(text: str) -> None:
    assert parse_keep_alive(text) == float("inf")


@pytest.mark.parametrize(
    "host",
    [
        b"[::1]evil.example", b"[::1", b"::1", b"[::ffff:127.0.0.1]", b"localhost\xc2\xa0",
        b"127.1", b"localhost:", b"localhost:8765:1", b"[::1]:99999", b"127.0.0.1\x00.evil.example",
    ],
)  # fmt: skip
def test_names_that_only_look_like_loopback_are_refused(host: bytes) -> None:
    assert _status([(b"host", host)]) == 403


@pytest.mark.parametrize("origin", [b"http://[", b"http://[::1", b"//localhost", b"localhost"])
def test_an_origin_that_is_none_is_refused(origin: bytes) -> None:
    assert _status([(b"host", b"localhost"), (b"origin", origin)]) == (
        200 if origin == b"//localhost" else 403
    )


@pytest.mark.parametrize("length", [b"9" * 6000, b"1099511627776"])
def test_a_length_beyond_the_limit_is_refused_at_once(length: bytes) -> None:
    assert _status([(b"host", b"localhost"), (b"content-length", length)]) == 413


def test_a_preflight_to_another_host_is_not_answered() -> None:
    rules = guard.Rules(origins=frozenset({"http://localhost:3000"}))
    headers = [(b"host", b"evil.example"), (b"origin", b"http://localhost:3000")]
    assert _status(headers, rules=rules, method="OPTIONS") == 403


def test_a_body_that_does_not_go_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_WAIT_S", 0.01)
    pieces: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    assert _status([(b"host", b"localhost")], pieces=pieces) == 408


def test_a_client_that_waits_is_not_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_WAIT_S", 0.01)
    whole: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]
    assert _status([(b"host", b"localhost")], pieces=whole, wait_s=0.05) == 200


class _Loop(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


@pytest.mark.parametrize(("piece_bytes", "status"), [(1, 408), (32 << 10, 200)])
def test_a_body_that_creeps_is_given_up_and_a_slow_one_is_not(
    piece_bytes: int, status: int
) -> None:
    """A piece every 20 s: each is in time, but a byte at a time would take for ever."""
    left = [{"type": "http.request", "body": b"x" * piece_bytes, "more_body": n < 9}
            for n in range(10)]  # fmt: skip
    found = []

    async def receive() -> Message:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, _Loop)
        await asyncio.sleep(0.001)
        loop.ahead_s += 20
        return left.pop(0)

    async def send(message: Message) -> None:
        found.append(message.get("status"))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except UsageError as error:
            await send({"type": "http.response.start", "status": error.http_status, "headers": []})

    scope = {"type": "http", "method": "POST", "path": "/v1/models",
             "headers": [(b"host", b"localhost")]}  # fmt: skip
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(guard.Guard(app, guard.Rules())(scope, receive, send))
    assert found == [status]


def _status(
    headers: list[tuple[bytes, bytes]],
    *,
    rules: guard.Rules | None = None,
    method: str = "POST",
    pieces: list[Message] | None = None,
    wait_s: float = 0.0,
) -> int:
    """What a guarded application answers that reads its body and then waits for a disconnect."""
    sent: list[Message] = []
    left = list(pieces or [{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        if not left:
            await asyncio.sleep(wait_s or 10)
            return {"type": "http.disconnect"}
        return left.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive()).get("more_body"):
                pass
            if wait_s:
                await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except UsageError as error:
            await send({"type": "http.response.start", "status": error.http_status, "headers": []})

    scope = {"type": "http", "method": method, "path": "/v1/models", "headers": headers}
    asyncio.run(guard.Guard(app, rules or guard.Rules())(scope, receive, send))
    status: int = sent[0]["status"]
    return status
