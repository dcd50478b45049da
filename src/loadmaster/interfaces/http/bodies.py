"""JSON bodies of requests, with limits on depth; large ones are read off the event loop."""

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.requests import Request

from loadmaster.errors import UsageError

DEPTH_LIMIT = 64
_LARGE_BYTES = 256 << 10
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # a half of UTF-16's pairs, as JSON writes it


async def read_json(request: Request) -> dict[str, Any]:
    """The body as an object.

    Raises:
        UsageError: it is no JSON object, or nested too deeply.
    """
    raw = await request.body()
    if len(raw) > _LARGE_BYTES:
        return await asyncio.to_thread(parse_object, raw)
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object of at most `DEPTH_LIMIT` levels.

    Raises:
        UsageError: it is none.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8: byte {error.start} is no character") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"the body is not JSON{where}") from None  # and nothing of its text
    if not isinstance(value, dict):
        raise UsageError("the body is not a JSON object")
    if _is_deeper(value, DEPTH_LIMIT):
        raise _too_deep()
    if _SURROGATE.search(raw) is not None:
        _refuse_halves(value)
    return value


def _refuse_halves(value: dict[str, Any]) -> None:
    """Pairs became characters when they were read; what is left over is half of one."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError(
            "the body has half of a surrogate pair, which is no character",
            hint="cut texts between characters, not between UTF-16 units",
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    """1e999 would be read as an infinity, which no JSON can tell of again."""
    value = float(text)
    if math.isinf(value):
        raise UsageError("a number of the body is too large")
    return value


def _too_deep() -> UsageError:
    return UsageError(
        f"the body is nested more than {DEPTH_LIMIT} levels deep", numbers={"limit": DEPTH_LIMIT}
    )


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [v for v in node.values() if isinstance(v, dict | list)]
    return [v for v in node if isinstance(v, dict | list)]
