"""A model that is elsewhere, planned from its header: the rest of the file is a hole.

The header is read as ranges by the parser of local files, written to the cache as a sparse file of
the full size, and read from there like any model. Such a file has no weights: `is_skeleton` tells.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loadmaster.model import lookalikes
from loadmaster.model.gguf import parse_header
from loadmaster.model.http import Http
from loadmaster.model.ranges import HEADER_LIMIT_BYTES, RemoteFile
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.settings import cache_folder
from loadmaster.units import Bytes

_SPLIT_NAME = re.compile(r"(?P<stem>.+-)(?P<number>\d{5})(?P<tail>-of-(?P<count>\d{5})\.gguf)")
MAX_SHARDS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteShard:
    """One file to read: where it is, and its name, free of folders."""

    url: str
    name: str


def skeleton_folder() -> Path:
    """Where headers of remote models are kept, in files of the full size without weights."""
    return cache_folder() / "headers"


def is_skeleton(path: Path) -> bool:
    """Whether a file has a header and no weights."""
    return path.resolve().is_relative_to(skeleton_folder().resolve())


def url_shards(url: str, name: str) -> tuple[RemoteShard, ...]:
    """All shards of a model whose URL names one of them: they differ in the number alone."""
    match = _SPLIT_NAME.fullmatch(name)
    base, separator, query = url.partition("?")
    if match is None or not base.endswith(name) or not 1 < int(match["count"]) <= MAX_SHARDS:
        return (RemoteShard(url=url, name=name),)
    names = [
        f"{match['stem']}{number:05d}{match['tail']}"
        for number in range(1, int(match["count"]) + 1)
    ]
    folder = base[: -len(name)]
    return tuple(RemoteShard(url=f"{folder}{one}{separator}{query}", name=one) for one in names)


def read_remote(http: Http, shards: Sequence[RemoteShard]) -> ModelSpec:
    """Read the headers of a remote model; `header_bytes` is what came over the network.

    A header that is in the cache for the same version of the file is not read again.

    Raises:
        LoadmasterError: it is not there, refused, damaged, or its header is too large.
    """
    with _opened(http, shards[0], HEADER_LIMIT_BYTES) as first:
        folder = skeleton_folder() / _key(shards[0].url, first)
        if not _is_whole(folder, shards):
            return _spec(folder, shards, _write(http, shards, first, folder))
        return _spec(folder, shards, first.bytes_read)


def _spec(folder: Path, shards: Sequence[RemoteShard], n_bytes: int) -> ModelSpec:
    return replace(read_model(folder / shards[0].name), header_bytes=Bytes(n_bytes))


@contextmanager
def _opened(http: Http, shard: RemoteShard, limit_bytes: int) -> Iterator[RemoteFile]:
    file = RemoteFile(http, shard.url, shard.name, limit_bytes=limit_bytes)
    try:
        yield file
    finally:
        file.close()


def _key(url: str, file: RemoteFile) -> str:
    version = file.version
    if version.etag is None and version.last_modified is None:
        return f"unversioned-{os.getpid()}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    text = f"{url}\n{version.size_bytes}\n{version.etag}\n{version.last_modified}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_whole(folder: Path, shards: Sequence[RemoteShard]) -> bool:
    return not folder.name.startswith("unversioned-") and all(
        (folder / shard.name).is_file() for shard in shards
    )


def _write(http: Http, shards: Sequence[RemoteShard], first: RemoteFile, folder: Path) -> int:
    """Write the skeletons of all shards under `folder` at once; gives the bytes that were read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        _write_skeleton(work / shards[0].name, first)
        n_bytes = first.bytes_read
        for shard in shards[1:]:
            with _opened(http, shard, HEADER_LIMIT_BYTES - n_bytes) as file:
                _write_skeleton(work / shard.name, file)
                n_bytes += file.bytes_read
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return n_bytes


def _write_skeleton(path: Path, file: RemoteFile) -> None:
    start = file.read_at(0, lookalikes.LOOK_BYTES)
    if not start.startswith(lookalikes.MAGIC):
        raise lookalikes.not_gguf(start, file.size_bytes, file.label)
    header = parse_header(file.read_at, file.size_bytes, file.label)
    with path.open("wb") as target:
        target.write(file.read_at(0, header.data_offset))
        target.truncate(file.size_bytes)
