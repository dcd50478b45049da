"""The guard: who may ask, before any route is looked at."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from loadmaster.interfaces.http.guard import BODY_LIMIT_BYTES, SCOPE_KEY, Guard, Rules

HOST = (b"host", b"127.0.0.1:8765")
Header = tuple[bytes, bytes]


class Reached:
    """The application behind the guard; reads its body like a route does."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def _ask(
    rules: Rules, headers: Sequence[Header], *, path: str, method: str, app: Reached
) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http", "method": method, "path": path, "headers": list(headers)
    }  # fmt: skip
    await Guard(app, rules)(scope, receive, send)
    return sent


def ask(
    rules: Rules,
    *headers: Header,
    path: str = "/v1/models",
    method: str = "GET",
    app: Reached | None = None,
) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of the answer."""
    sent = asyncio.run(_ask(rules, headers, path=path, method=method, app=app or Reached()))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize(
    "host",
    [b"localhost", b"localhost:8765", b"127.0.0.1", b"[::1]:8765", b"LOCALHOST:1"],
)
def test_loopback_names_pass(host: bytes) -> None:
    assert ask(Rules(), (b"host", host))[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [
        (), (b"",), (b"evil.example",), (b"evil.example:8765",), (b"127.0.0.1.evil.example",),
        (b"localhost", b"localhost"), (b"localhost", b"evil.example"), (b"user@localhost",),
        (b"localhost:port",), (b"localhost/",), (b"0.0.0.0:8765",), (b"localhost.",),
        (b"http://localhost",), (b"localhost@evil.example",), (b" ",), (b"127.0.0.1:99999",),
    ],
)  # fmt: skip
def test_other_hosts_are_refused(hosts: tuple[bytes, ...]) -> None:
    app = Reached()
    status, _ = ask(Rules(), *((b"host", host) for host in hosts), app=app)
    assert status == 403
    assert not app.scopes


def test_a_configured_host_passes() -> None:
    rules = Rules(hosts=frozenset({"box.lan"}))
    assert ask(rules, (b"host", b"box.lan:8765"))[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (b"http://127.0.0.1:8765", 200),
        (b"http://127.0.0.1:3000", 403),
        (b"https://evil.example", 403),
        (b"null", 403),
        (b"", 403),
    ],
)
def test_pages_of_other_origins_are_refused(origin: bytes, status: int) -> None:
    assert ask(Rules(), HOST, (b"origin", origin))[0] == status


def test_a_request_of_another_site_without_origin_is_refused() -> None:
    assert ask(Rules(), HOST, (b"sec-fetch-site", b"cross-site"))[0] == 403
    assert ask(Rules(), HOST, (b"sec-fetch-site", b"none"))[0] == 200


def test_an_allowed_origin_is_answered_by_name_and_never_by_a_star() -> None:
    rules = Rules(origins=frozenset({"http://localhost:3000"}))
    page = (b"origin", b"http://localhost:3000")
    status, headers = ask(rules, HOST, page)
    assert status == 200
    assert headers[b"access-control-allow-origin"] == b"http://localhost:3000"
    status, headers = ask(rules, HOST, page, method="OPTIONS")
    assert status == 204
    assert headers[b"access-control-allow-origin"] == b"http://localhost:3000"
    status, headers = ask(rules, HOST)
    assert b"access-control-allow-origin" not in headers


GOOD, WRONG = b"secret-one", b"secret-two"
STYLES: dict[str, tuple[Header, ...]] = {
    "none": (),
    "wrong": ((b"authorization", b"Bearer " + WRONG),),
    "bearer": ((b"authorization", b"Bearer " + GOOD),),
    "x-api-key": ((b"x-api-key", GOOD),),
    "api-key": ((b"api-key", GOOD),),
    "bare": ((b"authorization", GOOD),),
    "prefix": ((b"authorization", b"Bearer " + GOOD[:-1]),),
    "longer": ((b"authorization", b"Bearer " + GOOD + b"x"),),
}
PASS = {"bearer", "x-api-key", "api-key"}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/", "/nope"])
def test_every_path_needs_the_key_whatever_the_header(path: str, style: str) -> None:
    rules = Rules(keys=(GOOD.decode(),), loopback=False)
    status, _ = ask(rules, HOST, *STYLES[style], path=path)
    assert status == (200 if style in PASS else 401)


def test_health_needs_no_key() -> None:
    assert ask(Rules(keys=("k",), loopback=False), HOST, path="/health")[0] == 200


def test_each_key_has_a_scope_of_its_own() -> None:
    app = Reached()
    rules = Rules(keys=("one", "two"))
    for key in (b"one", b"two", b"one"):
        assert ask(rules, HOST, (b"x-api-key", key), app=app)[0] == 200
    first, second, third = (scope[SCOPE_KEY] for scope in app.scopes)
    assert first == third != second
    assert "one" not in first


def test_a_stated_length_over_the_limit_is_refused_unread() -> None:
    app = Reached()
    length = (b"content-length", str(BODY_LIMIT_BYTES + 1).encode())
    assert ask(Rules(), HOST, length, method="POST", app=app)[0] == 413
    assert not app.scopes
    assert ask(Rules(), HOST, length, method="POST", path="/v1/files", app=app)[0] == 200
