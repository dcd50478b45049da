"""Who may ask, checked before any route is looked at: key, Host, Origin, size of the body.

A page in a browser can send requests to 127.0.0.1 and can point its own name there, so loopback is
no boundary by itself: a request has to name a host that is ours and may not come from a foreign
page. Any other bind needs a key.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loadmaster.errors import AuthError, LoadmasterError, UsageError
from loadmaster.interfaces.http.errors import error_response

BODY_LIMIT_BYTES = 8 << 20
FILE_LIMIT_BYTES = 200 << 20
BODY_WAIT_S = 30.0  # for the next bytes of a body that has begun
BODY_SLACK_S = 60.0  # for the whole body, and a second more for each so many bytes of it:
BODY_PACE_BYTES = 1 << 10
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health"})  # says only that the server is up
FILES_PATH = "/v1/files"
SCOPE_KEY = "loadmaster.prefix_scope"
_HOST = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[\w.-]+))(?::(?P<port>[0-9]{1,5}))?", re.A
)
_MOST_PORT = 65_535
_MOST_DIGITS = 18  # of a length; more are no number of bytes
_CORS_HEADERS = b"authorization, content-type, x-api-key, api-key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the guard lets pass."""

    keys: tuple[str, ...] = field(default=(), repr=False)
    loopback: bool = True  # bound to loopback: the Host must name it
    hosts: frozenset[str] = frozenset()  # names beside those of loopback
    origins: frozenset[str] = frozenset()  # pages that may ask: `http://localhost:3000`


class Guard:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules
        self._digests = tuple(map(_digest, rules.keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # websockets: none are spoken here
        try:
            headers = Headers(scope["headers"])
            self._check_host(headers)
            origin = self._check_origin(headers)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _preflight(origin, send)
                return
            scope[SCOPE_KEY] = self._check_key(scope["path"], headers)
            limit = _limit(scope["path"])
            _check_length(headers, limit)
        except LoadmasterError as error:
            await error_response(error, path=scope["path"])(scope, receive, send)
            return
        await self._app(scope, _Limited(receive, limit), _with_origin(send, origin))

    def _check_host(self, headers: "Headers") -> None:
        hosts = headers.all("host")
        if len(hosts) != 1:
            raise _forbidden(f"the request has {len(hosts)} Host headers, one is needed")
        name = _host_name(hosts[0])
        known = LOOPBACK_NAMES | self._rules.hosts
        if name is None or (self._rules.loopback and name not in known):
            raise _forbidden(
                "the Host header names another machine",
                hint="ask for `localhost` or `127.0.0.1`; `--allow-host NAME` adds a name",
            )

    def _check_origin(self, headers: "Headers") -> str | None:
        """The page's origin where one is allowed."""
        origins = headers.all("origin")
        if not origins:
            if headers.one("sec-fetch-site") in ("cross-site", "same-site"):
                raise _forbidden("a page of another site asked", hint="`--allow-origin URL`")
            return None
        origin = origins[0]
        same = len(origins) == 1 and _place(origin) == headers.one("host")
        if len(origins) > 1 or not (same or origin in self._rules.origins):
            raise _forbidden(
                "the Origin of the request is not allowed",
                hint="`--allow-origin URL` allows the pages of one origin",
            )
        return origin if origin in self._rules.origins else None

    def _check_key(self, path: str, headers: "Headers") -> str:
        """The scope in which prompts may share cells: one for each key."""
        given = [value for value in _credentials(headers) if value]
        digests = [_digest(value) for value in given]
        valid = ""
        for known in self._digests:  # every one, whatever matched: the time tells nothing
            for digest in digests:
                if hmac.compare_digest(known, digest):
                    valid = known.hex()[:16]
        if self._digests and not valid and path not in OPEN_PATHS:
            what = "the key is not known" if given else "a key is needed"
            raise AuthError(what, hint="send it as `Authorization: Bearer KEY`")
        return valid


class Headers:
    """The headers of a request, by lower-case name."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = raw

    def all(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        key = name.encode()
        return [value.decode("latin-1").strip() for found, value in self._raw if found == key]

    def one(self, name: str) -> str:
        """The first value, or nothing."""
        return next(iter(self.all(name)), "")


def _credentials(headers: Headers) -> list[str]:
    """Keys as OpenAI, Anthropic and Azure clients send them; one place for all of them."""
    bearer = [
        value[7:].strip()
        for value in headers.all("authorization")
        if value[:7].lower() == "bearer "
    ]
    return [*bearer, *headers.all("x-api-key"), *headers.all("api-key")]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _host_name(host: str) -> str | None:
    """The name in `name:port`; None when it is malformed.

    Not by `urlsplit`, which finds `::1` in `[::1]evil.example`.
    """
    found = _HOST.fullmatch(host)
    if found is None or int(found["port"] or 0) > _MOST_PORT:
        return None
    return (found["address"] or found["name"]).lower()


def _place(origin: str) -> str | None:
    """The `name:port` of an origin; None when it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _forbidden(message: str, *, hint: str | None = None) -> AuthError:
    error = AuthError(message, hint=hint)
    error.http_status, error.code = 403, "forbidden"
    return error


class _TooSlow(UsageError):
    """A body that does not go on."""

    http_status = 408
    code = "request_timeout"


class _TooLarge(UsageError):
    """More bytes than the limit."""

    http_status = 413
    code = "request_too_large"


def _limit(path: str) -> int:
    return FILE_LIMIT_BYTES if path == FILES_PATH else BODY_LIMIT_BYTES


def _check_length(headers: Headers, limit: int) -> None:
    stated = headers.one("content-length")
    if stated.isdecimal() and (len(stated) > _MOST_DIGITS or int(stated) > limit):
        raise _too_large(limit)


def _too_large(limit: int) -> _TooLarge:
    return _TooLarge(f"the body is larger than {limit >> 20} MiB", numbers={"limit_bytes": limit})


class _Limited:
    """A `receive` that counts and does not wait for ever: a body may come without its length."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._count = 0
        self._waited_s = 0.0
        self._complete = False

    async def __call__(self) -> Message:
        message = await (self._receive() if self._complete else self._next())
        self._complete = not message.get("more_body", False)
        self._count += len(message.get("body", b""))
        if self._count > self._limit:
            raise _too_large(self._limit)
        return message

    async def _next(self) -> Message:
        """The next bytes; what the server itself does between two of them does not count."""
        loop = asyncio.get_running_loop()
        left_s = BODY_SLACK_S + self._count / BODY_PACE_BYTES - self._waited_s
        began = loop.time()
        try:
            async with asyncio.timeout(min(BODY_WAIT_S, left_s)):
                return await self._receive()
        except TimeoutError:
            if left_s <= BODY_WAIT_S:
                text = f"{self._count} bytes of the body came in {BODY_SLACK_S:g} s and more"
                raise _TooSlow(text) from None
            raise _TooSlow(f"no byte of the body came for {BODY_WAIT_S:g} s") from None
        finally:
            self._waited_s += loop.time() - began


def _with_origin(send: Send, origin: str | None) -> Send:
    """Answers to an allowed page carry its origin, never `*`."""
    if origin is None:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra: list[Any] = [
                (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")
            ]  # fmt: skip
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return sending


async def _preflight(origin: str, send: Send) -> None:
    headers = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", _CORS_HEADERS),
        (b"vary", b"origin"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
