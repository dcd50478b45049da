"""Every route of the application under every style of Host, Origin and key, byte by byte.

A style that must be refused is refused by the guard alone: 401, 403, or h11's own 400 for what is
no HTTP. Any other answer was made behind the guard and is counted as `unguarded`. Styles that must
pass show that it is not the route that refuses.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from starlette.routing import Route

from benchmarks.serving.raw import Reply, exchange
from loadmaster.interfaces.http.app import routes
from loadmaster.interfaces.http.guard import OPEN_PATHS

OTHER_METHODS = ("OPTIONS", "HEAD", "TRACE", "PUT", "PATCH", "CONNECT", "get", "BREW")
NOT_HTTP = b"Invalid HTTP request received."


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a request is dressed; `{port}` stands for the server's own."""

    name: str
    lines: Sequence[bytes]  # headers, as they go over the wire
    target: str = "{path}"
    version: bytes = b"1.1"
    passes: bool = False
    open_too: bool = True  # whether it is refused on routes that need no key, too


@dataclass(slots=True)
class Walk:
    """What a walk found."""

    asked: int = 0
    unguarded: list[str] = field(default_factory=list)
    wrongly_refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # 5xx, or no answer at all


def table() -> list[tuple[str, str]]:
    """Method and path of everything that is answered, from the application's own routes."""
    return [
        (method, _concrete(route.path))
        for route in routes()
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def _concrete(path: str) -> str:
    parts = [("demo" if part.startswith("{") else part) for part in path.split("/")]
    return "/".join(parts)


def _bad(name: str, *lines: bytes, **changes: object) -> Style:
    return Style(name=name, lines=lines, **changes)  # type: ignore[arg-type]


_HERE = b"Host: localhost:{port}"
_EVIL = b"evil.example"


def host_styles() -> list[Style]:
    """For a server on loopback without a key."""
    values = [
        b"", b"evil.example", b"evil.example:{port}", b"127.0.0.1.evil.example", b"0.0.0.0:{port}",
        b"localhost.evil.example", b"localhost.", b"localhost.:{port}", b"evil.example#localhost",
        b"localhost@evil.example", b"evil.example@localhost", b"localhost:port", b"localhost:99999",
        b"http://localhost", b"localhost/", b"localhost, evil.example", b"localhost evil.example",
        b"127.1", b"2130706433", b"0x7f000001", b"127.0.0.2", b"::1", b"[::1", b"[::1]evil.example",
        b"[::ffff:127.0.0.1]", b"[::]", b"[fe80::1%25lo]", b"192.168.0.1", b"10.0.0.1:{port}",
        b"EVIL.EXAMPLE", b"\xe2\x93\x9b\xe2\x93\x9e.example", b"xn--lcalhost-yya",
    ]  # fmt: skip
    named = [
        _bad(f"host {value.decode('utf-8', 'replace')!r}", b"Host: " + value) for value in values
    ]
    return [
        *named,
        _bad("host missing"),
        _bad("host missing, HTTP/1.0", version=b"1.0"),
        _bad("host evil, HTTP/1.0", b"Host: " + _EVIL, version=b"1.0"),
        _bad("host twice, alike", _HERE, _HERE),
        _bad("host twice, evil last", _HERE, b"Host: " + _EVIL),
        _bad("host twice, evil first", b"Host: " + _EVIL, _HERE),
        _bad("host in capitals, evil", b"HOST: " + _EVIL),
        _bad("host folded", _HERE, b" " + _EVIL),
        _bad("host folded from nothing", b"Host:", b" " + _EVIL),
        _bad("space before the colon", b"Host : localhost:{port}"),
        _bad("tab after host", b"Host\t: localhost"),
        _bad("forwarded", b"Host: " + _EVIL, b"X-Forwarded-Host: localhost"),
        _bad("Forwarded", b"Host: " + _EVIL, b"Forwarded: host=localhost"),
        _bad("absolute target, evil host", b"Host: " + _EVIL, target="http://localhost{path}"),
        *_origin_styles(),
        *_passing_hosts(),
    ]


def _origin_styles() -> Iterator[Style]:
    origins = [
        b"null", b"", b"https://evil.example", b"http://evil.example:{port}", b"http://localhost:1",
        b"http://localhost.evil.example:{port}", b"http://127.0.0.1:{port}", b"http://[", b"file://",
        b"http://localhost:{port}@evil.example", b"http://localhost:{port}.evil.example",
        b"http://localhost:{port} http://evil.example", b"chrome-extension://abcdef", b"*",
    ]  # fmt: skip
    for value in origins:
        yield _bad(f"origin {value.decode()!r}", _HERE, b"Origin: " + value)
    yield _bad("origin twice", _HERE, b"Origin: http://localhost:{port}", b"Origin: null")
    yield _bad("another site, no origin", _HERE, b"Sec-Fetch-Site: cross-site")
    yield _bad("same site, no origin", _HERE, b"Sec-Fetch-Site: same-site")
    yield _bad(
        "preflight of evil", _HERE, b"Origin: https://evil.example",
        b"Access-Control-Request-Method: POST", b"Access-Control-Request-Private-Network: true",
    )  # fmt: skip


def _passing_hosts() -> Iterator[Style]:
    for value in (b"localhost:{port}", b"127.0.0.1", b"[::1]:{port}", b"LocalHost:1"):
        yield Style(name=f"host {value.decode()}", lines=(b"Host: " + value,), passes=True)
    own = (_HERE, b"Origin: http://localhost:{port}", b"Sec-Fetch-Site: same-origin")
    yield Style(name="its own page", lines=own, passes=True)


def key_styles(key: str) -> list[Style]:
    """For a server that needs a key."""
    secret = key.encode()
    basic = base64.b64encode(b"user:" + secret)
    given = {
        "no key": [], "empty": [b"Authorization: "], "bearer alone": [b"Authorization: Bearer"],
        "wrong": [b"Authorization: Bearer wrong"], "basic": [b"Authorization: Basic " + basic],
        "key as basic": [b"Authorization: Basic " + secret],
        "no scheme": [b"Authorization: " + secret], "cut": [b"x-api-key: " + secret[:-1]],
        "longer": [b"x-api-key: " + secret + b"x"], "other case": [b"x-api-key: " + secret.upper()],
        "empty x-api-key": [b"x-api-key:"], "wrong twice": [b"api-key: a", b"x-api-key: b"],
        "both in one": [b"x-api-key: a, " + secret], "in a cookie": [b"Cookie: api-key=" + secret],
        "other header": [b"x-key: " + secret, b"token: " + secret],
        "x_api_key": [b"x_api_key: " + secret],
        "not ASCII": [b"Authorization: Bearer \xff\xfe"], "long": [b"x-api-key: " + b"x" * 8000],
        "two keys in one": [b"Authorization: Bearer wrong Bearer " + secret],
        "forwarded key": [b"X-Forwarded-Authorization: Bearer " + secret],
        "of a proxy": [b"Proxy-Authorization: Bearer " + secret], "nul": [b"x-api-key: \x00"],
    }  # fmt: skip
    styles = [_bad(name, _HERE, *lines, open_too=False) for name, lines in given.items()]
    targets = {
        "key in the query": "{path}?api_key=" + key, "key as query": "{path}?key=" + key,
        "token in the query": "{path}?access_token=" + key,
        "user in the target": f"http://{key}@localhost" + "{path}",
        "double slash": "/{path}", "slashes": "//{path}", "trailing slash": "{path}/",
        "encoded slash": "%2F{path}", "dot": "/.{path}", "health and up": "/health/..{path}",
        "health, encoded up": "/health%2f..{path}", "health as query": "{path}?/health",
        "fragment": "{path}#/health", "semicolon": "{path};/health", "encoded NUL": "{path}%00",
        "backslash": "\\{path}", "absolute": "http://localhost{path}", "no slash": "x{path}",
    }  # fmt: skip
    styles += [_bad(name, _HERE, target=target, open_too=False) for name, target in targets.items()]
    styles += [
        _bad("no key, HTTP/1.0", version=b"1.0", open_too=False),
        _bad("no key, foreign host", b"Host: evil.example", open_too=False),
        _bad("no key, foreign page", _HERE, b"Origin: https://evil.example"),
    ]
    right = {
        "bearer": [b"Authorization: Bearer " + secret], "x-api-key": [b"X-API-Key: " + secret],
        "api-key": [b"api-key: " + secret], "lower case": [b"authorization: bearer " + secret],
    }  # fmt: skip
    passing = [Style(name=n, lines=(_HERE, *lines), passes=True) for n, lines in right.items()]
    return styles + passing


def walk(port: int, styles: Sequence[Style], *, every: int = 1) -> Walk:
    """Ask every route in every style; with `every` > 1 each style skips routes in turn."""
    found = Walk()
    places = table()
    for number, style in enumerate(styles):
        for index, (method, path) in enumerate(places):
            if (number + index) % every == 0 and not (style.passes and _is_costly(path)):
                _judge(found, style, method, path, _ask(port, style, method, path))
    for path in sorted({path for _, path in places}):
        for method in OTHER_METHODS:
            style = next(style for style in styles if not style.passes and style.open_too)
            _judge(found, style, method, path, _ask(port, style, method, path))
    return found


def _is_costly(path: str) -> bool:
    return path.endswith("/doctor")  # starts workers to ask them


def _ask(port: int, style: Style, method: str, path: str) -> Reply:
    target = style.target.format(path=path).encode("latin-1")
    first = method.encode() + b" " + target + b" HTTP/" + style.version
    number = str(port).encode()
    lines = [line.replace(b"{port}", number) for line in style.lines]
    body = b"" if method in ("GET", "HEAD") else b"{}"
    length = b"Content-Length: " + str(len(body)).encode()
    head = b"\r\n".join([first, *lines, length, b"Connection: close", b"", b""])
    return exchange(port, head + body, head_only=path.endswith("/events"))


def _judge(found: Walk, style: Style, method: str, path: str, reply: Reply) -> None:
    found.asked += 1
    what = f"{style.name}: {method} {path}: {reply.shown}"
    if reply.status is None or reply.status >= 500:
        found.failed.append(what)
    refused = reply.status in (401, 403) or (reply.status == 400 and NOT_HTTP in reply.body)
    if style.passes:
        if refused:
            found.wrongly_refused.append(what)
    elif not refused and not (path in OPEN_PATHS and not style.open_too):
        found.unguarded.append(what)
