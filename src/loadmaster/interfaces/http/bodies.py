"""JSON bodies of requests, with limits on depth; large ones are read off the event loop."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from loadmaster.errors import UsageError

DEPTH_LIMIT = 64
_LARGE_BYTES = 256 << 10


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
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
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
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


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
