"""The Hub's API: commits, listings, refusals; and where the token goes."""

import socket
from pathlib import Path

import pytest

from benchmarks.hostile_server import COMMIT, HostileServer, hub_path, hub_routes
from loadmaster.errors import AuthError, LoadmasterError, NetworkError, NotFoundError, UsageError
from loadmaster.model.http import Http, Token, origin_of
from loadmaster.model.hub import Hub, endpoint, find_token
from loadmaster.model.reference import HubReference
from tests import remote_parts as parts

SECRET = "hf_sesame"
REFERENCE = HubReference(owner="toy", repo="Tiny-GGUF")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    parts.isolate(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> "HostileServer":
    files = {parts.NAME: b"GGUF"}
    routes = hub_routes(parts.REPO, files)
    server = HostileServer({hub_path(parts.REPO, parts.NAME): b"GGUF"}, routes=routes)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


def refusal(server: HostileServer, reference: HubReference) -> LoadmasterError:
    with server, Hub(parts.PATIENT) as hub, pytest.raises(LoadmasterError) as caught:
        hub.files(reference, hub.commit(reference))
    return caught.value


def test_a_commit_and_its_files(server: HostileServer) -> None:
    with server, Hub(parts.PATIENT) as hub:
        assert hub.commit(REFERENCE) == COMMIT
        (file,) = hub.files(REFERENCE, COMMIT)
    assert file.path == parts.NAME
    assert file.size_bytes == 4
    assert len(file.sha256 or "") == 64


def test_listings_go_on_over_pages(server: HostileServer) -> None:
    tree = f"/api/models/{parts.REPO}/tree/{COMMIT}"
    _, _, rows = server.routes[tree]
    server.routes[f"{tree}/2"] = (200, {}, rows)
    server.routes[tree] = (200, {"Link": f'<{server.url}{tree}/2>; rel="next"'}, rows)
    with server, Hub(parts.PATIENT) as hub:
        assert len(hub.files(REFERENCE, COMMIT)) == 2


def test_a_page_elsewhere_is_not_followed(server: HostileServer) -> None:
    tree = f"/api/models/{parts.REPO}/tree/{COMMIT}"
    server.routes[tree] = (200, {"Link": '<https://evil.example/x>; rel="next"'}, [])
    assert isinstance(refusal(server, REFERENCE), NetworkError)


def test_unknown_repository_names_the_nearest(server: HostileServer) -> None:
    error = refusal(server, HubReference(owner="toy", repo="Tiny-GUF"))
    assert isinstance(error, NotFoundError)
    assert "`hf:toy/Tiny-GGUF`" in (error.hint or "")


def test_unknown_revision_names_those_there_are(server: HostileServer) -> None:
    error = refusal(server, HubReference(owner="toy", repo="Tiny-GGUF", revision="v1.1"))
    assert isinstance(error, NotFoundError)
    assert "`v1.0`" in (error.hint or "")


def test_gated_without_and_with_a_token(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = (403, {"X-Error-Code": "GatedRepo"}, {"error": "gated"})
    server.routes[f"/api/models/{parts.REPO}/revision/main"] = gated
    error = refusal(server, REFERENCE)
    assert isinstance(error, AuthError)
    assert "hf auth login" in (error.hint or "")
    assert f"/{parts.REPO}" in (error.hint or "")


@pytest.mark.parametrize("document", [[], {"sha": "x"}, {"sha": 7}, "text", None])
def test_an_endpoint_that_is_no_hub(server: HostileServer, document: object) -> None:
    server.routes[f"/api/models/{parts.REPO}/revision/main"] = (200, {}, document)
    assert "HF_ENDPOINT" in (refusal(server, REFERENCE).hint or "")


def test_offline_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        Hub()


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with Hub(parts.PATIENT) as hub, pytest.raises(NetworkError) as caught:
            hub.commit(REFERENCE)
    assert "check the connection" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "text", ["http://hub.example", "ftp://x", "https://u@x.org", "x", "https://["]
)
def test_endpoints_are_encrypted(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", text)
    with pytest.raises(UsageError):
        endpoint()


def test_where_the_token_is_from(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert find_token() is None
    (home / "hf").mkdir()
    (home / "hf/token").write_text("from_login\n")
    assert find_token() == "from_login"
    (home / "other").write_text("from_path")
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "other"))
    assert find_token() == "from_path"
    monkeypatch.setenv("HF_TOKEN", "from_env")
    assert find_token() == "from_env"
    monkeypatch.setenv("HF_TOKEN", "two\r\nlines: x")
    assert find_token() is None


def test_the_token_goes_to_its_host_alone(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = hub_path(parts.REPO, parts.NAME)
    with HostileServer({path: b"GGUF"}) as other, server, Hub(parts.PATIENT) as hub:
        server.behaviour, server.other = "other_host", other
        with hub.http.open(hub.file_url(REFERENCE, COMMIT, parts.NAME)) as reply:
            assert reply.body(4) == b"GGUF"
    (first,) = server.traffic.requests
    (second,) = other.traffic.requests
    assert first.headers["Authorization"] == f"Bearer {SECRET}"
    assert "Authorization" not in second.headers


def test_the_token_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    token = Token(origin="http://127.0.0.1:1", value=SECRET)
    assert SECRET not in repr(token)
    with Http(token, patience=parts.PATIENT) as http, pytest.raises(NetworkError) as caught:
        http.json("http://127.0.0.1:1/x?sig=secret")
    assert SECRET not in f"{caught.value.message}{caught.value.hint}{caught.value.numbers}"
    assert "secret" not in caught.value.message


def test_origins_have_their_port() -> None:
    assert origin_of("https://Hub.example/x") == "https://hub.example:443"
    assert origin_of("http://a:80") != origin_of("https://a:80")
