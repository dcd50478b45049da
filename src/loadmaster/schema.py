"""Frozen dataclasses to JSON values and back, checked against their type hints.

What comes from the other side of the wire is data: an unknown key, a missing one or a value of
another type is an error that names its place.
"""

import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
Decoder = Callable[[object, str], Any]


class SchemaError(ValueError):
    """A value does not have the shape its type says."""


def to_json(value: object) -> object:
    """A JSON value of a dataclass and everything inside it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    raise TypeError(f"no JSON form of {type(value).__name__}")


def from_json(cls: type[T], value: object) -> T:
    """A `cls` from a JSON value.

    Raises:
        SchemaError: the value has another shape.
    """
    decoded: T = _decoder(typing.cast(Any, cls))(value, getattr(cls, "__name__", "value"))
    return decoded


@functools.cache
def _decoder(hint: Any) -> Decoder:
    origin, arguments = get_origin(hint), get_args(hint)
    supertype = getattr(hint, "__supertype__", None)  # NewType
    if supertype is not None:
        return _decoder(supertype)
    if is_dataclass(hint):
        return _dataclass_decoder(typing.cast(type, hint))
    if origin in (Union, types.UnionType):
        return _union_decoder(arguments)
    if origin is Literal:
        return _literal_decoder(arguments)
    if origin is tuple:
        return _tuple_decoder(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping_decoder(*arguments)
    return _scalar_decoder(hint)


def _scalar_decoder(hint: Any) -> Decoder:
    accepted: tuple[type, ...] = {float: (int, float), Path: (str,)}.get(hint, (hint,))

    def decode(value: object, place: str) -> object:
        # bool is an int to Python, not to us.
        if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
            raise SchemaError(f"{place}: {type(value).__name__}, not {hint.__name__}")
        if hint is float:
            return float(typing.cast(float, value))
        return Path(typing.cast(str, value)) if hint is Path else value

    return decode


def _literal_decoder(choices: tuple[object, ...]) -> Decoder:
    def decode(value: object, place: str) -> object:
        if value not in choices:
            raise SchemaError(f"{place}: {value!r} is none of {choices}")
        return value

    return decode


def _union_decoder(arguments: tuple[Any, ...]) -> Decoder:
    decoders = [_decoder(hint) for hint in arguments if hint is not type(None)]
    optional = type(None) in arguments

    def decode(value: object, place: str) -> object:
        if value is None and optional:
            return None
        error: SchemaError | None = None
        for decoder in decoders:
            try:
                return decoder(value, place)
            except SchemaError as failure:
                error = failure
        raise error or SchemaError(f"{place}: null")

    return decode


def _tuple_decoder(arguments: tuple[Any, ...]) -> Decoder:
    repeated = len(arguments) == 2 and arguments[1] is Ellipsis
    decoders = [_decoder(hint) for hint in arguments if hint is not Ellipsis]

    def decode(value: object, place: str) -> object:
        if not isinstance(value, list):
            raise SchemaError(f"{place}: {type(value).__name__}, not a list")
        if not repeated and len(value) != len(decoders):
            raise SchemaError(f"{place}: {len(value)} items, not {len(decoders)}")
        chosen = decoders * len(value) if repeated else decoders
        return tuple(
            decoder(item, f"{place}[{index}]")
            for index, (decoder, item) in enumerate(zip(chosen, value, strict=True))
        )

    return decode


def _mapping_decoder(key_hint: Any, value_hint: Any) -> Decoder:
    decoder = _decoder(value_hint)

    def decode(value: object, place: str) -> object:
        if not isinstance(value, dict):
            raise SchemaError(f"{place}: {type(value).__name__}, not an object")
        return {key_hint(key): decoder(item, f"{place}.{key}") for key, item in value.items()}

    return decode


def _dataclass_decoder(cls: type) -> Decoder:
    hints = typing.get_type_hints(cls)
    decoders = {field.name: _decoder(hints[field.name]) for field in fields(cls)}
    required = {
        field.name
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    }

    def decode(value: object, place: str) -> object:
        if not isinstance(value, dict):
            raise SchemaError(f"{place}: {type(value).__name__}, not an object")
        if unknown := value.keys() - decoders.keys():
            raise SchemaError(f"{place}.{min(unknown)}: unknown key")
        if missing := required - value.keys():
            raise SchemaError(f"{place}.{min(missing)}: missing")
        return cls(**{key: decoders[key](item, f"{place}.{key}") for key, item in value.items()})

    return decode
