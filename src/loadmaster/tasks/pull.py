"""`pull`: a model of the Hub or of a URL onto this machine, where every other command finds it.

Files of the Hub go into the cache of its own client (`blobs`, `snapshots`, `refs`), so that other
programs find them too; files of plain URLs into the cache folder of loadmaster.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from loadmaster.errors import BusyError, LoadmasterError, NotFoundError, UsageError
from loadmaster.model.hf_config import CONFIG
from loadmaster.model.hf_remote import checkpoint_files, has_checkpoint
from loadmaster.model.http import Http, Patience
from loadmaster.model.hub import Hub, check_online
from loadmaster.model.reference import HubReference, UrlReference, parse_reference, shown_url
from loadmaster.model.remote import url_shards
from loadmaster.model.store import repo_folder, url_file
from loadmaster.model.variants import RepoFile, choose, variants_of
from loadmaster.tasks.connections import TransferRules
from loadmaster.tasks.partfile import check_room, quarantine, sync_folder, write_durably
from loadmaster.tasks.progress import TransferProgress
from loadmaster.tasks.transfer import Fetched, RemoteSource, Transfer, digest_of

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """What the user said about a download."""

    sha256: str | None = None
    safetensors: bool = False  # of a repository that has GGUF files too
    rules: TransferRules = field(default_factory=TransferRules)
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A model that is here now."""

    reference: str
    files: tuple[Fetched, ...]  # every shard, in order
    took_s: float

    @property
    def path(self) -> Path:
        """What to name in other commands: the first shard, or a checkpoint's folder."""
        first = self.files[0].path
        return first.parent if self.is_checkpoint else first

    @property
    def is_checkpoint(self) -> bool:
        return self.files[0].path.name == CONFIG

    @property
    def fetched_bytes(self) -> int:
        """What came over the network."""
        return sum(file.fetched_bytes for file in self.files)


def pull(name: str, options: PullOptions, progress: TransferProgress) -> Pulled:
    """Download a model, or find that it is here.

    Raises:
        UsageError: it is not a model that can be downloaded.
        NotFoundError, AuthError, NetworkError: the server does not give it.
        DiskFullError: there is no room. BusyError: another process downloads it.
    """
    start = time.monotonic()
    reference = parse_reference(name)
    options = replace(options, sha256=_checked_sha256(options.sha256))
    if isinstance(reference, HubReference):
        files = _pull_hub(reference, options, progress)
    elif isinstance(reference, UrlReference):
        files = _pull_url(reference, options, progress)
    else:
        raise UsageError(
            f"`{name}` is nothing to download",
            hint="give `hf:owner/repo:Q4_K_M` or an `https://` URL",
        )
    return Pulled(reference=str(reference), files=files, took_s=time.monotonic() - start)


def _checked_sha256(text: str | None) -> str | None:
    digest = text.lower().removeprefix("sha256:") if text is not None else None
    if digest is not None and not _SHA256.fullmatch(digest):
        raise UsageError(f"`{text}` is not a sha256", hint="it has 64 hexadecimal digits")
    return digest


def _one_digest(sha256: str | None, n_files: int) -> None:
    if sha256 is not None and n_files > 1:
        raise UsageError(
            f"the model has {n_files} files, and one digest is given", hint="leave `--sha256` out"
        )


def _pull_hub(
    reference: HubReference, options: PullOptions, progress: TransferProgress
) -> tuple[Fetched, ...]:
    with Hub(options.patience) as hub:
        commit = hub.commit(reference)
        files = _chosen(reference, hub.files(reference, commit), options)
        _one_digest(options.sha256, len(files))
        target = _HubTarget(hub, reference, commit, options, progress)
        try:
            return target.pull(files)
        except LoadmasterError as error:
            raise hub.refusal(reference, error) from None


def _chosen(
    reference: HubReference, listing: Sequence[RepoFile], options: PullOptions
) -> tuple[RepoFile, ...]:
    """The GGUF file that is meant; a checkpoint where it is asked for, or all there is."""
    named = reference.file is not None or reference.quantization is not None
    if options.safetensors and (named or not has_checkpoint(listing)):
        raise NotFoundError(
            f"`{reference}` has no config.json with safetensors beside it",
            hint="leave `--safetensors` out for a GGUF file",
        )
    only = not named and not variants_of(listing) and has_checkpoint(listing)
    if options.safetensors or only:
        return checkpoint_files(listing)
    return choose(reference, listing).files


class _HubTarget:
    """One commit of a repository in the Hub's cache."""

    def __init__(
        self,
        hub: Hub,
        reference: HubReference,
        commit: str,
        options: PullOptions,
        progress: TransferProgress,
    ) -> None:
        self._hub = hub
        self._reference = reference
        self._commit = commit
        self._options = options
        self._progress = progress
        self._folder = repo_folder(reference)
        self._blobs = self._folder / "blobs"

    def pull(self, files: tuple[RepoFile, ...]) -> tuple[Fetched, ...]:
        """Every file, then the reference that makes the commit known."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        check_room(self._blobs, sum(self._missing_bytes(file) for file in files))
        fetched = tuple(self._pull_one(file) for file in files)
        if not self._reference.is_commit:
            ref = self._folder / "refs" / self._reference.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_durably(ref, self._commit.encode())
        return fetched

    def _blob(self, file: RepoFile) -> Path:
        return self._blobs / (file.sha256 or f"{self._commit}-{file.path.replace('/', '--')}")

    def _missing_bytes(self, file: RepoFile) -> int:
        blob = self._blob(file)
        here = 0
        with suppress(OSError):
            here = blob.stat().st_size
        with suppress(OSError):
            here = here or blob.with_name(f"{blob.name}.part").stat().st_blocks * 512
        return max(0, file.size_bytes - here)

    def _pull_one(self, file: RepoFile) -> Fetched:
        blob, given = self._blob(file), self._options.sha256
        if given is not None and file.sha256 not in (None, given):
            raise UsageError(
                f"the Hub lists `{file.path}` with the sha256 {file.sha256}, not {given}",
                hint="compare the digest with the publisher's, or name another revision",
            )
        with locked(blob):
            fetched = self._found(blob, file) or self._fetch(blob, file)
        link = self._folder / "snapshots" / self._commit / file.path
        _link(link, blob)
        return replace(fetched, path=link)

    def _found(self, blob: Path, file: RepoFile) -> Fetched | None:
        """A blob that is there is read once more: the Hub's client checks sizes, not digests."""
        if file.sha256 is None or not blob.is_file():
            return None
        if digest_of(blob, file.path, self._progress) != file.sha256:
            quarantine(blob)
            self._progress.say(f"note: {file.path} is here and damaged, downloading it again")
            return None
        self._progress.say(f"{file.path} is here already")
        return Fetched(
            path=blob,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            verified=True,
            fetched_bytes=0,
            resumed_bytes=file.size_bytes,
            etag=None,
        )

    def _fetch(self, blob: Path, file: RepoFile) -> Fetched:
        source = RemoteSource(
            url=self._hub.file_url(self._reference, self._commit, file.path),
            label=file.path,
            identity=f"hf:{self._reference.repo_id}/{file.path}@{self._commit}",
            size_bytes=file.size_bytes,
            sha256=file.sha256 or self._options.sha256,
        )
        return Transfer(self._hub.http, source, blob, self._progress, self._options.rules).run()


def _link(link: Path, blob: Path) -> None:
    """A relative link, as the Hub's client makes them, replaced at once."""
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(blob, link.parent)
    with suppress(OSError):
        if os.readlink(link) == target:
            return
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync_folder(link.parent)


def _pull_url(
    reference: UrlReference, options: PullOptions, progress: TransferProgress
) -> tuple[Fetched, ...]:
    check_online()
    shards = url_shards(reference.url, reference.file_name)
    _one_digest(options.sha256, len(shards))
    folder = url_file(reference).parent
    folder.mkdir(parents=True, exist_ok=True)
    with Http(patience=options.patience) as http:
        return tuple(
            _pull_url_file(http, shard.url, folder / shard.name, options, progress)
            for shard in shards
        )


def _pull_url_file(
    http: Http, url: str, final: Path, options: PullOptions, progress: TransferProgress
) -> Fetched:
    source = RemoteSource(url=url, label=final.name, identity=shown_url(url), sha256=options.sha256)
    with locked(final):
        found = _recorded(final, options.sha256)
        if found is not None:
            progress.say(f"{final.name} is here already")
            return found

        def record(fetched: Fetched) -> None:
            write_durably(_record_of(final), _record(source, fetched))

        return Transfer(http, source, final, progress, options.rules, record).run()


def _record_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.json")


def _record(source: RemoteSource, fetched: Fetched) -> bytes:
    document = {
        "schema_version": 1,
        "url": source.identity,
        "size_bytes": fetched.size_bytes,
        "sha256": fetched.sha256,
        "verified": fetched.verified,
        "etag": fetched.etag,
    }
    return json.dumps(document, indent=1).encode()


def _recorded(final: Path, sha256: str | None) -> Fetched | None:
    """The file of an earlier run, unless another digest is asked for than it has."""
    try:
        document = json.loads(_record_of(final).read_bytes())
        size, digest, verified = (document[k] for k in ("size_bytes", "sha256", "verified"))
        if final.stat().st_size != size or (sha256 is not None and sha256 != digest):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Fetched(
        path=final,
        size_bytes=size,
        sha256=str(digest),
        verified=bool(verified) or sha256 is not None,
        fetched_bytes=0,
        resumed_bytes=size,
        etag=document.get("etag"),
    )


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """One download of a file at a time; the lock goes with the process, however it ends.

    Raises:
        BusyError: another process holds it.
    """
    path = final.with_name(f"{final.name}.lock")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 20, 0).decode("ascii", "replace").strip()
            raise BusyError(
                f"process {holder or 'unknown'} downloads `{final.name}` already",
                hint="wait for it, or stop it",
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)
