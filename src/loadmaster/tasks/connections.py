"""Ranges of one file over several connections, into its part.

Threads fetch runs of missing chunks, each range under `If-Range`; the caller's thread keeps the map
of chunks and ends the whole when one of them cannot go on.
"""

import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from loadmaster.errors import NetworkError
from loadmaster.model.http import TRY_AGAIN, Http, Reply, TransientError, check_status, wait_before
from loadmaster.model.ranges import Span, check_plain, check_span, version_of
from loadmaster.tasks.partfile import PartFile, Run
from loadmaster.tasks.progress import TransferProgress
from loadmaster.units import MIB, align

_LEAVE_BEHIND_S = 1.0  # a thread that waits for an answer's header ends by itself, later


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRules:
    """Sizes of a transfer. What a crash costs is a chunk for each connection, and `sync_bytes`."""

    connections: int = 4
    chunk_bytes: int = 1 * MIB
    segment_bytes: int = 64 * MIB  # of one request
    sync_bytes: int = 8 * MIB
    sync_s: float = 1.0
    max_failures: int = 6  # of one segment, without a byte between them
    max_answers: int = 200  # for one segment


class ChangedError(NetworkError):
    """The file on the server is another one than at the start."""


class NoRangesError(NetworkError):
    """The server answers a range with the whole file."""


class Counter:
    """Bytes that came over the network, from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, n_bytes: int) -> None:
        """Count more."""
        with self._lock:
            self.value += n_bytes


class _Reach:
    """How far one thread has come in its segment."""

    def __init__(self, segment: Run) -> None:
        self.at = segment.start
        self.end = segment.end
        self.reported = segment.start  # a chunk's boundary


class Connections:
    """Fetches everything that is missing from a part."""

    def __init__(
        self,
        http: Http,
        url: str,
        label: str,
        part: PartFile,
        progress: TransferProgress,
        rules: TransferRules,
        fetched: Counter,
    ) -> None:
        self._http = http
        self._url = url
        self._label = label
        self._part = part
        self._progress = progress
        self._rules = rules
        self._fetched = fetched
        self._segments: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._change = threading.Condition()
        self._failure: BaseException | None = None
        self._written: list[Run] = []

    def run(self) -> None:
        """Fetch. However this ends, the map says what is here.

        Raises:
            ChangedError, NoRangesError: the server is not the one of the first request.
            NetworkError: a connection cannot go on.
            OSError: the disk refuses.
        """
        segments = _segments(tuple(self._part.missing()), self._rules)
        for segment in segments:
            self._segments.put(segment)
        threads = [
            threading.Thread(target=self._work, daemon=True)
            for _ in range(min(self._rules.connections, len(segments)))
        ]
        for thread in threads:
            thread.start()
        try:
            self._keep_map(threads)
        finally:
            self._end(threads)
        if self._failure is not None:
            raise self._failure

    def _keep_map(self, threads: Sequence[threading.Thread]) -> None:
        here, before = self._part.done_bytes, self._fetched.value
        unsynced, synced_at = 0, time.monotonic()
        while self._failure is None and any(thread.is_alive() for thread in threads):
            with self._change:
                self._change.wait(0.05)
            unsynced += self._mark_written()
            done = min(here + self._fetched.value - before, self._part.size_bytes)
            self._progress.fetching(self._label, done, self._part.size_bytes)
            late = time.monotonic() - synced_at >= self._rules.sync_s
            if unsynced and (late or unsynced >= self._rules.sync_bytes):
                self._part.sync()
                unsynced, synced_at = 0, time.monotonic()

    def _mark_written(self) -> int:
        with self._change:
            written, self._written = self._written, []
        for run in written:
            self._part.mark(run.start, run.end)
        return sum(run.n_bytes for run in written)

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        self._stop.set()
        if any(thread.is_alive() for thread in threads):
            self._http.abort()
        deadline = time.monotonic() + _LEAVE_BEHIND_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._mark_written()
        with suppress(OSError):  # a full disk: the last map stands
            self._part.sync()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    segment = self._segments.get_nowait()
                except queue.Empty:
                    return
                self._fetch(_Reach(segment))
        except BaseException as error:
            with self._change:
                self._failure = self._failure or error
                self._change.notify()

    def _fetch(self, reach: _Reach) -> None:
        """Fetch a segment, over as many answers as it takes."""
        failures = answers = 0
        while reach.at < reach.end and not self._stop.is_set():
            before, answers = reach.at, answers + 1
            try:
                self._read(reach)
            except TransientError as error:
                advanced = reach.at > before and not error.too_slow
                failures = 0 if advanced else failures + 1
                if failures >= self._rules.max_failures or answers >= self._rules.max_answers:
                    raise NetworkError(
                        f"{error.message}, {failures or answers} times in a row",
                        hint=f"{TRY_AGAIN}: it goes on where it stopped",
                    ) from None
                self._stop.wait(wait_before(error, max(failures - 1, 0), self._http.patience))

    def _read(self, reach: _Reach) -> None:
        """One answer, as far as it goes."""
        version = self._part.identity.version
        headers = {"Range": f"bytes={reach.at}-{reach.end - 1}"}
        if version.validator:
            headers["If-Range"] = version.validator
        with self._http.open(self._url, headers) as reply:
            self._check(reply, reach)
            for chunk in reply.chunks():
                if reach.at + len(chunk) > reach.end:
                    raise NetworkError(
                        f"the server sends more of `{self._label}` than the range it announced",
                        hint="use another address: the server or a proxy before it mixes up ranges",
                    )
                if self._stop.is_set():
                    return
                self._part.write(reach.at, chunk)
                reach.at += len(chunk)
                self._fetched.add(len(chunk))
                self._report(reach)
            if reach.at < reach.end:
                raise TransientError(f"the server cuts ranges of `{self._label}` short")

    def _check(self, reply: Reply, reach: _Reach) -> None:
        check_status(reply, expected=(200, 206))
        check_plain(reply, self._label)
        if version_of(reply).differs_from(self._part.identity.version):
            raise ChangedError(f"`{self._label}` changed on the server")
        if reply.status == 200:
            raise NoRangesError(f"the server has no ranges for `{self._label}`")
        size = self._part.size_bytes
        check_span(reply, Span(first=reach.at, last=reach.end - 1, total=size), self._label)

    def _report(self, reach: _Reach) -> None:
        chunk = self._rules.chunk_bytes
        if reach.at < reach.end and reach.at - reach.reported < chunk:
            return
        with self._change:
            self._written.append(Run(start=reach.reported, end=reach.at))
            self._change.notify()
        reach.reported = reach.at // chunk * chunk


def _segments(missing: Sequence[Run], rules: TransferRules) -> list[Run]:
    """Missing runs cut so that every connection has several, and none is longer than a request."""
    total = sum(run.n_bytes for run in missing)
    share = align(max(1, total // (4 * rules.connections)), rules.chunk_bytes)
    length = min(share, align(rules.segment_bytes, rules.chunk_bytes))
    return [
        Run(start=start, end=min(start + length, run.end))
        for run in missing
        for start in range(run.start, run.end, length)
    ]
