"""Reading the fields of a JSON body: each error names the field, the value and the range."""

from collections.abc import Mapping, Sequence
from typing import Any

from loadmaster.errors import Number, UsageError

_SHOWN_CHARS = 40
# Each item is checked on the server's event loop: so many take about 50 ms.
MOST_ITEMS = 1 << 14


class BadFieldError(UsageError):
    """A field of a request is missing, has another type, or is out of range; `param` names it."""

    def __init__(
        self,
        param: str | None,
        message: str,
        *,
        hint: str | None = None,
        numbers: Mapping[str, Number] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, numbers=numbers)
        self.param = param


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


class Fields:
    """A JSON object and where it stands in its request. A null counts as absent, as with OpenAI."""

    def __init__(self, value: object, place: str = "") -> None:
        """`place` is the object's own path (`messages[0]`), empty for the body.

        Raises:
            BadFieldError: it is no object.
        """
        if not isinstance(value, dict):
            name = f"`{place}`" if place else "the body"
            raise BadFieldError(place or None, f"{name} is {_kind(value)}, not an object")
        self._value: dict[str, Any] = value
        self._place = place

    def path(self, name: str) -> str:
        """A field's path in the request."""
        return f"{self._place}.{name}" if self._place else name

    def get(self, name: str) -> Any:
        """The value as it is; None when absent."""
        return self._value.get(name)

    def bad(self, name: str, message: str, *, hint: str | None = None) -> BadFieldError:
        """An error about a field, to raise."""
        path = self.path(name)
        return BadFieldError(path, f"`{path}`: {message}", hint=hint)

    def required(self, name: str) -> Any:
        """A value that must be there."""
        if self.get(name) is None:
            raise self.bad(name, "missing")
        return self._value[name]

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number of low…high."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(name, f"{_shown(value)} is not a number")
        if not low <= value <= high:
            raise self.bad(name, f"{_shown(value)} is not between {low:g} and {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number of low…high."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some clients write every number with a point
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(name, f"{_shown(value)} is not a whole number")
        if not low <= value <= high:
            raise self.bad(name, f"{_shown(value)} is not between {low} and {high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.bad(name, f"{_shown(value)} is not true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.bad(name, f"{_kind(value)}, not a string")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """One of some words."""
        value = self.text(name)
        if value is not None and value not in choices:
            listed = ", ".join(f"`{choice}`" for choice in choices)
            raise self.bad(name, f"`{_shown(value)}` is none of {listed}")
        return value

    def items(self, name: str, most: int = MOST_ITEMS) -> list[Any]:
        """A list of no more than `most`; absent is empty."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.bad(name, f"{_kind(value)}, not a list")
        if len(value) > most:
            raise self.bad(name, f"{len(value)} items, {most} at most")
        return value

    def object(self, name: str) -> "Fields | None":
        """An object inside this one."""
        value = self.get(name)
        return None if value is None else Fields(value, self.path(name))


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a truth value", str: "a string", list: "a list"}
    number = "a number" if isinstance(value, int | float) else "an object"
    return names.get(type(value), number)
