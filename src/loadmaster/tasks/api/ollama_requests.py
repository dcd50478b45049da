"""Ollama's bodies in OpenAI's words, so that one parser checks both. Pure."""

from typing import Any

from loadmaster.tasks.api.openai_fields import Fields
from loadmaster.tasks.serving.types import parse_keep_alive

# Ollama's `options` that mean the same under another name; those not named here keep theirs.
_NAMES = {"num_predict": "max_tokens"}
# What the server or the plan decides. A prompt too long for n_ctx is an error, never cut, so a
# `num_ctx` that is not ours loses nothing.
_IGNORED = frozenset(
    {
        "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "numa",
        "num_keep", "low_vram", "f16_kv", "vocab_only", "use_mlock", "penalize_newline",
        "mirostat", "mirostat_tau", "mirostat_eta", "tfs_z", "repeat_last_n",
    }
)  # fmt: skip


def as_openai(body: dict[str, Any]) -> dict[str, Any]:
    """The same request as OpenAI's clients would send it.

    Raises:
        BadFieldError: something is asked for that is not supported.
    """
    fields = Fields(body)
    for name in ("images", "context"):
        if fields.get(name):
            raise fields.bad(name, "not supported")
    options: dict[str, Any] = fields.get("options") or {}
    if not isinstance(options, dict):
        raise fields.bad("options", "not an object")
    given = {_NAMES.get(k, k): value for k, value in options.items() if k not in _IGNORED}
    if isinstance(given.get("max_tokens"), int) and given["max_tokens"] < 1:
        del given["max_tokens"]  # -1 and -2 are `as many as there are`
    if isinstance(given.get("seed"), int) and given["seed"] < 0:
        del given["seed"]
    for name in ("model", "prompt", "messages", "tools"):
        if fields.get(name) is not None:
            given[name] = fields.get(name)
    given["stream"] = fields.get("stream") is not False
    return {**given, **_format(fields)}


def _format(fields: Fields) -> dict[str, Any]:
    """`format`: the word `json`, or a schema."""
    wanted = fields.get("format")
    if not wanted:
        return {}
    if wanted == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(wanted, dict):
        raise fields.bad("format", "neither `json` nor a JSON schema")
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": wanted}}}


def keep_alive_s(fields: Fields) -> float | None:
    """How long the model is to stay: seconds, or a text as `5m`; below 0 for good.

    Raises:
        BadFieldError: it is no time.
    """
    value = fields.get("keep_alive")
    if value is None:
        return None
    try:
        return parse_keep_alive(str(value))
    except ValueError:
        raise fields.bad("keep_alive", "not a time: `5m`, `90s`, seconds, or -1") from None
