"""Errors across the wire: only ours, by name, with every field checked."""

from typing import Any

from loadmaster import errors
from loadmaster.errors import DamagedFileError, EngineError, LoadmasterError


def error_json(error: LoadmasterError) -> dict[str, Any]:
    """An error as `remote_error` reads it."""
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "numbers": error.numbers,
        "code": error.code,
    }


def remote_error(value: object) -> LoadmasterError:
    """The error that a worker reports; one that makes no sense is an EngineError, too."""
    if not isinstance(value, dict) or not isinstance(value.get("message"), str):
        return EngineError("the worker reported an error that cannot be read")
    message: str = value["message"]
    hint = value.get("hint") if isinstance(value.get("hint"), str) else None
    numbers = _numbers(value.get("numbers"))
    if value.get("type") == DamagedFileError.__name__:
        code = str(value.get("code", "damaged"))
        return DamagedFileError(message, code=code, hint=hint, numbers=numbers)
    return _class(value.get("type"))(message, hint=hint, numbers=numbers)


def _class(name: object) -> type[LoadmasterError]:
    found = getattr(errors, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, LoadmasterError):
        return found
    return EngineError


def _numbers(value: object) -> dict[str, int | float | str | None]:
    if not isinstance(value, dict):
        return {}
    return {
        str(key): number
        for key, number in value.items()
        if number is None or isinstance(number, int | float | str)
    }
