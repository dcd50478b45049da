"""HTTP for model files and the Hub's listings: the only module that knows the client library.

What it adds: a token that goes to its own host and nowhere else, redirects followed by hand, and an
end for every wait. A server that sends a byte a minute is cut off like one that sends none.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from loadmaster import __version__
from loadmaster.errors import AuthError, NetworkError, NotFoundError
from loadmaster.model.reference import is_loopback, shown_url
from loadmaster.units import KIB, MIB

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})
MAX_REDIRECTS = 5
MAX_JSON_BYTES = 16 * MIB
TRY_AGAIN = "run the command again"


class TransientError(NetworkError):
    """A failure that another attempt may not have; `retry_after_s` is the server's own wish."""

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, too_slow: bool = False
    ) -> None:
        super().__init__(message, hint=f"check the connection and {TRY_AGAIN}")
        self.retry_after_s = retry_after_s
        self.too_slow = too_slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A bearer token and the one origin that may see it."""

    origin: str
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is waited for what, and how often it is tried."""

    connect_s: float = 10.0
    answer_s: float = 30.0  # from the request to the end of the answer's header
    window_s: float = 30.0  # a body brings `window_bytes` in this time, or is given up
    window_bytes: int = 64 * KIB
    attempts: int = 4
    backoff_s: float = 0.5  # doubled each time
    longest_wait_s: float = 60.0  # a server that asks for more is not waited for


class Reply:
    """An answer whose body has not been read. Valid until its `Http.open` ends."""

    def __init__(self, response: "httpx2.Response", pace: "_Pace") -> None:
        self._response = response
        self._pace = pace
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.url = str(response.url)

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes in.

        Raises:
            TransientError: it ends early or comes too slowly.
        """
        import httpx2

        try:
            for chunk in self._response.iter_raw():
                self._pace.count(len(chunk))
                yield chunk
        except httpx2.HTTPError as error:
            raise self._broken(error) from None
        if self._pace.cut:
            raise self._broken(None)

    def _broken(self, error: Exception | None) -> TransientError:
        if self._pace.cut:
            message = f"{_host(self.url)} sends too slowly: the connection was given up"
            return TransientError(message, too_slow=True)
        return TransientError(f"the connection to {_host(self.url)} broke: {_reason(error)}")

    def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            NetworkError: it is longer than `limit`.
        """
        parts, size = [], 0
        for chunk in self.chunks():
            size += len(chunk)
            if size > limit:
                raise NetworkError(
                    f"{_host(self.url)} answers with more than the {limit} bytes asked for",
                    hint="a proxy may stand between: open the URL in a browser",
                )
            parts.append(chunk)
        return b"".join(parts)


class _Pace:
    """Watches one body; cuts its connection when a window brings too few bytes."""

    def __init__(self, response: "httpx2.Response", patience: Patience) -> None:
        self._patience = patience
        stream = response.extensions.get("network_stream")
        self._socket = stream.get_extra_info("socket") if stream is not None else None
        self._bytes = 0
        self._since = time.monotonic()
        self.cut = False

    def count(self, n_bytes: int) -> None:
        self._bytes += n_bytes

    def check(self, now: float) -> None:
        if now - self._since < self._patience.window_s:
            return
        if self._bytes < self._patience.window_bytes:
            self.give_up()
        self._bytes, self._since = 0, now

    def give_up(self) -> None:
        """Wake whoever reads: a shut-down socket ends its `recv`, a closed one does not."""
        import socket

        self.cut = True
        if self._socket is not None:
            with suppress(OSError, ValueError):
                # Not SSLSocket.shutdown, which takes the session away from under the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class Http:
    """A client. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        token: Token | None = None,
        *,
        patience: Patience | None = None,
    ) -> None:
        import httpx2

        self.patience = patience or Patience()
        self._token = token
        self._client = httpx2.Client(
            follow_redirects=False,
            timeout=httpx2.Timeout(self.patience.window_s, connect=self.patience.connect_s),
            headers={"User-Agent": f"loadmaster/{__version__}", "Accept-Encoding": "identity"},
        )
        self._paces: set[_Pace] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> "Http":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every open answer and the client."""
        self._closed.set()
        self.abort()
        self._client.close()

    def abort(self) -> None:
        """End every open answer; their readers get a TransientError."""
        with self._lock:
            for pace in self._paces:
                pace.give_up()

    @contextmanager
    def open(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Reply]:
        """One GET, redirects followed; any other status is the caller's to judge.

        Raises:
            TransientError: no answer.
            NetworkError: the redirects lead nowhere, or to an unencrypted host.
        """
        response = self._follow(url, dict(headers or {}))
        pace = _Pace(response, self.patience)
        with self._lock:
            self._paces.add(pace)
            self._start_watch()
        try:
            yield Reply(response, pace)
        finally:
            with self._lock:
                self._paces.discard(pace)
            response.close()

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = threading.Thread(target=self._check_paces, daemon=True)
            self._watch.start()

    def _check_paces(self) -> None:
        while not self._closed.wait(min(0.5, self.patience.window_s / 4)):
            now = time.monotonic()
            with self._lock:
                for pace in self._paces:
                    pace.check(now)

    def _follow(self, url: str, headers: dict[str, str]) -> "httpx2.Response":
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, headers)
            target = response.headers.get("location")
            if response.status_code not in _REDIRECTS or not target:
                return response
            response.close()
            url = _redirected(url, target)
        raise NetworkError(
            f"{shown_url(url)} redirects more than {MAX_REDIRECTS} times",
            hint="open the URL in a browser and copy the address it ends at",
        )

    def _send(self, url: str, headers: dict[str, str]) -> "httpx2.Response":
        import httpx2

        if self._token is not None and origin_of(url) == self._token.origin:
            headers = {**headers, "Authorization": f"Bearer {self._token.value}"}
        request = self._client.build_request("GET", url, headers=headers)
        try:
            return _within(self.patience.answer_s, lambda: self._client.send(request, stream=True))
        except httpx2.ConnectError as error:
            raise TransientError(f"{_host(url)} cannot be reached: {_reason(error)}") from None
        except (httpx2.TimeoutException, TimeoutError):
            raise TransientError(f"{_host(url)} does not answer") from None
        except httpx2.HTTPError as error:
            raise TransientError(f"{_host(url)} broke the connection: {_reason(error)}") from None

    def retrying(self, call: Callable[[], T]) -> T:
        """Run `call` until it raises no TransientError, a few times."""
        for attempt in range(self.patience.attempts - 1):
            try:
                return call()
            except TransientError as error:
                time.sleep(wait_before(error, attempt, self.patience))
        return call()

    def json(self, url: str) -> tuple[Any, Mapping[str, str]]:
        """A JSON document and the headers it came with, statuses judged and failures retried.

        Raises:
            NotFoundError, AuthError, NetworkError: as `check_status`.
        """

        def once() -> tuple[Any, Mapping[str, str]]:
            with self.open(url) as reply:
                check_status(reply)
                return json.loads(reply.body(MAX_JSON_BYTES)), dict(reply.headers)

        try:
            return self.retrying(once)
        except (ValueError, RecursionError):
            raise NetworkError(
                f"{_host(url)} answers with something that is not JSON",
                hint="a proxy or a login page may stand between: open the URL in a browser",
            ) from None


def wait_before(error: TransientError, attempt: int, patience: Patience) -> float:
    """Seconds before the next attempt.

    Raises:
        NetworkError: the server asks for a longer wait than makes sense here.
    """
    asked = error.retry_after_s
    if asked is None:
        return float(min(patience.backoff_s * 2**attempt, patience.longest_wait_s))
    if asked > patience.longest_wait_s:
        raise NetworkError(
            f"{error.message}; it asks to wait {asked:.0f} s", hint=f"{TRY_AGAIN} after that"
        )
    return asked


def check_status(reply: Reply, *, expected: tuple[int, ...] = (200,)) -> None:
    """Turn every status but the expected ones into an error.

    Raises:
        TransientError: 429, 500 and their like.
        AuthError: 401, 403. NotFoundError: 404, 410. NetworkError: any other.
    """
    place, status = shown_url(reply.url), reply.status
    if status in expected:
        return
    # The Hub answers 401 for what is not there too: this header of its says which it is.
    numbers = {"status": status, "reason": reply.headers.get("x-error-code")}
    if status in _TRANSIENT:
        raise TransientError(
            f"{_host(reply.url)} answers {status}", retry_after_s=_retry_after(reply.headers)
        )
    if status in (401, 403):
        raise AuthError(
            f"{place} refuses access ({status})",
            hint="check the URL and the token",
            numbers=numbers,
        )
    if status in (404, 410):
        raise NotFoundError(
            f"{place} is not there ({status})", hint="check the URL", numbers=numbers
        )
    raise NetworkError(f"{place} answers {status}", hint="check the URL", numbers=numbers)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("retry-after", "").strip()
    return float(text) if text.isdigit() else None


def origin_of(url: str) -> str:
    """Scheme, host and port, the port always written out."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


def _redirected(url: str, target: str) -> str:
    try:
        joined = urljoin(url, target)
        parts = urlsplit(joined)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts, joined = "", urlsplit(""), ""
    is_open = parts.scheme == "http" and is_loopback(host) and is_loopback(_host(url))
    if not host or (parts.scheme != "https" and not is_open):
        raise NetworkError(
            f"{shown_url(url)} redirects to what is not an `https://` URL",
            hint="open the URL in a browser and copy the address it ends at",
        )
    return joined


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the server"


def _reason(error: Exception | None) -> str:
    """A short reason; the library's messages can hold a whole header."""
    text = "".join(c for c in str(error or "") if c.isprintable())
    return text[:100] or type(error).__name__


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call that may wait for ever in a thread that can be left behind.

    The library's timeouts are per read: an answer's header that trickles in has none.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError
    return done[0]
