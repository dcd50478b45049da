"""What `/set` and `/show` know: names, values and how they are read."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loadmaster.engine.types import SamplingParams
from loadmaster.errors import UsageError
from loadmaster.tasks.chat import ChatSettings

N_CTX_KEYS = ("ctx", "n_ctx")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("it is not between 0 and 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError("it is not 0 or more")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("it is not 0 or more")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("it is not 1 or more")
    return value


_SAMPLING: dict[str, tuple[str, Callable[[str], float]]] = {
    "temp": ("temperature", _not_negative),
    "top_k": ("top_k", _count),
    "top_p": ("top_p", _fraction),
    "min_p": ("min_p", _fraction),
    "typical_p": ("typical_p", _fraction),
    "repeat_penalty": ("repeat_penalty", _not_negative),
    "frequency_penalty": ("frequency_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "seed": ("seed", _count),
}
KEYS = (*_SAMPLING, "max_tokens", "system", "ctx")


def changed(current: ChatSettings, key: str, value: str) -> ChatSettings:
    """The settings with one changed; an empty value resets it.

    Raises:
        UsageError: there is no such key, or the value is not one of its values.
    """
    key = key.replace("-", "_")
    if key == "system":
        return replace(current, system=value or None)
    try:
        if key == "max_tokens":
            return replace(current, max_tokens=_positive(value) if value else None)
        if key in _SAMPLING:
            return replace(current, sampling=_sampling(current.sampling, key, value))
    except ValueError as error:
        reason = str(error) if "it is not" in str(error) else "it is not a number"
        raise UsageError(f"`{value}` cannot be `{key}`: {reason}") from None
    raise UsageError(f"there is no setting `{key}`", hint=f"settings are {', '.join(KEYS)}")


def _sampling(current: SamplingParams, key: str, text: str) -> SamplingParams:
    field, read = _SAMPLING[key]
    value = read(text) if text else getattr(SamplingParams(), field)
    changes: dict[str, Any] = {field: value}
    return replace(current, **changes)


def parse_n_ctx(value: str) -> int:
    """The number of `/set ctx N`.

    Raises:
        UsageError: it is none.
    """
    if not value.strip().isdigit() or int(value) < 1:
        raise UsageError(f"`{value.strip()}` is not a number of tokens", hint="`/set ctx 8192`")
    return int(value)


def text(current: ChatSettings) -> str:
    """The settings as `/show` prints them."""
    sampling = current.sampling
    lines = [f"{key} {getattr(sampling, field)}" for key, (field, _) in _SAMPLING.items()]
    lines.append(f"max_tokens {current.max_tokens or 'until the model ends'}")
    lines.append(f"system {current.system or 'none'}")
    return "\n".join(lines)
