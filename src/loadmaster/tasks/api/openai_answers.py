"""OpenAI's response bodies: chat, completions, embeddings and errors, whole or as chunks. Pure."""

import base64
import math
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadmaster.engine.types import DoneEvent, GenerateEvent, TextEvent, TokenLogprob
from loadmaster.errors import EngineError, LoadmasterError

Body = dict[str, Any]
_LEAST_LOGPROB = -9999.0  # what OpenAI sends for a token out of reach; JSON has no -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one response, summed over its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def to_json(self) -> Body:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One finished generation."""

    index: int
    text: str
    finish_reason: str  # `stop`, `length`, or what cut it short
    logprobs: tuple[TokenLogprob, ...] | None = None  # None: not asked for


class Gathering:
    """The events of one request, gathered into a choice."""

    def __init__(self, index: int = 0, *, logprobs: bool = False) -> None:
        self.index = index
        self.done: DoneEvent | None = None
        self.n_tokens = 0
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None

    def take(self, event: GenerateEvent) -> None:
        """Add an event."""
        if isinstance(event, TextEvent):
            self._parts.append(event.text)
            self.n_tokens = event.n_tokens
            if self._logprobs is not None:
                self._logprobs += event.logprobs
        elif isinstance(event, DoneEvent):
            self.done = event
            self.n_tokens = event.n_generated

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def choice(self) -> Choice:
        """The choice so far; once it is done, the whole one."""
        return Choice(
            index=self.index,
            text=self.text,
            finish_reason=self.done.finish_reason if self.done else "length",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )


def usage_of(dones: Sequence[DoneEvent], *, n_choices: int = 1) -> Usage:
    """The usage of a response; `dones` come prompt by prompt, `n_choices` of each.

    A prompt counts once, however many choices it has, and so do its cached tokens.
    """
    firsts = dones[::n_choices]
    return Usage(
        prompt_tokens=sum(done.n_prompt for done in firsts),
        completion_tokens=sum(done.n_generated for done in dones),
        cached_tokens=sum(done.n_cached for done in firsts),
    )


def new_id(prefix: str) -> str:
    """`chatcmpl-…`, `cmpl-…`: an id that no other response has."""
    return f"{prefix}-{uuid.uuid4().hex}"


# -- whole responses


def chat_completion(
    *, answer_id: str, created: int, model: str, choices: Sequence[Choice], usage: Usage
) -> Body:
    """A `chat.completion`."""
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ],
        "usage": usage.to_json(),
    }


def completion(
    *, answer_id: str, created: int, model: str, choices: Sequence[Choice], usage: Usage
) -> Body:
    """A `text_completion`."""
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": completion_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ],
        "usage": usage.to_json(),
    }


def embeddings(
    *,
    model: str,
    vectors: Sequence[Sequence[float]],
    n_tokens: int,
    encoding_format: Literal["float", "base64"] = "float",
    dimensions: int | None = None,
) -> Body:
    """A list of embeddings; with `dimensions`, the first so many, at length 1 again."""
    shown = [shortened(vector, dimensions) for vector in vectors]
    return {
        "object": "list",
        "model": model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64_floats(vector) if encoding_format == "base64" else list(vector),
            }
            for index, vector in enumerate(shown)
        ],
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


def shortened(vector: Sequence[float], dimensions: int | None) -> Sequence[float]:
    """The first `dimensions` of a vector, scaled to length 1; the vector itself when not fewer."""
    if dimensions is None or dimensions >= len(vector):
        return vector
    head = vector[:dimensions]
    norm = math.sqrt(sum(x * x for x in head))
    return [x / norm for x in head] if norm else list(head)


def base64_floats(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64, what OpenAI's own clients ask for."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


# -- chunks of a stream


def chat_chunk(
    *,
    answer_id: str,
    created: int,
    model: str,
    index: int = 0,
    role: str | None = None,
    text: str | None = None,
    logprobs: tuple[TokenLogprob, ...] | None = None,
    finish_reason: str | None = None,
) -> Body:
    """A `chat.completion.chunk`. The first of a choice has the role, the last its reason."""
    delta: Body = {}
    if role is not None:
        delta["role"] = role
    if text is not None:
        delta["content"] = text
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(logprobs),
        "finish_reason": finish_reason,
    }
    return _chunk("chat.completion.chunk", answer_id, created, model, [choice])


def completion_chunk(
    *,
    answer_id: str,
    created: int,
    model: str,
    index: int = 0,
    text: str = "",
    logprobs: tuple[TokenLogprob, ...] | None = None,
    finish_reason: str | None = None,
) -> Body:
    """A `text_completion` with the text since the last one."""
    choice = {
        "index": index,
        "text": text,
        "logprobs": completion_logprobs(logprobs),
        "finish_reason": finish_reason,
    }
    return _chunk("text_completion", answer_id, created, model, [choice])


def usage_chunk(*, chat: bool, answer_id: str, created: int, model: str, usage: Usage) -> Body:
    """The last chunk, for those who asked with `include_usage`: no choices, only the usage."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {**_chunk(kind, answer_id, created, model, []), "usage": usage.to_json()}


def _chunk(kind: str, answer_id: str, created: int, model: str, choices: list[Body]) -> Body:
    return {
        "id": answer_id,
        "object": kind,
        "created": created,
        "model": model,
        "choices": choices,
    }


# -- log-probabilities


def chat_logprobs(logprobs: tuple[TokenLogprob, ...] | None) -> Body | None:
    """The form of chat: a list of tokens, each with its bytes and what was likeliest."""
    if logprobs is None:
        return None
    return {"content": [_chat_token(token) for token in logprobs], "refusal": None}


def _chat_token(token: TokenLogprob) -> Body:
    likeliest = [_one_token(raw, logprob) for _, raw, logprob in token.top]
    return {**_one_token(token.raw, token.logprob), "top_logprobs": likeliest}


def _one_token(raw: Sequence[int], logprob: float) -> Body:
    return {"token": _text(raw), "logprob": _finite(logprob), "bytes": list(raw)}


def completion_logprobs(logprobs: tuple[TokenLogprob, ...] | None) -> Body | None:
    """The older form: parallel lists. `text_offset` counts characters of the tokens' texts."""
    if logprobs is None:
        return None
    texts = [_text(token.raw) for token in logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in logprobs],
        "top_logprobs": [
            {_text(raw): _finite(logprob) for _, raw, logprob in token.top} for token in logprobs
        ],
        "text_offset": _offsets(texts),
    }


def _offsets(texts: Sequence[str]) -> list[int]:
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return offsets


def _text(raw: Sequence[int]) -> str:
    return bytes(raw).decode("utf-8", errors="replace")


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if not math.isnan(logprob) else _LEAST_LOGPROB


# -- errors


def error_body(error: LoadmasterError) -> Body:
    """OpenAI's error object; the hint is part of the message, our numbers stand beside it."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    value: Body = {
        "message": message,
        "type": "invalid_request_error" if error.http_status < 500 else "server_error",
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    if error.numbers:
        value["numbers"] = error.numbers
    return {"error": value}


def failure_of(done: DoneEvent) -> LoadmasterError | None:
    """Why a request ended without an answer; None when it has one."""
    if done.finish_reason != "failed":
        return None
    reason = done.error or "no reason"
    return EngineError(f"the engine failed after {done.n_generated} tokens: {reason}")
