"""A remote model planned from its header is the local one, to the byte; and cannot be loaded."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gguf_writer as gw
from benchmarks.hostile_server import HostileServer, hub_path, hub_routes
from loadmaster.errors import AuthError, DamagedFileError, LoadmasterError, NotFoundError
from loadmaster.model import ranges, remote
from loadmaster.model.remote import RemoteShard, is_skeleton, url_shards
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.tasks.locating import check_has_weights, locate_header
from tests import remote_parts as parts


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    parts.isolate(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return parts.model_file(folder)


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    files = {hub_path(parts.REPO, local.name): local, f"/x/{local.name}": local}
    with HostileServer(files, routes=hub_routes(parts.REPO, {local.name: local})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def without_stamps(model: ModelSpec) -> ModelSpec:
    return replace(model, files=(), header_bytes=model.file_bytes)


def test_the_header_is_the_local_one(server: HostileServer, local: Path) -> None:
    for name in (f"hf:{parts.REPO}", f"{server.url}/x/{local.name}"):
        located = locate_header(name)
        assert without_stamps(located.gguf) == without_stamps(read_model(local))
        assert located.gguf.file_bytes == local.stat().st_size
        assert f"loadmaster pull {name}" in located.notes[0]


def test_what_is_on_the_disk_has_no_weights_and_is_not_loaded(server: HostileServer) -> None:
    path = locate_header(f"hf:{parts.REPO}").gguf.path
    assert is_skeleton(path)
    assert path.stat().st_blocks * 512 < path.stat().st_size
    with pytest.raises(NotFoundError, match="weights") as caught:
        check_has_weights(path)
    assert "loadmaster pull" in (caught.value.hint or "")


def test_the_second_time_the_header_is_here(server: HostileServer) -> None:
    first = locate_header(f"hf:{parts.REPO}").gguf
    n_bytes = server.traffic.body_bytes
    second = locate_header(f"hf:{parts.REPO}").gguf
    assert second.files == first.files
    assert server.traffic.body_bytes - n_bytes <= 1 << 16


def test_a_replaced_file_is_read_again(server: HostileServer, local: Path) -> None:
    name = f"{server.url}/x/{local.name}"
    before = locate_header(name).gguf
    bigger = parts.model_file(local.parent, "bigger.gguf", n_layer=2)
    server.files[f"/x/{local.name}"] = type(server.files[f"/x/{local.name}"])(bigger)
    assert locate_header(name).gguf.n_layer == 2 > before.n_layer


def test_a_split_model_by_its_url(tmp_path: Path, server: HostileServer) -> None:
    description = gw.tiny_llama(n_layer=3)
    folder = tmp_path / "split"
    folder.mkdir()
    shards = gw.write_split(folder, "m", *description, 3)
    content = next(iter(server.files.values()))
    server.files |= {f"/s/{shard.name}": type(content)(shard) for shard in shards}
    model = locate_header(f"{server.url}/s/{shards[0].name}?sig=1").gguf
    assert without_stamps(model) == without_stamps(read_model(shards[0]))
    assert [file.path.name for file in model.files] == [shard.name for shard in shards]


def test_urls_of_shards_differ_in_their_number() -> None:
    shards = url_shards("https://x/a/m-00002-of-00003.gguf?s", "m-00002-of-00003.gguf")
    assert shards[0] == RemoteShard(
        url="https://x/a/m-00001-of-00003.gguf?s", name="m-00001-of-00003.gguf"
    )
    assert len(shards) == 3
    assert len(url_shards("https://x/m-00001-of-99999.gguf", "m-00001-of-99999.gguf")) == 1


def test_a_header_over_the_limit(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEADER_LIMIT_BYTES", 4096)
    monkeypatch.setattr(ranges, "_FIRST_WINDOW", 1024)
    with pytest.raises(DamagedFileError) as caught:
        locate_header(f"hf:{parts.REPO}")
    assert caught.value.code == "header_too_large"
    assert f"`loadmaster pull hf:{parts.REPO}`" in (caught.value.hint or "")
    assert not list((remote.skeleton_folder()).glob("*"))


def test_a_gated_file_whose_listing_is_open(server: HostileServer) -> None:
    server.behaviour = "gated"
    with pytest.raises(AuthError, match="gated"):
        locate_header(f"hf:{parts.REPO}")


@pytest.mark.parametrize(
    ("behaviour", "exit_code"),
    [("login_page", 6), ("gzip", 6), ("silent", 6), ("redirect_loop", 6), ("no_length", 6)],
)
def test_servers_that_misbehave(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch, behaviour: str, exit_code: int
) -> None:
    server.behaviour = behaviour
    monkeypatch.setattr("loadmaster.model.http.Patience", lambda: parts.HASTY)
    with pytest.raises(LoadmasterError) as caught:
        locate_header(f"hf:{parts.REPO}")
    assert caught.value.exit_code == exit_code


def test_a_damaged_remote_file(server: HostileServer, local: Path, tmp_path: Path) -> None:
    content = type(next(iter(server.files.values())))
    for damage, code in ((b"<html>", "not_gguf"), (local.read_bytes()[:5000], "truncated")):
        server.files["/d/m.gguf"] = content(damage)
        with pytest.raises(DamagedFileError) as caught:
            locate_header(f"{server.url}/d/m.gguf")
        assert caught.value.code == code
