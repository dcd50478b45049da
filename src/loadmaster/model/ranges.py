"""A remote file's beginning, read on demand: HTTP ranges that grow, never more than a limit.

`RemoteFile.read_at` has the shape that the header parser reads local files through. A server that
ignores ranges is read like a stream and left as soon as the header is there.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from loadmaster.errors import DamagedFileError, NetworkError
from loadmaster.model.http import TRY_AGAIN, Http, Reply, TransientError, check_status
from loadmaster.units import KIB, MIB, format_size

HEADER_LIMIT_BYTES = 16 * MIB  # of all shards of a model together
_FIRST_WINDOW = 64 * KIB
_LARGEST_WINDOW = 4 * MIB
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What tells one version of a remote file from the next; None: the server does not say."""

    size_bytes: int | None
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """A value for `If-Range`: a strong ETag; a weak one is not allowed there (RFC 9110)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else None

    def differs_from(self, other: "Version") -> bool:
        """Whether both say something about the same thing, and not the same."""
        if self.etag and other.etag:
            return self.etag != other.etag or _both_differ(self.size_bytes, other.size_bytes)
        return _both_differ(self.size_bytes, other.size_bytes) or _both_differ(
            self.last_modified, other.last_modified
        )


def _both_differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Bytes `first` to `last`, both included, of `total`."""

    first: int
    last: int
    total: int


def parse_content_range(text: str | None) -> Span | None:
    """`bytes 0-99/1000`; None for anything else, an unknown total included."""
    match = _CONTENT_RANGE.fullmatch((text or "").strip())
    if match is None:
        return None
    span = Span(first=int(match[1]), last=int(match[2]), total=int(match[3]))
    return span if span.first <= span.last < span.total else None


def version_of(reply: Reply) -> Version:
    """What an answer of 200 or 206 says about the file's version."""
    if reply.status == 206:
        span = parse_content_range(reply.headers.get("content-range"))
        size = span.total if span else None
    else:
        size = content_length(reply.headers)
    etag = reply.headers.get("etag") or None
    return Version(
        size_bytes=size, etag=etag, last_modified=reply.headers.get("last-modified") or None
    )


def content_length(headers: Mapping[str, str]) -> int | None:
    """The length of a whole body, where the server gives one."""
    text = headers.get("content-length", "")
    return int(text) if text.isdigit() and "transfer-encoding" not in headers else None


def check_plain(reply: Reply, label: str) -> None:
    """Refuse a body that is compressed or a web page: its bytes are not the file's.

    Raises:
        NetworkError: it is.
    """
    encoding = reply.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise NetworkError(
            f"the server sends `{label}` compressed ({encoding[:20]}), unasked",
            hint="its bytes are not the file's: use another address",
        )
    kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise NetworkError(
            f"the server sends a web page in place of `{label}`",
            hint="open the URL in a browser: it may want a login, or show the file's true address",
        )


class RemoteFile:
    """The beginning of a remote file, grown as it is asked for. Close it."""

    def __init__(
        self,
        http: Http,
        url: str,
        label: str,
        *,
        limit_bytes: int,
        first_bytes: int = _FIRST_WINDOW,
    ) -> None:
        """Reads the first window, `first_bytes` large.

        Raises:
            LoadmasterError: it cannot be read, or the server does not tell the file's size.
        """
        self._http = http
        self._url = url
        self._near = url  # where redirects ended: the next reads go there at once
        self._limit = limit_bytes
        self._first = min(first_bytes, limit_bytes)
        self._stack = ExitStack()
        self._stream: Iterator[bytes] | None = None
        self._prefix = bytearray()
        self.label = label
        self.version = Version(size_bytes=None, etag=None, last_modified=None)
        http.retrying(self._begin)
        assert self.version.size_bytes is not None
        self.size_bytes = self.version.size_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that came over the network."""
        return len(self._prefix)

    def close(self) -> None:
        """Leave a stream that is still open. Idempotent."""
        self._stack.close()

    def read_at(self, at: int, length: int) -> bytes:
        """Bytes of the file; fewer only at its end.

        Raises:
            DamagedFileError: they lie beyond the limit of a header.
        """
        end = min(at + length, self.size_bytes)
        while len(self._prefix) < end:
            self._check_limit(end)
            if self._stream is not None:
                self._read_stream(end)
            else:
                self._http.retrying(self._grow)
        return bytes(self._prefix[at:end])

    def _check_limit(self, end: int) -> None:
        if end > self._limit:
            raise DamagedFileError(
                f"the header of `{self.label}` is larger than {format_size(self._limit)}, the most "
                "that is read before a download",
                code="header_too_large",
                hint="download the file and plan it from the disk",
                numbers={"file": self.label, "limit_bytes": self._limit, "needs_bytes": end},
            )

    def _begin(self) -> None:
        stack = ExitStack()
        with stack:
            reply = stack.enter_context(self._http.open(self._url, _range(0, self._first)))
            check_status(reply, expected=(200, 206, 416))
            check_plain(reply, self.label)
            version = version_of(reply)
            if reply.status == 416 or version.size_bytes == 0:
                raise NetworkError(f"`{self.label}` is empty on the server", hint="check the URL")
            if version.size_bytes is None:
                raise NetworkError(
                    f"the server tells neither a range nor the length of `{self.label}`",
                    hint="download the file with `loadmaster pull` and plan it from the disk",
                )
            self.version, self._near = version, reply.url
            if reply.status == 200:
                self._stream = reply.chunks()
                self._stack = stack.pop_all()
                return
            self._prefix = bytearray(self._body(reply, 0, self._first, version.size_bytes))

    def _read_stream(self, end: int) -> None:
        assert self._stream is not None
        for chunk in self._stream:
            self._prefix += chunk
            if len(self._prefix) >= end:
                return
        raise TransientError(f"the server sends only {len(self._prefix)} bytes of `{self.label}`")

    def _grow(self) -> None:
        start = len(self._prefix)
        window = min(max(3 * start, _FIRST_WINDOW), _LARGEST_WINDOW, self._limit - start)
        window = min(window, self.size_bytes - start)
        url, self._near = (
            self._near,
            self._url,
        )  # a signed address expires: next time from the start
        headers = _range(start, window)
        if self.version.validator:
            headers["If-Range"] = self.version.validator
        with self._http.open(url, headers) as reply:
            if url != self._url and reply.status in (401, 403, 404, 410):
                raise TransientError("a redirect's target has expired")
            check_status(reply, expected=(200, 206))
            check_plain(reply, self.label)
            if reply.status == 200 or version_of(reply).differs_from(self.version):
                raise NetworkError(
                    f"`{self.label}` changed on the server while its header was read",
                    hint=TRY_AGAIN,
                )
            self._prefix += self._body(reply, start, window, self.size_bytes)
            self._near = reply.url

    def _body(self, reply: Reply, start: int, window: int, size: int) -> bytes:
        wanted = Span(first=start, last=min(start + window, size) - 1, total=size)
        check_span(reply, wanted, self.label)
        length = wanted.last - wanted.first + 1
        body = reply.body(length)
        if len(body) < length:
            raise TransientError(f"the server cuts a range of `{self.label}` short")
        return body


def check_span(reply: Reply, wanted: Span, label: str) -> None:
    """Refuse a range that is not the one asked for.

    Raises:
        NetworkError: it is another.
    """
    if parse_content_range(reply.headers.get("content-range")) != wanted:
        raise NetworkError(
            f"the server sends another range of `{label}` than the one asked for",
            hint="use another address: the server or a proxy before it mixes up ranges",
        )


def _range(start: int, length: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{start + length - 1}"}
