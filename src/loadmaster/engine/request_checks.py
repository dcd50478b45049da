"""What a request must be before a worker sees it: numbers in range, a schema of bounded size."""

import json
import math
from collections.abc import Iterator, Sequence

from loadmaster.engine.types import GenerateRequest, LoadedModel, SamplingParams
from loadmaster.errors import UsageError
from loadmaster.units import KIB

MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_BYTES = 64 * KIB
MAX_SCHEMA_DEPTH = 64  # llguidance's own parser stops at 128
# Of a name, a constant or a pattern: every step looks ahead in it, 60,000 characters take 0.3 s.
MAX_LITERAL_BYTES = 4 * KIB
MAX_BIASES = 1024
_TOLD_TO_PEOPLE = frozenset({"description", "title", "default", "examples", "$comment"})


def check_request(request: GenerateRequest, loaded: LoadedModel) -> None:
    """Raises UsageError: the engine would abort on it, or the outcome mean nothing."""
    check_tokens(request.prompt, loaded.n_vocab)
    check_sampling(request.sampling, loaded.n_vocab)
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise UsageError(f"top_logprobs {top} is not between 0 and {MAX_TOP_LOGPROBS}")
    if request.json_schema is not None:
        check_schema_text(request.json_schema)


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Raises UsageError: a token is not in the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < n_vocab:
        wrong = next(token for token in tokens if not 0 <= token < n_vocab)
        raise UsageError(f"token {wrong} is not in the vocabulary of {n_vocab} tokens")


def check_sampling(sampling: SamplingParams, n_vocab: int) -> None:
    """Raises UsageError: a parameter is not a number, or a bias is of no token."""
    numbers = {
        name: getattr(sampling, name)
        for name in (
            "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty",
            "presence_penalty",
        )
    }  # fmt: skip
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UsageError(f"{name} {value} is not a finite number")
    if sampling.repeat_penalty <= 0:
        raise UsageError(f"repeat_penalty {sampling.repeat_penalty} is not above 0")
    if len(sampling.logit_bias) > MAX_BIASES:
        raise UsageError(f"{len(sampling.logit_bias)} biases are more than {MAX_BIASES}")
    check_tokens([token for token, _ in sampling.logit_bias], n_vocab)
    if any(math.isnan(bias) for _, bias in sampling.logit_bias):
        raise UsageError("a logit_bias is not a number")


def check_schema_text(text: str) -> None:
    """Raises UsageError: it is no JSON object, or larger or deeper than is compiled."""
    n_bytes = len(text.encode("utf-8", "surrogatepass"))
    if n_bytes > MAX_SCHEMA_BYTES:
        raise UsageError(f"the JSON schema has {n_bytes} bytes, {MAX_SCHEMA_BYTES} are allowed")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise UsageError("the JSON schema is not an object", hint="any JSON is the schema `{}`")
    if _deeper_than(schema, MAX_SCHEMA_DEPTH):
        raise UsageError(f"the JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    longest = max(
        (len(text.encode("utf-8", "surrogatepass")) for text in _literals(schema)), default=0
    )
    if longest > MAX_LITERAL_BYTES:
        raise UsageError(
            f"a name, constant or pattern of the JSON schema has {longest} bytes, "
            f"{MAX_LITERAL_BYTES} are allowed"
        )


def _literals(schema: object) -> Iterator[str]:
    """Every text that may become part of the grammar; depth is bounded by now."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, list):
        for item in schema:
            yield from _literals(item)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            yield name
            if name not in _TOLD_TO_PEOPLE:
                yield from _literals(value)


def _deeper_than(value: object, depth: int) -> bool:
    """Level by level, not by recursion."""
    level = [value]
    for _ in range(depth):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return any(isinstance(part, dict | list) for part in level)
