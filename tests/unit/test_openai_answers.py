"""Response bodies of OpenAI's API."""

import base64
import json
import struct

import pytest

from loadmaster.engine.types import DoneEvent, FinishReason, TextEvent, TokenLogprob
from loadmaster.errors import ContextLengthError, EngineError
from loadmaster.tasks.api import openai_answers as answers

LOGPROBS = (
    TokenLogprob(token=1, raw=(72,), logprob=-0.5, top=((1, (72,), -0.5), (2, (195,), -1.5))),
    TokenLogprob(token=3, raw=(105,), logprob=float("-inf")),
)


def done(n_prompt: int, n_generated: int, reason: FinishReason = "stop") -> DoneEvent:
    return DoneEvent(
        request_id="r", finish_reason=reason, n_prompt=n_prompt, n_cached=2,
        n_generated=n_generated, prefill_s=0.0, decode_s=0.0,
    )  # fmt: skip


def test_events_gather_into_a_choice() -> None:
    gathering = answers.Gathering(1, logprobs=True)
    gathering.take(TextEvent(request_id="r", text="H", n_tokens=1, logprobs=LOGPROBS[:1]))
    assert gathering.n_tokens == 1
    gathering.take(TextEvent(request_id="r", text="i", n_tokens=2, logprobs=LOGPROBS[1:]))
    gathering.take(done(3, 2, "length"))
    choice = gathering.choice()
    assert (choice.index, choice.text, choice.finish_reason) == (1, "Hi", "length")
    assert choice.logprobs == LOGPROBS


def test_a_chat_is_as_openai_writes_it() -> None:
    choice = answers.Choice(index=0, text="Hi", finish_reason="stop", logprobs=LOGPROBS)
    usage = answers.usage_of([done(5, 2), done(5, 3)], n_choices=2)
    body = answers.chat_completion(
        answer_id="chatcmpl-1", created=7, model="m", choices=[choice], usage=usage
    )
    assert body["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    assert body["choices"][0]["message"]["content"] == "Hi"
    first, second = body["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], len(first["top_logprobs"])) == ("H", [72], 2)
    assert second["logprob"] == -9999.0
    assert "Infinity" not in json.dumps(body)


def test_a_completion_has_the_older_form_of_logprobs() -> None:
    choice = answers.Choice(index=0, text="Hi", finish_reason="stop", logprobs=LOGPROBS)
    body = answers.completion(
        answer_id="cmpl-1", created=7, model="m", choices=[choice],
        usage=answers.usage_of([done(5, 2)]),
    )  # fmt: skip
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "i"]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["top_logprobs"][0] == {"H": -0.5, "\ufffd": -1.5}


def test_chunks_have_deltas_and_the_usage_comes_last() -> None:
    same = {"answer_id": "c", "created": 7, "model": "m"}
    first = answers.chat_chunk(**same, role="assistant", text="")  # type: ignore[arg-type]
    last = answers.chat_chunk(**same, finish_reason="stop")  # type: ignore[arg-type]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    usage = answers.usage_of([done(1, 1)])
    tail = answers.usage_chunk(chat=True, answer_id="c", created=7, model="m", usage=usage)
    assert tail["choices"] == []
    assert tail["usage"]["total_tokens"] == 2
    assert answers.completion_chunk(answer_id="c", created=7, model="m", text="x")["choices"]


def test_embeddings_are_numbers_or_base64_and_may_be_shortened() -> None:
    body = answers.embeddings(model="m", vectors=[[3.0, 4.0, 12.0]], n_tokens=4, dimensions=2)
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    packed = answers.embeddings(
        model="m", vectors=[[1.0, -2.0]], n_tokens=4, encoding_format="base64"
    )
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<2f", raw) == (1.0, -2.0)


def test_errors_have_openais_form_and_our_numbers() -> None:
    error = ContextLengthError("too long", hint="shorten it", numbers={"n_ctx": 5})
    assert answers.error_body(error)["error"] == {
        "message": "too long; shorten it", "type": "invalid_request_error", "param": None,
        "code": "context_length_exceeded", "numbers": {"n_ctx": 5},
    }  # fmt: skip
    assert answers.error_body(EngineError("dead"))["error"]["type"] == "server_error"


def test_a_failed_request_says_why() -> None:
    assert answers.failure_of(done(1, 1)) is None
    failure = answers.failure_of(done(1, 4, "failed"))
    assert failure is not None
    assert "after 4 tokens" in failure.message
