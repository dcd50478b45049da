"""Downloads from a server that misbehaves: the right file under its name, or an error in time."""

from pathlib import Path

import pytest

from benchmarks.hostile_server import BEHAVIOURS, HostileServer, hub_path, hub_routes, sha256_of
from loadmaster.errors import BusyError, LoadmasterError, NetworkError, UsageError
from loadmaster.model.reference import HubReference
from loadmaster.model.store import find_hub, hub_cache
from loadmaster.tasks import partfile
from loadmaster.tasks.partfile import DiskFullError
from loadmaster.tasks.pull import Pulled, locked, pull
from tests import remote_parts as parts

CONTENT = parts.content()
REPLACEMENT = parts.content(seed=2)
PATH = hub_path(parts.REPO, parts.NAME)
NAME = f"hf:{parts.REPO}"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    parts.isolate(monkeypatch, tmp_path)
    return tmp_path


def hostile(behaviour: str = "honest", **settings: object) -> HostileServer:
    return HostileServer(
        {PATH: CONTENT},
        behaviour=behaviour,
        routes=hub_routes(parts.REPO, {parts.NAME: CONTENT}),
        replacement=REPLACEMENT,
        **settings,  # type: ignore[arg-type]
    )


def pull_hub(server: HostileServer, watcher: parts.Watcher | None = None) -> Pulled:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        options = parts.options(behaviour=server.behaviour)
        return pull(NAME, options, watcher or parts.Watcher())


def named_files(home: Path) -> list[Path]:
    """Files under a name that something would load."""
    aside = (".part", ".json", ".lock", ".bad", ".tmp")
    return [p for p in home.rglob("*") if p.is_file() and not p.name.endswith(aside)
            and "refs" not in p.parts]  # fmt: skip


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_file_of_the_hub(behaviour: str, home: Path) -> None:
    ends_well = BEHAVIOURS[behaviour].ends_well and behaviour != "etag_changes"
    with hostile() as other, hostile(behaviour, other=other) as server:
        if ends_well:
            pulled = pull_hub(server)
            assert pulled.files[0].verified
            assert pulled.path.read_bytes() == CONTENT
            return
        with pytest.raises(LoadmasterError) as caught:
            pull_hub(server)
    assert caught.value.exit_code in (5, 6)
    assert caught.value.hint
    assert named_files(home) == []


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_file_of_a_url(behaviour: str, home: Path) -> None:
    expected = REPLACEMENT if behaviour == "etag_changes" else CONTENT
    options = parts.options(sha256_of(expected), behaviour)
    with hostile() as other, hostile(behaviour, other=other) as server:
        if BEHAVIOURS[behaviour].ends_well:
            pulled = pull(server.url + PATH, options, parts.Watcher())
            assert pulled.files[0].verified
            assert pulled.path.read_bytes() == expected
            return
        with pytest.raises(LoadmasterError) as caught:
            pull(server.url + PATH, options, parts.Watcher())
    assert caught.value.exit_code in (5, 6)
    assert named_files(home) == []


def test_the_token_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    with hostile() as other, hostile("other_host", other=other) as server:
        pull_hub(server)
        assert all("Authorization" in request.headers for request in server.traffic.requests)
        assert not any("Authorization" in request.headers for request in other.traffic.requests)


def test_the_cache_is_laid_out_as_the_hubs(home: Path) -> None:
    with hostile() as server:
        pulled = pull_hub(server)
    folder = hub_cache() / "models--toy--Tiny-GGUF"
    digest = sha256_of(CONTENT)
    assert pulled.path == folder / "snapshots" / (folder / "refs/main").read_text() / parts.NAME
    assert str(pulled.path.readlink()) == f"../../blobs/{digest}"
    assert find_hub(HubReference(owner="toy", repo="Tiny-GGUF")) == pulled.path
    assert sorted(p.name for p in (folder / "blobs").iterdir()) == [digest, f"{digest}.lock"]


def test_what_is_here_is_verified_and_not_fetched_again() -> None:
    with hostile() as server:
        blob = pull_hub(server).path.resolve()
        before = server.traffic.body_bytes
        assert pull_hub(server).fetched_bytes == 0
        assert server.traffic.body_bytes == before
        blob.write_bytes(CONTENT[:-1] + b"?")
        watcher = parts.Watcher()
        assert pull_hub(server, watcher).path.read_bytes() == CONTENT
        assert "damaged" in watcher.lines[0]


class Stop(parts.Watcher):
    """Ctrl-C when more than half is here."""

    def fetching(self, label: str, done_bytes: int, total_bytes: int | None) -> None:
        if done_bytes > len(CONTENT) // 2:
            raise KeyboardInterrupt


def test_an_interrupted_download_goes_on(home: Path) -> None:
    with hostile() as server:
        with pytest.raises(KeyboardInterrupt):
            pull_hub(server, Stop())
        assert named_files(home) == []
        file = pull_hub(server).files[0]
    assert file.resumed_bytes + file.fetched_bytes == len(CONTENT)
    assert file.resumed_bytes > len(CONTENT) // 4
    assert file.verified


def test_an_interrupted_download_of_a_replaced_file_begins_anew() -> None:
    with hostile() as server:
        with pytest.raises(KeyboardInterrupt):
            pull(server.url + PATH, parts.options(), Stop())
        server.files[PATH] = type(server.files[PATH])(REPLACEMENT)
        pulled = pull(server.url + PATH, parts.options(), parts.Watcher())
    assert pulled.path.read_bytes() == REPLACEMENT
    assert not pulled.files[0].verified
    assert pulled.files[0].resumed_bytes == 0


def test_a_full_disk_keeps_what_is_here(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    real = partfile.PartFile.write

    def write(self: partfile.PartFile, at: int, data: bytes) -> None:
        if self.done_bytes > len(CONTENT) // 2:
            raise OSError(28, "No space left on device")
        real(self, at, data)

    with hostile() as server:
        monkeypatch.setattr(partfile.PartFile, "write", write)
        with pytest.raises(DiskFullError) as caught:
            pull_hub(server)
        assert named_files(home) == []
        assert "goes on" in (caught.value.hint or "")
        monkeypatch.setattr(partfile.PartFile, "write", real)
        assert pull_hub(server).files[0].resumed_bytes > 0


def test_too_little_room_is_said_before_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with hostile() as server:
        with pytest.raises(DiskFullError, match="1000 B free"):
            pull_hub(server)
        assert server.traffic.body_bytes == 0


def test_a_wrong_digest_puts_the_file_aside(home: Path) -> None:
    with hostile("flipped_byte") as server:
        with pytest.raises(NetworkError, match="sha256"):
            pull_hub(server)
        assert [p.suffix for p in home.rglob("*.bad")] == [".bad"]
        server.behaviour = "honest"
        assert pull_hub(server).path.read_bytes() == CONTENT
    assert not list(home.rglob("*.bad"))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "m"),
        pytest.raises(BusyError, match="already"),
        locked(tmp_path / "m"),
    ):
        pass
    with locked(tmp_path / "m"):
        pass


def test_an_unverified_file_is_marked() -> None:
    with hostile() as server:
        first = pull(server.url + PATH, parts.options(), parts.Watcher())
        again = pull(server.url + PATH, parts.options(), parts.Watcher())
        known = pull(server.url + PATH, parts.options(sha256_of(CONTENT)), parts.Watcher())
        with pytest.raises(NetworkError):
            pull(server.url + PATH, parts.options("0" * 64), parts.Watcher())
    assert [p.files[0].verified for p in (first, again, known)] == [False, False, True]
    record = first.path.with_name(f"{first.path.name}.json").read_text()
    assert '"verified": false' in record


@pytest.mark.parametrize("name", ["m.gguf", "ollama:llama3", "hf:../x"])
def test_what_cannot_be_downloaded(name: str) -> None:
    with pytest.raises(UsageError):
        pull(name, parts.options(), parts.Watcher())
    with pytest.raises(UsageError, match="sha256"):
        pull(NAME, parts.options("12"), parts.Watcher())
