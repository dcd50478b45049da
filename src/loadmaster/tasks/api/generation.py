"""How to generate, as the bodies of OpenAI's endpoints say it: sampling, stops, schemas. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.engine.types import GenerateRequest, SamplingParams
from loadmaster.tasks.api.openai_fields import Fields

ANY_OBJECT = '{"type": "object"}'  # JSON mode: whatever an object may hold
_SEEDS = 1 << 32
MOST_TOKENS = 1 << 30
MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_BIASES = 1024
_BIAS_DIGITS = 10


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


def parse_generation(
    fields: Fields, *, max_tokens: int | None, top_logprobs: int | None
) -> Generation:
    """What a body says of it; two of its fields have other forms at each endpoint.

    Raises:
        BadFieldError: a field is malformed or not supported.
    """
    options = fields.object("stream_options")
    return Generation(
        sampling=_sampling(fields),
        seed=fields.integer("seed", -(1 << 63), (1 << 64) - 1),
        max_tokens=max_tokens,
        stop=_stops(fields),
        n=fields.integer("n", 1, MOST_CHOICES) or 1,
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
        "top_k": fields.integer("top_k", -1, MOST_TOKENS),
        "repeat_penalty": _repeat_penalty(fields),
        "repeat_last_n": fields.integer("repeat_last_n", -1, MOST_TOKENS),
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


def _least(first: int | None, second: int | None) -> int | None:
    return min((n for n in (first, second) if n is not None), default=None)
