"""A checkpoint of the Hub, planned from its headers: the shards' data are holes.

config.json, the index and the beginning of every shard are read and written to the cache, as files
of the full size, and read from there like any checkpoint. A commit never changes: once is enough.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from loadmaster.errors import DamagedFileError, NotFoundError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_config import CONFIG, MAX_CONFIG_BYTES
from loadmaster.model.hf_pooling import MAX_POOLING_BYTES, MODULES, POOLING
from loadmaster.model.hf_source import (
    INDEX,
    MAX_INDEX_BYTES,
    SINGLE,
    TEMPLATE,
    TOKENIZER_CONFIG,
    index_shards,
    read_checkpoint,
)
from loadmaster.model.http import Http
from loadmaster.model.ranges import HEADER_LIMIT_BYTES, RemoteFile
from loadmaster.model.remote import skeleton_folder
from loadmaster.model.safetensors import parse_header
from loadmaster.model.variants import RepoFile
from loadmaster.units import KIB, MIB, Bytes

# An entry of a header: name, type, shape and offsets of a tensor of a large model, rounded up.
_ENTRY_BYTES = 192
_FIRST_BYTES = 4 * KIB
_CONNECTIONS = 8
_MAX_TEMPLATE_BYTES = 4 * MIB
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_BESIDE = frozenset({
    CONFIG, INDEX, TEMPLATE, TOKENIZER_CONFIG, "generation_config.json", "tokenizer.json",
    "special_tokens_map.json", MODULES, POOLING,
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteCheckpoint:
    """Where a checkpoint's files are; `files` are those of its commit, by name."""

    name: str  # the repository's, without its owner
    commit: str
    urls: Mapping[str, str]


def has_checkpoint(files: Iterable[RepoFile]) -> bool:
    """Whether a listing has a config and safetensors at its top."""
    names = {file.path for file in files}
    return CONFIG in names and bool({INDEX, SINGLE} & names)


def checkpoint_files(files: Iterable[RepoFile]) -> tuple[RepoFile, ...]:
    """What of a listing a checkpoint is run from, its config first: weights in the usual names, and
    the small JSON files beside them. Copies in other formats stay where they are."""
    wanted = [file for file in files if _is_part(file.path)]
    return tuple(sorted(wanted, key=lambda file: (file.path != CONFIG, file.path)))


def _is_part(path: str) -> bool:
    return bool(_SHARD.fullmatch(path)) or path in _BESIDE


def read_remote_checkpoint(http: Http, remote: RemoteCheckpoint) -> CheckpointSpec:
    """Read a checkpoint's headers; `header_bytes` is what came over the network, if anything did.

    Raises:
        LoadmasterError: a file is not there, refused, damaged, or headers are too large.
    """
    key = hashlib.sha256(f"{remote.commit}\n{sorted(remote.urls)}".encode()).hexdigest()[:32]
    folder = skeleton_folder() / "checkpoints" / key / remote.name
    if folder.is_dir():
        return replace(read_checkpoint(folder), remote=True)
    n_bytes = _fetch(http, remote, folder)
    return replace(read_checkpoint(folder), remote=True, header_bytes=Bytes(n_bytes))


def _fetch(http: Http, remote: RemoteCheckpoint, folder: Path) -> int:
    """Write the skeleton of a checkpoint under `folder` at once; gives the bytes that were read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        n_bytes = _fetch_whole(http, remote, CONFIG, work, MAX_CONFIG_BYTES)
        counts: Mapping[str, int] = {SINGLE: 512}
        if INDEX in remote.urls:
            n_bytes += _fetch_whole(http, remote, INDEX, work, MAX_INDEX_BYTES)
            counts = index_shards((work / INDEX).read_bytes(), INDEX)
        for name in (TEMPLATE, TOKENIZER_CONFIG):
            if name in remote.urls and not (work / TEMPLATE).exists():
                n_bytes += _fetch_whole(http, remote, name, work, _MAX_TEMPLATE_BYTES)
        for name in (MODULES, POOLING):
            if name in remote.urls:
                n_bytes += _fetch_whole(http, remote, name, work, MAX_POOLING_BYTES)
        n_bytes += _fetch_shards(http, remote, counts, work)
        for name in remote.urls:
            if name.endswith(".py"):
                (work / name).touch()  # so that it is refused as a folder with code is
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return n_bytes


def _fetch_whole(http: Http, remote: RemoteCheckpoint, name: str, folder: Path, limit: int) -> int:
    file = RemoteFile(http, _url(remote, name), name, limit_bytes=limit)
    try:
        if file.size_bytes > limit:
            raise DamagedFileError(
                f"`{name}` has {file.size_bytes} bytes, allowed are {limit}",
                code="header_too_large",
            )
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(file.read_at(0, file.size_bytes))
        return file.bytes_read
    finally:
        file.close()


def _url(remote: RemoteCheckpoint, name: str) -> str:
    if name not in remote.urls:
        raise NotFoundError(
            f"`{remote.name}` has no `{name}`",
            hint="the repository is not complete: take another revision with `@revision`",
        )
    return remote.urls[name]


def _fetch_shards(
    http: Http, remote: RemoteCheckpoint, counts: Mapping[str, int], folder: Path
) -> int:
    """Headers of all shards, several at a time: a large model has hundreds of them."""
    names: Sequence[str] = list(counts)
    limit = HEADER_LIMIT_BYTES // len(names) + HEADER_LIMIT_BYTES // 8

    def fetch(name: str) -> int:
        first = max(_FIRST_BYTES, counts[name] * _ENTRY_BYTES)
        return _fetch_header(http, _url(remote, name), folder / name, first, limit)

    if len(names) == 1:
        return fetch(names[0])
    with ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool:
        return sum(pool.map(fetch, names))


def _fetch_header(http: Http, url: str, path: Path, first: int, limit: int) -> int:
    """One shard's header, in a file of the shard's size."""
    file = RemoteFile(http, url, path.name, limit_bytes=limit, first_bytes=first)
    try:
        header = parse_header(file.read_at, file.size_bytes, path.name)
        with path.open("wb") as target:
            target.write(file.read_at(0, header.header_bytes))
            target.truncate(file.size_bytes)
        return file.bytes_read
    finally:
        file.close()
