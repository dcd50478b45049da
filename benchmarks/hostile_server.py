"""A local HTTP server that misbehaves in one of many ways, for tests and benchmarks.

    with HostileServer({"/m.gguf": content}, behaviour="short_body") as server:
        fetch(server.url + "/m.gguf")

It also plays the Hub: `hub_routes` gives the listings of one repository. `BEHAVIOURS` says what
each behaviour does, and whether a client that does everything right ends with the file.
"""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PIECE = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a server does; `ends_well`: the file can be had, `resumes`: its ranges are honest."""

    what: str
    ends_well: bool = True
    resumes: bool = False


BEHAVIOURS: Mapping[str, Behaviour] = {
    "honest": Behaviour(what="ranges, ETag, length", resumes=True),
    "ranges_ignored": Behaviour(what="answers every range with 200 and the whole file"),
    "wrong_range": Behaviour(what="answers with another range than the one asked for",
                             ends_well=False),
    "etag_changes": Behaviour(what="the file is replaced once, in the middle of the download"),
    "short_body": Behaviour(what="ends every answer after half of the bytes it announced"),
    "extra_body": Behaviour(what="sends more bytes than the range has", ends_well=False),
    "flipped_byte": Behaviour(what="one byte of the file is wrong", ends_well=False),
    "redirect_loop": Behaviour(what="redirects to itself", ends_well=False),
    "other_host": Behaviour(what="redirects to another host", resumes=True),
    "slow_body": Behaviour(what="sends a byte now and then", ends_well=False),
    "slow_header": Behaviour(what="sends the answer's header a byte at a time", ends_well=False),
    "gzip": Behaviour(what="compresses unasked", ends_well=False),
    "status_416": Behaviour(what="answers 416 to every range but the first byte",
                            ends_well=False),
    "busy": Behaviour(what="answers 429 with Retry-After once to every second range", resumes=True),
    "fails_once": Behaviour(what="answers 500 once to every second range", resumes=True),
    "reset": Behaviour(what="resets every connection after half of an answer"),
    "no_length": Behaviour(what="200, no length, ends by closing"),
    "chunked": Behaviour(what="200 in chunks, no length"),
    "head_lies": Behaviour(what="HEAD tells another size", resumes=True),
    "size_changes": Behaviour(what="another total in every answer", ends_well=False),
    "login_page": Behaviour(what="200 with a web page", ends_well=False),
    "gated": Behaviour(what="403 without a token", ends_well=False),
    "weak_etag": Behaviour(what="a weak ETag", resumes=True),
    "silent": Behaviour(what="takes the request and never answers", ends_well=False),
}  # fmt: skip


class Content:
    """Bytes to serve: in memory, or a file that may be sparse and huge."""

    def __init__(self, source: bytes | Path) -> None:
        self._source = source
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size

    def pieces(self, first: int, last: int) -> Iterator[bytes]:
        """Bytes `first` to `last` in pieces."""
        if isinstance(self._source, bytes):
            for at in range(first, last + 1, _PIECE):
                yield self._source[at : min(at + _PIECE, last + 1)]
            return
        with self._source.open("rb") as file:
            file.seek(first)
            while first <= last:
                piece = file.read(min(_PIECE, last + 1 - first))
                first += len(piece)
                yield piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Traffic:
    """What went over the wire so far."""

    requests: list[Request] = field(default_factory=list)
    body_bytes: int = 0


class HostileServer:
    """Files and JSON routes under one behaviour, on a free port of the loopback."""

    def __init__(
        self,
        files: Mapping[str, bytes | Path],
        *,
        behaviour: str = "honest",
        routes: Mapping[str, tuple[int, Mapping[str, str], Any]] | None = None,
        token: str | None = None,
        other: "HostileServer | None" = None,
        replacement: bytes | None = None,
        on_body: Callable[[int], None] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        assert behaviour in BEHAVIOURS
        self.files = {path: Content(source) for path, source in files.items()}
        self.routes = dict(routes or {})
        self.behaviour = behaviour
        self.token = token
        self.other = other
        self.replacement = None if replacement is None else Content(replacement)
        self.on_body = on_body
        self.traffic = Traffic()
        self.lock = threading.Lock()
        self.asked: set[tuple[str, str]] = set()
        self.stopped = threading.Event()
        self._server = _Server((host, 0), _handler(self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def reset_traffic(self) -> None:
        """Count from zero."""
        with self.lock:
            self.traffic = Traffic()

    def count(self, n_bytes: int) -> None:
        with self.lock:
            self.traffic.body_bytes += n_bytes
            total = self.traffic.body_bytes
        if self.on_body is not None:
            self.on_body(total)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are the point of most tests."""


def hub_routes(
    repo: str, files: Mapping[str, bytes | Path], *, revision: str = "main"
) -> dict[str, tuple[int, Mapping[str, str], Any]]:
    """The API's answers for one repository; its files are at `hub_path`."""
    tree = [
        {
            "type": "file",
            "path": path,
            "size": Content(source).size,
            "oid": "0" * 40,
            "lfs": {"oid": sha256_of(source), "size": Content(source).size},
        }
        for path, source in files.items()
    ]
    base = f"/api/models/{repo}"
    missing = {"X-Error-Code": "RevisionNotFound"}
    return {
        f"{base}/revision/{revision}": (200, {}, {"id": repo, "sha": COMMIT}),
        f"{base}/revision/{COMMIT}": (200, {}, {"id": repo, "sha": COMMIT}),
        f"{base}/revision/*": (404, missing, {"error": "Invalid rev id"}),
        f"{base}/tree/{COMMIT}": (200, {}, tree),
        f"{base}/refs": (200, {}, {"branches": [{"name": revision}], "tags": [{"name": "v1.0"}]}),
        "/api/models": (200, {}, [{"id": repo}, {"id": "someone/else"}]),
        "/api/models/*": (401, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}),
    }


def hub_path(repo: str, path: str) -> str:
    """Where a repository's file is."""
    return f"/{repo}/resolve/{COMMIT}/{quote(path)}"


def sha256_of(source: bytes | Path) -> str:
    """The digest of a content; of a file larger than 1 GiB a stand-in, as nobody downloads it."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if source.stat().st_size > 1 << 30:
        return hashlib.sha256(str(source).encode()).hexdigest()
    return hashlib.sha256(source.read_bytes()).hexdigest()


def _handler(server: HostileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        hostile = server

    return Handler


class _Handler(BaseHTTPRequestHandler):
    hostile: HostileServer
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._count()
        content = self._content()
        if content is None:
            self._json(404, {}, {})
            return
        size = content.size // 2 if self.hostile.behaviour == "head_lies" else content.size
        self._head(200, {"Content-Length": str(size), "ETag": self._etag(content)})

    def do_GET(self) -> None:
        number = self._count()
        content = self._content()
        if content is None:
            self._route()
        elif self.hostile.token and not self._is_allowed():
            self._json(401, {"X-Error-Code": "GatedRepo"}, {"error": "gated"})
        else:
            act = getattr(self, f"_do_{self.hostile.behaviour}", None)
            if act is None:
                self._serve(content)
            else:
                act(content, number)

    def _count(self) -> int:
        with self.hostile.lock:
            request = Request(method=self.command, path=self.path, headers=dict(self.headers))
            self.hostile.traffic.requests.append(request)
            return len(self.hostile.traffic.requests)

    def _content(self) -> Content | None:
        return self.hostile.files.get(unquote(self.path.partition("?")[0]))

    def _is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hostile.token}"

    def _route(self) -> None:
        path = unquote(self.path.partition("?")[0])
        while path not in self.hostile.routes and path.strip("/*"):
            path = path.removesuffix("/*").rpartition("/")[0] + "/*"
        status, headers, document = self.hostile.routes.get(path, (404, {}, {"error": "not found"}))
        self._json(status, headers, document)

    def _json(self, status: int, headers: Mapping[str, str], document: object) -> None:
        body = json.dumps(document).encode()
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _etag(self, content: Content) -> str:
        return f'"etag-{content.size}-{id(content)}"'

    def _asked(self, content: Content) -> tuple[int, int] | None:
        """The range asked for, cut to the file; None without one, or when If-Range says so."""
        text = self.headers.get("Range", "")
        if not text.startswith("bytes=") or self.headers.get(
            "If-Range", self._etag(content)
        ) != self._etag(content):
            return None
        first, _, last = text.removeprefix("bytes=").partition("-")
        return int(first), min(int(last or content.size - 1), content.size - 1)

    def _serve(
        self,
        content: Content,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
        stop_after: int | None = None,
        flip_at: int | None = None,
    ) -> None:
        """An honest answer, but for what the arguments change."""
        span = self._asked(content) if status is None else None
        first, last = span or (0, content.size - 1)
        if first > last:
            self._head(416, {"Content-Range": f"bytes */{content.size}", "Content-Length": "0"})
            return
        shown = {
            "Content-Length": str(last - first + 1 if length is None else length),
            "ETag": self._etag(content),
            "Accept-Ranges": "bytes",
        }
        if span:
            shown["Content-Range"] = f"bytes {first}-{last}/{content.size}"
        self._head(206 if span else 200, {**shown, **(headers or {})})
        self._send(content, first, last, stop_after=stop_after, flip_at=flip_at)

    def _send(
        self,
        content: Content,
        first: int,
        last: int,
        *,
        stop_after: int | None = None,
        flip_at: int | None = None,
    ) -> None:
        at, end = first, last + 1 if stop_after is None else min(first + stop_after, last + 1)
        for piece in content.pieces(first, end - 1):
            if flip_at is not None and at <= flip_at < at + len(piece):
                mutable = bytearray(piece)
                mutable[flip_at - at] ^= 1
                piece = bytes(mutable)
            self.wfile.write(piece)
            at += len(piece)
            self.hostile.count(len(piece))

    # One method for each behaviour that is not plain serving.

    def _do_ranges_ignored(self, content: Content, _: int) -> None:
        self._serve(content, status=200)

    def _do_wrong_range(self, content: Content, _: int) -> None:
        first, last = self._asked(content) or (0, content.size - 1)
        shifted = (first + 1, last + 1) if last + 1 < content.size else (first - 1, last - 1)
        shifted = shifted if shifted[0] >= 0 else (1, last)
        self._head(
            206,
            {
                "Content-Length": str(shifted[1] - shifted[0] + 1),
                "ETag": self._etag(content),
                "Content-Range": f"bytes {shifted[0]}-{shifted[1]}/{content.size}",
            },
        )
        self._send(content, *shifted)

    def _do_etag_changes(self, content: Content, _: int) -> None:
        assert self.hostile.replacement is not None
        if self.hostile.traffic.body_bytes > content.size // 2:
            content = self.hostile.replacement
        self._serve(content)

    def _do_short_body(self, content: Content, _: int) -> None:
        first, last = self._asked(content) or (0, content.size - 1)
        self._serve(content, stop_after=(last - first + 2) // 2)
        self.close_connection = True

    def _do_extra_body(self, content: Content, _: int) -> None:
        first, last = self._asked(content) or (0, content.size - 1)
        self._serve(content, length=last - first + 1 + 4096)
        self.wfile.write(bytes(4096))

    def _do_flipped_byte(self, content: Content, _: int) -> None:
        self._serve(content, flip_at=content.size // 2)

    def _do_redirect_loop(self, _content: Content, _: int) -> None:
        self._head(302, {"Location": self.path, "Content-Length": "0"})

    def _do_other_host(self, _content: Content, _: int) -> None:
        assert self.hostile.other is not None
        self._head(302, {"Location": self.hostile.other.url + self.path, "Content-Length": "0"})

    def _do_slow_body(self, content: Content, _: int) -> None:
        first, last = self._asked(content) or (0, content.size - 1)
        self._serve(content, stop_after=0)
        for piece in content.pieces(first, last):
            for byte in piece:
                self.wfile.write(bytes([byte]))
                self.hostile.count(1)
                if self.hostile.stopped.wait(0.05):
                    return

    def _do_slow_header(self, _content: Content, _: int) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 100_000:
            self.wfile.write(bytes([byte]))
            if self.hostile.stopped.wait(0.05):
                return

    def _do_silent(self, _content: Content, _: int) -> None:
        self.hostile.stopped.wait()

    def _do_gzip(self, content: Content, _: int) -> None:
        self._serve(content, headers={"Content-Encoding": "gzip"})

    def _do_status_416(self, content: Content, _: int) -> None:
        asked = self._asked(content)
        if asked is not None and asked[0] == 0 and asked[1] < 64:
            self._serve(content)
        else:
            self._head(416, {"Content-Range": f"bytes */{content.size}", "Content-Length": "0"})

    def _refuses_now(self) -> bool:
        """True for the first request of every second range."""
        request = (self.path, self.headers.get("Range", ""))
        with self.hostile.lock:
            is_new = request not in self.hostile.asked
            self.hostile.asked.add(request)
            return is_new and len(self.hostile.asked) % 2 == 1

    def _do_busy(self, content: Content, _: int) -> None:
        if self._refuses_now():
            self._head(429, {"Retry-After": "0", "Content-Length": "0"})
        else:
            self._serve(content)

    def _do_fails_once(self, content: Content, _: int) -> None:
        if self._refuses_now():
            self._head(500, {"Content-Length": "0"})
        else:
            self._serve(content)

    def _do_reset(self, content: Content, _: int) -> None:
        first, last = self._asked(content) or (0, content.size - 1)
        self._serve(content, stop_after=(last - first + 2) // 2)
        # SO_LINGER with no time: closing sends RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _do_no_length(self, content: Content, _: int) -> None:
        self._head(200, {"ETag": self._etag(content), "Connection": "close"})
        self._send(content, 0, content.size - 1)
        self.close_connection = True

    def _do_chunked(self, content: Content, _: int) -> None:
        self._head(200, {"ETag": self._etag(content), "Transfer-Encoding": "chunked"})
        for piece in content.pieces(0, content.size - 1):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.hostile.count(len(piece))
        self.wfile.write(b"0\r\n\r\n")

    def _do_size_changes(self, content: Content, number: int) -> None:
        first, last = self._asked(content) or (0, content.size - 1)
        span = f"bytes {first}-{last}/{content.size + number}"
        self._serve(content, headers={"Content-Range": span, "ETag": f'"{number}"'})

    def _do_login_page(self, _content: Content, _: int) -> None:
        body = b"<!doctype html><title>Log in</title>"
        self._head(
            200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(body))}
        )
        self.wfile.write(body)

    def _do_gated(self, _content: Content, _: int) -> None:
        self._json(403, {"X-Error-Code": "GatedRepo"}, {"error": "gated"})

    def _do_weak_etag(self, content: Content, _: int) -> None:
        self._serve(content, headers={"ETag": 'W/"weak"'})
