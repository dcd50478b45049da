"""OpenAI's request bodies as frozen values: chat, completions, embeddings. Pure.

A field that is unknown, or that only names something (`user`, `metadata`), is ignored. A field that
would change the answer and is not supported is an error: an answer that ignores it would be wrong.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loadmaster.tasks.api.generation import (
    MOST_CHOICES,
    MOST_TOKENS,
    Generation,
    parse_generation,
)
from loadmaster.tasks.api.openai_fields import BadFieldError as BadFieldError
from loadmaster.tasks.api.openai_fields import Fields

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
EMBEDDINGS_URL = "/v1/embeddings"
GENERATION_URLS = (CHAT_URL, COMPLETIONS_URL)
URLS = (*GENERATION_URLS, EMBEDDINGS_URL)

Prompt = str | tuple[int, ...]  # text, or tokens as they are

_MOST_TOP_LOGPROBS = 20
_MOST_INPUTS = 2048
_MOST_PROMPT_TOKENS = 1 << 20
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
        generation=parse_generation(
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
    best_of = fields.integer("best_of", 1, MOST_CHOICES)
    generation = parse_generation(
        fields,
        max_tokens=fields.integer("max_tokens", 1, MOST_TOKENS),
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


# -- fields that several endpoints share


def _refuse_meaningful(fields: Fields) -> None:
    for name, reason in _MEANINGFUL.items():
        if fields.get(name):
            raise fields.bad(name, reason)
    if "audio" in fields.items("modalities"):
        raise fields.bad("modalities", _MEANINGFUL["audio"])


def _either(fields: Fields, name: str, older: str) -> int | None:
    value = fields.integer(name, 1, MOST_TOKENS)
    return fields.integer(older, 1, MOST_TOKENS) if value is None else value


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
