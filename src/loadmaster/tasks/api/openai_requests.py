"""OpenAI's request bodies as frozen values: chat, completions, embeddings. Pure.

A field that is unknown, or that only names something (`user`, `metadata`), is ignored. A field that
would change the answer and is not supported is an error: an answer that ignores it would be wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loadmaster.engine.types import GenerateRequest, SamplingParams
from loadmaster.tasks.api.openai_fields import BadFieldError as BadFieldError
from loadmaster.tasks.api.openai_fields import Fields

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
EMBEDDINGS_URL = "/v1/embeddings"
GENERATION_URLS = (CHAT_URL, COMPLETIONS_URL)
URLS = (*GENERATION_URLS, EMBEDDINGS_URL)

Prompt = str | tuple[int, ...]  # text, or tokens as they are

ANY_OBJECT = '{"type": "object"}'  # JSON mode: whatever an object may hold
_SEEDS = 1 << 32
_MOST_TOKENS = 1 << 30
_MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_TOP_LOGPROBS = 20
_MOST_INPUTS = 2048
_MOST_PROMPT_TOKENS = 1 << 20
_MOST_BIASES = 1024
_BIAS_DIGITS = 10
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MEANINGFUL = {
    # Unsupported fields that would change the answer, with what to do instead.
    "tools": "tools are not supported",
    "functions": "functions are not supported",
    "audio": "only text is generated",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "nothing here searches the web",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How to generate, whatever the endpoint."""

    sampling: SamplingParams  # its seed counts only where `seed` is not None
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    top_logprobs: int | None
    json_schema: str | None
    ignore_eos: bool
    stream: bool
    include_usage: bool  # of a stream: one more chunk with the usage

    def request(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        index: int = 0,
        room: int | None = None,
        default_seed: int = 0,
        priority: int = 0,
        prefix_scope: str = "",
    ) -> GenerateRequest:
        """The engine's request of choice `index`; each of the n choices has a seed of its own.

        `default_seed` counts when the body names none: random for a person, fixed for a job. No
        more than `room` tokens are generated, where the engine has more than a request may fill.
        """
        seed = (default_seed if self.seed is None else self.seed) + index
        return GenerateRequest(
            request_id=request_id,
            prompt=tuple(prompt),
            max_tokens=_least(self.max_tokens, room),
            sampling=replace(self.sampling, seed=seed % _SEEDS),
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            priority=priority,
            prefix_scope=prefix_scope,
            top_logprobs=self.top_logprobs,
            json_schema=self.json_schema,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A body of `/v1/chat/completions`; messages are as the chat template takes them."""

    model: str | None
    messages: tuple[Mapping[str, str], ...]
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A body of `/v1/completions`. Each prompt gets `n` choices, prompt by prompt."""

    model: str | None
    prompts: tuple[Prompt, ...]
    generation: Generation
    suffix: str | None  # the text that follows: only models with fill-in-the-middle tokens take it
    echo: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """A body of `/v1/embeddings`."""

    model: str | None
    inputs: tuple[Prompt, ...]
    encoding_format: Literal["float", "base64"]
    dimensions: int | None  # keep so many, normalised again


OpenAIRequest = ChatRequest | CompletionRequest | EmbeddingRequest


def parse_request(url: str, body: object) -> OpenAIRequest:
    """The body of a POST to one of `URLS`.

    Raises:
        BadFieldError: a field is missing, malformed or not supported; `param` names it.
    """
    match url:
        case "/v1/chat/completions":
            return parse_chat(body)
        case "/v1/completions":
            return parse_completion(body)
        case "/v1/embeddings":
            return parse_embedding(body)
    raise BadFieldError(
        "url", f"`{url}` is not an endpoint", hint=f"endpoints are {', '.join(URLS)}"
    )


def parse_chat(body: object) -> ChatRequest:
    """A chat: messages in, the next one out.

    Raises:
        BadFieldError: see `parse_request`.
    """
    fields = Fields(body)
    _refuse_meaningful(fields)
    messages = fields.items("messages")
    if not messages:
        raise fields.bad("messages", "empty" if fields.get("messages") == [] else "missing")
    turns = tuple(_message(Fields(m, f"messages[{i}]")) for i, m in enumerate(messages))
    return ChatRequest(
        model=fields.text("model"),
        messages=turns,
        generation=_generation(
            fields,
            max_tokens=_either(fields, "max_completion_tokens", "max_tokens"),
            top_logprobs=_chat_logprobs(fields),
        ),
    )


def parse_completion(body: object) -> CompletionRequest:
    """A completion: text or tokens in, what follows out.

    Raises:
        BadFieldError: see `parse_request`.
    """
    fields = Fields(body)
    _refuse_meaningful(fields)
    best_of = fields.integer("best_of", 1, _MOST_CHOICES)
    generation = _generation(
        fields,
        max_tokens=fields.integer("max_tokens", 1, _MOST_TOKENS),
        top_logprobs=fields.integer("logprobs", 0, _MOST_TOP_LOGPROBS),
    )
    if best_of not in (None, generation.n):
        raise fields.bad("best_of", f"{best_of} is not `n`; choosing among more is not supported")
    return CompletionRequest(
        model=fields.text("model"),
        prompts=_prompts(fields, "prompt"),
        generation=generation,
        suffix=fields.text("suffix") or None,
        echo=fields.flag("echo"),
    )


def parse_embedding(body: object) -> EmbeddingRequest:
    """Embeddings of one text or of several.

    Raises:
        BadFieldError: see `parse_request`.
    """
    fields = Fields(body)
    encoding = fields.choice("encoding_format", ("float", "base64"))
    return EmbeddingRequest(
        model=fields.text("model"),
        inputs=_prompts(fields, "input"),
        encoding_format="base64" if encoding == "base64" else "float",
        dimensions=fields.integer("dimensions", 1, 1 << 20),
    )


def stable_seed(text: str) -> int:
    """A seed that is the same for the same text: a job run again gives comparable answers."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _least(first: int | None, second: int | None) -> int | None:
    return min((n for n in (first, second) if n is not None), default=None)


# -- fields that several endpoints share


def _refuse_meaningful(fields: Fields) -> None:
    for name, reason in _MEANINGFUL.items():
        if fields.get(name):
            raise fields.bad(name, reason)
    if "audio" in fields.items("modalities"):
        raise fields.bad("modalities", _MEANINGFUL["audio"])


def _generation(fields: Fields, *, max_tokens: int | None, top_logprobs: int | None) -> Generation:
    options = fields.object("stream_options")
    return Generation(
        sampling=_sampling(fields),
        seed=fields.integer("seed", -(1 << 63), (1 << 64) - 1),
        max_tokens=max_tokens,
        stop=_stops(fields),
        n=fields.integer("n", 1, _MOST_CHOICES) or 1,
        top_logprobs=top_logprobs,
        json_schema=_json_schema(fields),
        ignore_eos=fields.flag("ignore_eos"),
        stream=fields.flag("stream"),
        include_usage=options is not None and options.flag("include_usage"),
    )


def _sampling(fields: Fields) -> SamplingParams:
    """What the body says; for what it leaves open, the defaults of `run`, not OpenAI's."""
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "typical_p": fields.number("typical_p", 0, 1),
        "top_k": fields.integer("top_k", -1, _MOST_TOKENS),
        "repeat_penalty": _repeat_penalty(fields),
        "repeat_last_n": fields.integer("repeat_last_n", -1, _MOST_TOKENS),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "logit_bias": _biases(fields),
    }
    if given["top_k"] == -1:  # vLLM's word for all of them
        given["top_k"] = 0
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(SamplingParams(), **chosen)


def _biases(fields: Fields) -> tuple[tuple[int, float], ...] | None:
    """OpenAI's form: token ids as keys."""
    biases = fields.object("logit_bias")
    if biases is None:
        return None
    names = list(fields.get("logit_bias"))
    if len(names) > _MOST_BIASES:
        raise fields.bad("logit_bias", f"{len(names)} biases, {_MOST_BIASES} at most")
    unknown = [name for name in names if not name.isdecimal() or len(name) > _BIAS_DIGITS]
    if unknown:
        raise biases.bad(unknown[0][:_BIAS_DIGITS], "not a token's number")
    values = ((int(name), biases.number(name, -100, 100)) for name in names)
    return tuple((token, value) for token, value in values if value is not None)


def _repeat_penalty(fields: Fields) -> float | None:
    """llama.cpp's name, or vLLM's."""
    ours = fields.number("repeat_penalty", 0.01, 10)
    return fields.number("repetition_penalty", 0.01, 10) if ours is None else ours


def _either(fields: Fields, name: str, older: str) -> int | None:
    value = fields.integer(name, 1, _MOST_TOKENS)
    return fields.integer(older, 1, _MOST_TOKENS) if value is None else value


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else fields.items("stop")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.bad("stop", "not a string, or not a list of strings that are not empty")
    if len(stops) > _MOST_STOPS:
        raise fields.bad("stop", f"{len(stops)} texts, {_MOST_STOPS} at most")
    return tuple(stops)


def _json_schema(fields: Fields) -> str | None:
    """`response_format` as a JSON schema's text."""
    wanted = fields.object("response_format")
    if wanted is None:
        return None
    wanted.required("type")
    kind = wanted.choice("type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        holder = wanted.object("json_schema")
        if holder is None or not isinstance(holder.get("schema"), dict):
            raise wanted.bad("json_schema", "`schema` is missing, or no object")
        return json.dumps(holder.get("schema"))
    return ANY_OBJECT if kind == "json_object" else None


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, _MOST_TOP_LOGPROBS)
    if top and not wanted:
        raise fields.bad("top_logprobs", f"{top} without `logprobs`: true")
    return (top or 0) if wanted else None


# -- messages and prompts


def _message(fields: Fields) -> dict[str, str]:
    role = fields.required("role")
    if not isinstance(role, str) or role not in _ROLES:
        listed = ", ".join(f"`{name}`" for name in _ROLES)
        raise fields.bad("role", f"`{role}` is none of {listed}")
    if fields.get("tool_calls"):
        raise fields.bad("tool_calls", _MEANINGFUL["tools"])
    return {"role": _ROLES[role], "content": _content(fields)}


def _content(fields: Fields) -> str:
    value = fields.required("content")
    if isinstance(value, str):
        return value
    parts = [
        Fields(p, f"{fields.path('content')}[{i}]") for i, p in enumerate(fields.items("content"))
    ]
    return "".join(map(_text_part, parts))


def _text_part(part: Fields) -> str:
    kind = part.required("type")
    if kind != "text":
        raise part.bad("type", f"`{kind}` is not supported, only `text` is")
    part.required("text")
    return part.text("text") or ""


def _prompts(fields: Fields, name: str) -> tuple[Prompt, ...]:
    """A text, tokens, or a list of either; none of them empty."""
    value = fields.required(name)
    if isinstance(value, str):
        prompts: list[Any] = [value]
    else:
        items = fields.items(name, _MOST_PROMPT_TOKENS)
        prompts = [items] if items and all(map(_is_token, items)) else items
    if not prompts:
        raise fields.bad(name, "empty")
    if len(prompts) > _MOST_INPUTS:
        raise fields.bad(name, f"{len(prompts)} inputs, {_MOST_INPUTS} at most")
    return tuple(_prompt(fields, name, prompt) for prompt in prompts)


def _prompt(fields: Fields, name: str, value: Any) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(map(_is_token, value)):
        return tuple(value)
    raise fields.bad(name, "not a text or a list of tokens, or an empty one")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
