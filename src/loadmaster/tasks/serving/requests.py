"""From a prompt to the engine's requests, as one open model takes them."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import ContextLengthError, UsageError
from loadmaster.tasks.api.generation import Generation
from loadmaster.tasks.api.openai_fields import BadFieldError
from loadmaster.tasks.api.openai_requests import Prompt
from loadmaster.tasks.opening import Opened

MOST_CHOICES = 8
MOST_PARTS = 256  # answers of one HTTP request; the queue counts it as one
# No text that says something has more bytes for each token; what has more is not tokenized, for the
# tokens of 8 MB alone would take more memory than the plan of a small model.
BYTES_PER_TOKEN = 64
_SEEDS = 1 << 32

Tokens = tuple[int, ...]
Tokenize = Callable[[Opened], Sequence[Tokens]]  # blocking: the worker and the template answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a route wants generated: each prompt gets `generation.n` answers."""

    model: str | None
    tokenize: Tokenize
    generation: Generation
    prefix_scope: str = ""


def n_ctx_of(opened: Opened) -> int:
    """Tokens that one request may fill. A shared cache lets a sequence grow beyond its share."""
    engine = opened.session.plan.engine
    return min(opened.session.n_ctx, engine.n_ctx // engine.n_seq_max)


def check_prompt(n_prompt: int, n_ctx: int) -> None:
    """Refuse a prompt that leaves no room for an answer, before any of it is read.

    Raises:
        ContextLengthError: with both numbers.
    """
    if n_prompt >= n_ctx:
        raise ContextLengthError(
            f"the prompt has {n_prompt} tokens, n_ctx is {n_ctx}",
            hint="shorten it, or start the server with a larger `--ctx`, if that fits",
            numbers={"n_prompt": n_prompt, "n_ctx": n_ctx},
        )


def check_text(opened: Opened, *texts: str) -> None:
    """Refuse a text that is far too long, before it is tokenized.

    Raises:
        ContextLengthError: with its size and n_ctx.
    """
    n_bytes, n_ctx = sum(len(text.encode()) for text in texts), n_ctx_of(opened)
    if n_bytes > n_ctx * BYTES_PER_TOKEN:
        raise ContextLengthError(
            f"the prompt has {n_bytes} bytes, far more than n_ctx {n_ctx} holds",
            hint="shorten it, or start the server with a larger `--ctx`, if that fits",
            numbers={"n_bytes": n_bytes, "n_ctx": n_ctx},
        )


def check_choices(n: int) -> None:
    """Refuse more answers to one prompt than are served.

    Raises:
        BadFieldError: `n` is too large.
    """
    if n > MOST_CHOICES:
        raise BadFieldError(
            "n", f"`n` is {n}, at most {MOST_CHOICES} are served", numbers={"limit": MOST_CHOICES}
        )


def chat_tokens(messages: Sequence[Mapping[str, Any]]) -> Tokenize:
    """The prompt of a conversation, through the model's template."""

    def tokenize(opened: Opened) -> Sequence[Tokens]:
        loaded = opened.session.loaded
        text = opened.template.render(messages, bos_text=loaded.bos_text, eos_text=loaded.eos_text)
        check_text(opened, text)
        return [opened.session.tokens(text)]

    return tokenize


def prompt_tokens(prompts: Sequence[Prompt]) -> Tokenize:
    """Prompts as they are: special tokens in a text are tokens, and lists of tokens stay."""

    texts = [prompt for prompt in prompts if isinstance(prompt, str)]

    def tokenize(opened: Opened) -> Sequence[Tokens]:
        check_text(opened, *texts)
        read = iter(opened.session.tokens_of(texts))
        return [next(read) if isinstance(p, str) else _checked(opened, p) for p in prompts]

    def _checked(opened: Opened, tokens: Tokens) -> Tokens:
        n_vocab = opened.session.loaded.n_vocab
        largest = max(tokens)
        if largest >= n_vocab:
            raise BadFieldError(
                "prompt", f"`prompt`: token {largest} is none of the model's {n_vocab}"
            )
        return tokens

    return tokenize


def infill_tokens(prefix: str, suffix: str, extra: str = "") -> Tokenize:
    """What goes between two texts, as models are taught that fill in the middle.

    `extra` is text of other files, which stands before all.
    """

    def tokenize(opened: Opened) -> Sequence[Tokens]:
        check_text(opened, prefix, suffix, extra)
        loaded, engine = opened.session.loaded, opened.session.engine
        marks = (loaded.fim_prefix, loaded.fim_suffix, loaded.fim_middle)
        if None in marks:
            raise BadFieldError(
                "suffix",
                "this model has no tokens to fill in the middle with",
                hint="send the whole text as `prompt`, or serve a model for code that has them",
            )
        texts = [engine.tokenize(text, False, False) for text in (extra, prefix, suffix)]
        bos = [loaded.bos_token] if loaded.add_bos and loaded.bos_token is not None else []
        before, after, middle = ([mark] for mark in marks if mark is not None)
        return [(*bos, *texts[0], *before, *texts[1], *after, *texts[2], *middle)]

    return tokenize


def check_writes(model: str, opened: Opened) -> None:
    """Refuse to have a model write that was opened for vectors.

    Raises:
        UsageError: it was.
    """
    if opened.session.plan.engine.pooling is not None:
        raise UsageError(
            f"`{model}` is served for embeddings or ranks, it writes no text",
            hint="ask another model; `/v1/models` lists them",
        )


def engine_requests(
    opened: Opened,
    prompts: Sequence[Tokens],
    job: Job,
    new_id: Callable[[], str],
) -> list[GenerateRequest]:
    """The requests of an answer, prompt by prompt, each choice with a seed of its own.

    Raises:
        ContextLengthError: a prompt leaves no room.
    """
    n_ctx, generation = n_ctx_of(opened), job.generation
    n_parts = len(prompts) * generation.n
    if n_parts > MOST_PARTS:
        raise BadFieldError(
            "prompt",
            f"{n_parts} answers in one request, {MOST_PARTS} at most",
            numbers={"limit": MOST_PARTS},
        )
    seed = secrets.randbelow(_SEEDS)
    requests = []
    for prompt in prompts:
        check_prompt(len(prompt), n_ctx)
        room = n_ctx - len(prompt)
        asked = generation.max_tokens
        bounded = replace(generation, max_tokens=room if asked is None else min(asked, room))
        requests += [
            bounded.request(
                new_id(), prompt, index=index, default_seed=seed, prefix_scope=job.prefix_scope
            )
            for index in range(generation.n)
        ]
    return requests
