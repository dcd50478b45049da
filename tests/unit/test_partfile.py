"""The map of chunks: what it claims is there, and it is believed only for the same file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.model.ranges import Version
from loadmaster.tasks.partfile import DiskFullError, Identity, PartFile, Run, check_room, discard

CHUNK = 8
VERSION = Version(size_bytes=100, etag='"1"', last_modified=None)
IDENTITY = Identity(url="u", version=VERSION, sha256=None, chunk_bytes=CHUNK)


def written(path: Path, *runs: tuple[int, int]) -> None:
    part = PartFile(path, IDENTITY)
    for start, end in runs:
        part.write(start, bytes(range(start, end)))
        part.mark(start, end)
    part.sync()
    part.close()


def missing(path: Path, identity: Identity = IDENTITY) -> list[tuple[int, int]]:
    part = PartFile(path, identity)
    part.close()
    return [(run.start, run.end) for run in part.missing()]


def test_only_whole_chunks_count(tmp_path: Path) -> None:
    path = tmp_path / "m.part"
    written(path, (0, 20), (90, 100))
    assert missing(path) == [(16, 96)]


def test_the_last_chunk_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "m.part"
    written(path, (0, 100))
    assert missing(path) == []
    assert path.read_bytes() == bytes(range(100))


def test_what_was_not_synced_is_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "m.part"
    written(path, (0, 16))
    part = PartFile(path, IDENTITY)
    part.mark(16, 96)
    part.close()
    assert missing(path) == [(16, 100)]


@pytest.mark.parametrize(
    "identity",
    [
        replace(IDENTITY, url="v"),
        replace(IDENTITY, sha256="a" * 64),
        replace(IDENTITY, version=replace(VERSION, etag='"2"')),
        replace(IDENTITY, version=replace(VERSION, size_bytes=101)),
        replace(IDENTITY, chunk_bytes=4),
    ],
)
def test_another_file_begins_anew(tmp_path: Path, identity: Identity) -> None:
    path = tmp_path / "m.part"
    written(path, (0, 96))
    assert missing(path, identity) == [(0, identity.version.size_bytes)]


def test_without_any_mark_of_its_version_nothing_is_resumed(tmp_path: Path) -> None:
    identity = replace(IDENTITY, version=replace(VERSION, etag=None))
    path = tmp_path / "m.part"
    part = PartFile(path, identity)
    part.mark(0, 100)
    part.sync()
    part.close()
    assert missing(path, identity) == [(0, 100)]
    assert not replace(identity, sha256=None).is_certain
    assert replace(identity, sha256="a" * 64).is_certain


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"done": 7}', '{"done": "zz"}', "null"])
def test_a_damaged_map_begins_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.part"
    written(path, (0, 96))
    (tmp_path / "m.part.json").write_text(damage)
    assert missing(path) == [(0, 100)]


def test_a_map_without_its_part_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m.part"
    written(path, (0, 96))
    path.unlink()
    assert missing(path) == [(0, 100)]
    written(path, (0, 96))
    path.write_bytes(b"short")
    assert missing(path) == [(0, 100)]


def test_the_map_holds_no_more_than_it_needs(tmp_path: Path) -> None:
    written(tmp_path / "m.part", (0, 16))
    document = json.loads((tmp_path / "m.part.json").read_text())
    assert document["done"] == "0300"
    discard(tmp_path / "m.part")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_part_is_not_written(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "m.part", IDENTITY)
    part.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        part.write(0, b"x")


def test_room_is_checked_with_five_percent(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(DiskFullError) as caught:
        check_room(tmp_path, 1 << 60)
    assert caught.value.numbers["need_bytes"] == (1 << 60) + (1 << 60) // 20


def test_runs_know_their_length() -> None:
    assert Run(start=3, end=10).n_bytes == 7
