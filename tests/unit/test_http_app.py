"""The whole application in this process: routes, guards and errors, without a socket."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from loadmaster.interfaces.http.app import make_app, routes
from loadmaster.interfaces.http.guard import OPEN_PATHS, Rules
from loadmaster.tasks.planning import PlanOptions, PlanRefusedError
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.offers import Offers
from loadmaster.tasks.serving.opening import Prepared, Share
from loadmaster.tasks.serving.types import Offer, ServeOptions
from tests.cli_parts import refusal

KEY = "secret-key"
CALLS = [
    (method, route.path.replace("{id:path}", "demo"))
    for route in routes()
    if isinstance(route, Route)
    for method in sorted((route.methods or set()) - {"HEAD"})
]


class NoOpener:
    """Nothing fits here."""

    def prepare(self, offer: Offer, share: Share) -> Prepared:
        raise PlanRefusedError("no room", outcome=refusal(), hint=None)


@asynccontextmanager
async def nothing_open() -> AsyncIterator[Serving]:
    serving = Serving(
        Offers([Offer(id="demo", model="demo")]), ServeOptions(plan=PlanOptions()), NoOpener()
    )
    try:
        yield serving
    finally:
        await serving.close()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = make_app(nothing_open, Rules(keys=(KEY,), loopback=False))
    with TestClient(app, raise_server_exceptions=False) as one:
        yield one


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_no_route_answers_without_the_key(client: TestClient, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == (200 if path in OPEN_PATHS else 401)


BAD: list[Any] = [
    b"", b"[]", b"null", b"{", b"\xff", b'{"model": 1}', b'{"model": "demo", "messages": {}}',
    b'{"messages": [{"role": "user"}]}', b'{"prompt": [], "input": [], "content": 1, "tokens": 1}',
    b'{"messages": [], "max_tokens": "x"}', b'{"model": "\\u0000", "messages": [1], "prompt": 1}',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD)
@pytest.mark.parametrize(("method", "path"), [call for call in CALLS if call[0] == "POST"])
def test_bad_bodies_are_the_clients_error(
    client: TestClient, method: str, path: str, body: bytes
) -> None:
    answer = client.request(method, path, content=body, headers={"x-api-key": KEY})
    assert answer.status_code < 500
    if answer.status_code != 200:  # `unload` asks for no more than a name
        assert answer.json()["error"]


def test_what_is_not_there_is_404_and_a_wrong_method_405(client: TestClient) -> None:
    headers = {"x-api-key": KEY}
    assert client.get("/nowhere", headers=headers).status_code == 404
    answer = client.get("/v1/chat/completions", headers=headers)
    assert answer.status_code == 405
    assert answer.json()["error"]["message"].endswith("does not take GET")


def test_what_does_not_fit_is_the_clients_error_with_numbers(client: TestClient) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
    for stream in (False, True):
        asked = {**body, "stream": stream}
        answer = client.post("/v1/chat/completions", json=asked, headers={"x-api-key": KEY})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "insufficient_memory"
        assert error["numbers"]["shortfall_bytes.gpu:0"] > 0


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/chat/completions", {"message", "type", "param", "code", "numbers"}),
        ("/api/chat", None),
        ("/v1/messages", {"type", "message"}),
    ],
)
def test_errors_have_the_form_of_their_api(
    client: TestClient, path: str, form: set[str] | None
) -> None:
    error = client.post(path, content=b"[", headers={"x-api-key": KEY}).json()["error"]
    if form is None:
        assert isinstance(error, str)
    else:
        assert set(error) <= form


def test_the_document_has_every_route(client: TestClient) -> None:
    found = client.get("/openapi.json", headers={"x-api-key": KEY}).json()["paths"]
    listed = {(method.upper(), path) for path, methods in found.items() for method in methods}
    assert listed == {(m, p.replace("/v1/models/demo", "/v1/models/{id}")) for m, p in CALLS}
    assert all(one["summary"] for methods in found.values() for one in methods.values())


def test_the_small_routes_say_what_they_know(client: TestClient) -> None:
    headers = {"x-api-key": KEY}
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/props", headers=headers).json()["model_alias"] == "demo"
    assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "demo"
    assert client.get("/api/tags", headers=headers).json()["models"][0]["name"] == "demo"
    assert client.get("/loadmaster/v1/models", headers=headers).json()["models"] == []
    assert client.get("/loadmaster/v1/memory", headers=headers).json()["models"] == []
    assert client.get("/loadmaster/v1/plan", headers=headers).json()["plans"] == {}
    assert "loadmaster_model_up" in client.get("/metrics", headers=headers).text


def test_a_browser_gets_one_screen_and_a_program_a_line(client: TestClient) -> None:
    said = client.get("/", headers={"x-api-key": KEY})
    assert said.headers["content-type"].startswith("text/plain")
    assert said.text.endswith("is running\n")
    page = client.get(
        "/", headers={"x-api-key": KEY, "accept": "text/html,*/*", "host": "127.0.0.1:9"}
    )
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://127.0.0.1:9/v1</code>" in page.text
    assert "<code>demo</code>: unloaded" in page.text
    assert "<script" not in page.text
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert f'href="{path}"' in page.text
        assert client.get(path, headers={"x-api-key": KEY}).status_code == 200
