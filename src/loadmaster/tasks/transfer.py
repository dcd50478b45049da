"""One remote file into one local file: resumed, verified, and only then under its name.

The first request asks for the first bytes: it tells the version, and whether the server has ranges.
With ranges `connections` fetches what is missing; without, the file is read once from the start.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loadmaster.errors import NetworkError
from loadmaster.model.http import TRY_AGAIN, Http, Reply, TransientError, check_status
from loadmaster.model.lookalikes import MAGIC
from loadmaster.model.ranges import Span, Version, check_plain, check_span, version_of
from loadmaster.tasks.connections import (
    ChangedError,
    Connections,
    Counter,
    NoRangesError,
    TransferRules,
)
from loadmaster.tasks.partfile import (
    DiskFullError,
    Identity,
    PartFile,
    bad_of,
    check_room,
    discard,
    promote,
    quarantine,
    total_missing,
)
from loadmaster.tasks.progress import TransferProgress
from loadmaster.units import MIB, format_size

_PROBE_BYTES = 4
_HASH_BYTES = 4 * MIB
_MAX_RESTARTS = 2
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSource:
    """What is to be fetched, and what is known about it before."""

    url: str
    label: str  # for messages
    identity: str  # names the source in the map of chunks; nothing secret
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A complete file."""

    path: Path
    size_bytes: int
    sha256: str
    verified: bool  # the digest was known before; else it is that of what came
    fetched_bytes: int  # over the network, in this run
    resumed_bytes: int  # here from an earlier run
    etag: str | None


class Transfer:
    """Fetches one source into one file. `before_promotion` runs when it is complete and verified,
    just before it gets its name."""

    def __init__(
        self,
        http: Http,
        source: RemoteSource,
        final: Path,
        progress: TransferProgress,
        rules: TransferRules,
        before_promotion: Callable[[Fetched], None] | None = None,
    ) -> None:
        self._http = http
        self._source = source
        self._final = final
        self._part = final.with_name(f"{final.name}.part")
        self._progress = progress
        self._rules = rules
        self._before = before_promotion
        self._fetched = Counter()
        self._resumed_bytes = 0

    def run(self) -> Fetched:
        """Fetch, verify, and give the file its name.

        Raises:
            NetworkError: the server does not give it, or gives something else.
            DiskFullError: there is no room.
        """
        bad_of(self._part).unlink(missing_ok=True)
        for _ in range(_MAX_RESTARTS + 1):
            try:
                return self._attempt()
            except ChangedError as error:
                discard(self._part)
                self._progress.say(f"note: {error.message}, starting again")
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise self._disk_full() from None
                raise
        raise NetworkError(f"`{self._source.label}` keeps changing on the server", hint=TRY_AGAIN)

    def _attempt(self) -> Fetched:
        version, has_ranges = self._http.retrying(self._probe)
        if not has_ranges:
            discard(self._part)
        if version.size_bytes is None:
            size = self._http.retrying(lambda: self._stream_unsized(version))
            return self._finish(self._identity(replace(version, size_bytes=size)))
        identity = self._identity(version)
        part = PartFile(self._part, identity)
        try:
            check_room(self._part.parent, total_missing(part.missing()))
            self._resumed_bytes = part.resumed_bytes
            self._fetch(part, has_ranges)
        finally:
            part.close()
        return self._finish(identity)

    def _identity(self, version: Version) -> Identity:
        return Identity(
            url=self._source.identity,
            version=version,
            sha256=self._source.sha256,
            chunk_bytes=self._rules.chunk_bytes,
        )

    def _probe(self) -> tuple[Version, bool]:
        """The file's version, and whether ranges work."""
        headers = {"Range": f"bytes=0-{_PROBE_BYTES - 1}"}
        with self._http.open(self._source.url, headers) as reply:
            check_status(reply, expected=(200, 206))
            check_plain(reply, self._source.label)
            version = version_of(reply)
            self._check_size(version, is_range=reply.status == 206)
            if reply.status == 206:
                total = version.size_bytes or 0
                wanted = Span(first=0, last=min(_PROBE_BYTES, total) - 1, total=total)
                check_span(reply, wanted, self._source.label)
            self._check_magic(next(reply.chunks(), b""))
            return version, reply.status == 206

    def _check_size(self, version: Version, *, is_range: bool) -> None:
        label, found, listed = self._source.label, version.size_bytes, self._source.size_bytes
        if found == 0:
            raise NetworkError(f"`{label}` is empty on the server", hint="check the URL")
        if found is None and is_range:
            raise NetworkError(
                f"the server sends a range of `{label}` and does not tell its size",
                hint="use another address",
            )
        if found is not None and listed is not None and found != listed:
            raise NetworkError(
                f"the server has {found} bytes of `{label}`, the listing says {listed}",
                hint=f"{TRY_AGAIN} later: a mirror may lag behind",
                numbers={"found_bytes": found, "listed_bytes": listed},
            )

    def _check_magic(self, start: bytes) -> None:
        if self._source.label.endswith(".gguf") and not MAGIC.startswith(start[: len(MAGIC)]):
            raise NetworkError(
                f"what the server sends for `{self._source.label}` is not a GGUF file",
                hint="open the URL in a browser: it may want a login, or show the true address",
            )

    def _fetch(self, part: PartFile, has_ranges: bool) -> None:
        if has_ranges:
            try:
                Connections(
                    self._http, self._source.url, self._source.label, part, self._progress,
                    self._rules, self._fetched,
                ).run()  # fmt: skip
                return
            except NoRangesError:  # for some requests it has them, for others it has not
                self._resumed_bytes = 0
        self._http.retrying(lambda: self._stream(part))

    def _stream(self, part: PartFile) -> None:
        """The whole file in one answer."""
        with self._http.open(self._source.url) as reply:
            self._check_whole(reply, part.identity.version)
            at = 0
            for chunk in reply.chunks():
                if at + len(chunk) > part.size_bytes:
                    raise NetworkError(
                        f"the server sends more of `{self._source.label}` than it announced",
                        hint=TRY_AGAIN,
                    )
                part.write(at, chunk)
                at += len(chunk)
                self._fetched.add(len(chunk))
                self._progress.fetching(self._source.label, at, part.size_bytes)
            if at < part.size_bytes:
                raise TransientError(
                    f"the server sends {at} of the {part.size_bytes} bytes of "
                    f"`{self._source.label}` and ends"
                )

    def _stream_unsized(self, version: Version) -> int:
        """A body without a length: complete by its digest, or by the mark at its end."""
        with self._http.open(self._source.url) as reply, self._part.open("wb") as file:
            self._check_whole(reply, version)
            if self._source.sha256 is None and "transfer-encoding" not in reply.headers:
                raise NetworkError(
                    f"the server does not tell the length of `{self._source.label}`: whether it is "
                    "complete cannot be known",
                    hint="give its digest with `--sha256`",
                )
            for chunk in reply.chunks():
                file.write(chunk)
                self._fetched.add(len(chunk))
                self._progress.fetching(self._source.label, file.tell(), None)
            return file.tell()

    def _check_whole(self, reply: Reply, version: Version) -> None:
        check_status(reply)
        check_plain(reply, self._source.label)
        if version_of(reply).differs_from(version):
            raise ChangedError(f"`{self._source.label}` changed on the server")

    def _finish(self, identity: Identity) -> Fetched:
        size = self._part.stat().st_size
        digest = digest_of(self._part, self._source.label, self._progress)
        expected = self._source.sha256
        if expected is not None and digest != expected:
            bad = quarantine(self._part)
            raise NetworkError(
                f"the sha256 of `{self._source.label}` is {digest}, not {expected}: it was damaged "
                "on its way, or it is another file",
                hint=f"{TRY_AGAIN} to download it anew; what came is kept as `{bad}` until then",
                numbers={"sha256": digest, "expected_sha256": expected},
            )
        fetched = Fetched(
            path=self._final,
            size_bytes=size,
            sha256=digest,
            verified=expected is not None,
            fetched_bytes=self._fetched.value,
            resumed_bytes=self._resumed_bytes,
            etag=identity.version.etag,
        )
        if self._before is not None:
            self._before(fetched)
        promote(self._part, self._final)
        return fetched

    def _disk_full(self) -> DiskFullError:
        kept = 0
        with suppress(OSError):
            kept = self._part.stat().st_blocks * 512
        return DiskFullError(
            f"the disk is full: {format_size(kept)} of `{self._source.label}` are here and kept",
            hint=f"free some room and {TRY_AGAIN}: it goes on from there",
            numbers={"kept_bytes": kept},
        )


def digest_of(path: Path, label: str, progress: TransferProgress) -> str:
    """The sha256 of a file, which is read from start to end."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
            done += len(piece)
            progress.verifying(label, done, size)
    return digest.hexdigest()
