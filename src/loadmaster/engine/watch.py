"""The watcher of one worker: starts it, routes what it sends, and sees it die.

One thread spawns the worker, for its parent-death signal follows the spawning thread, and then
polls socket, log and process. What other threads touch too is behind one lock.
"""

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loadmaster.engine.cap import MemoryCgroup
from loadmaster.engine.exchange import Answer, Exchange, Sink, Stream
from loadmaster.engine.logtail import LogTail
from loadmaster.engine.postmortem import Death, explain, machine_oom_kills
from loadmaster.engine.remote_errors import remote_error
from loadmaster.engine.spawn import Spawned, spawn_worker
from loadmaster.engine.types import EngineBuild, GenerateRequest
from loadmaster.engine.wire import Channel, Frame, WireError
from loadmaster.errors import EngineError, EngineStalledError, LoadmasterError, UsageError
from loadmaster.machine.types import Confinement
from loadmaster.schema import to_json
from loadmaster.units import Bytes, format_size

SILENCE_S = 5.0  # without a heartbeat; they come every 0.5 s, whatever the engine computes
FROZEN_S = 30.0  # silence of a process that is not stopped: it swaps, or it hangs
WEDGED_S = 10.0  # a worker that has nothing to do so long beside an open request has lost it
_POLL_S = 0.25
_CLOSE_S = 2.0
_LOG_CHUNK_BYTES = 1 << 16


class Watcher:
    """Owns a worker process. `exchange.failure` says why it died, or was given up and killed."""

    def __init__(
        self, build: EngineBuild, *, min_batch: int | None, step_deadline_s: float
    ) -> None:
        self.log = LogTail()
        self.exchange = Exchange()
        self.model: tuple[tuple[Path, ...], str] = ((), "")
        self.on_tick: Callable[[], object] = lambda: None  # about every second
        self.step_deadline_s = step_deadline_s
        self._fatal: LoadmasterError | None = None
        self._group: MemoryCgroup | None = None
        self._cap_bytes: Bytes | None = None
        self._oom_kills_before = machine_oom_kills()
        self._beat_s = self._loop_s = time.monotonic()
        started: queue.SimpleQueue[Spawned | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(build, min_batch, started), daemon=True, name="engine-watch"
        )
        self._thread.start()
        spawned = started.get()
        if isinstance(spawned, Exception):
            raise EngineError(f"cannot start a worker: {spawned}") from spawned
        self._process, self._socket = spawned.process, spawned.connection

    @property
    def pid(self) -> int:
        return self._process.pid

    # -- from any thread

    def call(
        self,
        method: str,
        body: Mapping[str, object],
        payload: bytes = b"",
        *,
        doing: str,
        progress: Callable[[float], None] | None = None,
    ) -> Answer:
        """Ask the worker and wait. Raises the worker's error, or why it is no more."""
        call = self.exchange.begin_call(doing)
        self.send({"kind": "call", "id": call.call_id, "method": method, **body}, payload)
        while True:
            item = call.inbox.get()
            if isinstance(item, LoadmasterError):
                raise item
            if isinstance(item, Answer):
                return item
            if progress is not None:
                progress(item)

    def open(self, body: Mapping[str, object], timeout_s: float) -> Answer:
        """Open the backend: the first message of all."""
        call = self.exchange.begin_call("starting")
        self.send({"kind": "open", "id": call.call_id, **body})
        try:
            item = call.inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineStalledError(f"the engine did not start in {timeout_s:.0f} s") from None
        if isinstance(item, Answer):
            return item
        raise item if isinstance(item, LoadmasterError) else EngineError("no answer to `open`")

    def open_stream(self, request: GenerateRequest) -> Stream:
        """Submit a request; its events come on the stream, the last one terminal."""
        stream: Stream = queue.SimpleQueue()
        self.submit(request, lambda _, event: stream.put(event))
        return stream

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Submit a request; its events go to the sink, the last one terminal."""
        self.exchange.begin_request(request, sink)
        self.send({"kind": "submit", "request": to_json(request)}, quiet=True)

    def send(self, body: dict[str, Any], payload: bytes = b"", *, quiet: bool = False) -> None:
        """Send a frame. If the worker is gone: raise why, or leave it to the watcher if `quiet`."""
        try:
            self._channel.send(body, payload)
        except WireError as error:
            raise UsageError(str(error)) from None
        except OSError:
            if quiet:
                return
            self._thread.join(_CLOSE_S)
            self.exchange.check_alive()

    def cap_ram(self, limit_bytes: Bytes) -> None:
        """Cap the worker's memory by a cgroup, if one can be made; else the load sets a limit."""
        self._cap_bytes = limit_bytes
        if self._group is None:
            self._group = MemoryCgroup.create(self.pid, limit_bytes)
        else:
            self._group.set_limit(limit_bytes)

    @property
    def has_cgroup(self) -> bool:
        return self._group is not None

    def cap_confinements(self) -> tuple[Confinement, ...]:
        """How the memory cap is enforced, if there is one."""
        if self._cap_bytes is None:
            return ()
        how = "cgroup" if self._group else "RLIMIT_DATA"
        detail = f"{how}, {format_size(self._cap_bytes)}"
        return (Confinement(name="memory cap", active=True, detail=detail),)

    def give_up(self, error: LoadmasterError) -> None:
        """Have the worker killed; `error` is what everyone is told."""
        self._fatal = self._fatal or error

    def close(self) -> None:
        """End the worker: it leaves when its socket closes, or is killed."""
        self.exchange.close()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._kill()
            self._thread.join()

    # -- the watching thread

    def _run(
        self,
        build: EngineBuild,
        min_batch: int | None,
        started: "queue.SimpleQueue[Spawned | Exception]",
    ) -> None:
        try:
            spawned = spawn_worker(build, min_batch)
        except (OSError, subprocess.SubprocessError) as refusal:
            started.put(refusal)
            return
        self._channel = Channel(spawned.connection)
        started.put(spawned)
        try:
            error = self._watch(spawned)
        except Exception as bug:
            error = EngineError(f"watching the worker failed: {bug!r}")
        self._bury(spawned, error)

    def _watch(self, spawned: Spawned) -> LoadmasterError | None:
        """Until the worker has died; returns the error if it is not the death that tells."""
        poller = select.poll()
        poller.register(spawned.connection, select.POLLIN)
        poller.register(spawned.log_fd, select.POLLIN)
        process_fd = _pidfd(spawned.process.pid)
        if process_fd is not None:
            poller.register(process_fd, select.POLLIN)
        next_tick = 0.0
        try:
            while True:
                ready = {fd for fd, _ in poller.poll(_POLL_S * 1000)}
                if spawned.log_fd in ready and not self._drain_log(spawned.log_fd):
                    poller.unregister(spawned.log_fd)
                if spawned.connection.fileno() in ready and not self._receive():
                    return self._fatal
                if process_fd in ready:
                    return self._fatal
                if (stalled := self._stalled()) is not None:
                    return stalled
                if self._loop_s >= next_tick:
                    next_tick = self._loop_s + 1
                    self.on_tick()
        except WireError as error:
            return EngineError(f"the worker sent what is no message: {error}")
        finally:
            if process_fd is not None:
                os.close(process_fd)

    def _receive(self) -> bool:
        """Route what came; False when the worker has closed its end."""
        frames = self._channel.receive()
        for frame in frames or ():
            self._route(frame)
        return frames is not None

    def _drain_log(self, log_fd: int) -> bool:
        """Read what is there; False at the end of the pipe."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(log_fd, _LOG_CHUNK_BYTES):
                self.log.feed(chunk)
            return False
        return True

    def _route(self, frame: Frame) -> None:
        match frame.kind:
            case "beat":
                self._beat_s = time.monotonic()
                self._check_deadline(frame.body)
            case "fatal":
                self._fatal = remote_error(frame.body.get("error"))
            case _:
                self.exchange.route(frame)

    # -- silence and death

    def _check_deadline(self, beat: Mapping[str, Any]) -> None:
        age = beat.get("age_s")
        if not isinstance(age, int | float):
            return
        if beat.get("doing") == "idle":
            waited = min(age, self.exchange.oldest_request_s())
            if waited > WEDGED_S:
                self.give_up(
                    EngineStalledError(
                        f"the engine is idle, with a request open for {waited:.0f} s"
                    )
                )
        elif age > self.step_deadline_s:
            self.give_up(
                EngineStalledError(
                    f"the engine has been at {beat.get('doing')} for {age:.0f} s, "
                    f"its deadline is {self.step_deadline_s:.0f} s"
                )
            )

    def _stalled(self) -> LoadmasterError | None:
        if self._fatal is not None:
            return self._fatal
        now = time.monotonic()
        if now - self._loop_s > _POLL_S + 2:  # we were stopped ourselves: start over
            self._beat_s = now
        self._loop_s = now
        silence = now - self._beat_s
        if silence < SILENCE_S:
            return None
        stopped = _is_stopped(self.pid)
        if not stopped and silence < FROZEN_S:
            return None
        how = "is stopped" if stopped else "does not answer"
        return EngineStalledError(
            f"the engine {how}: no heartbeat for {silence:.1f} s while {self.exchange.doing()}",
            hint="it was killed; run it again",
            numbers={"silence_s": silence},
        )

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _bury(self, spawned: Spawned, error: LoadmasterError | None) -> None:
        """The worker is dead or about to be. Leave nothing running, and tell everyone."""
        doing = self.exchange.doing()
        if error is None:  # it died by itself, or is on its way out
            with contextlib.suppress(subprocess.TimeoutExpired):
                spawned.process.wait(_CLOSE_S / 2)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(spawned.process.pid, signal.SIGKILL)
        status = spawned.process.wait()
        self._receive_last(spawned.connection)
        self._drain_log(spawned.log_fd)
        self.log.finish()
        os.close(spawned.log_fd)
        failure = error or self._fatal or explain(self._death(status, doing), self.log)
        self.exchange.fail_all(failure)
        self._channel.close()
        if self._group is not None:
            self._group.remove()

    def _receive_last(self, connection: socket.socket) -> None:
        """What the worker managed to say before it died."""
        connection.settimeout(0.1)
        with contextlib.suppress(OSError, WireError):
            while self._receive():
                pass

    def _death(self, status: int, doing: str) -> Death:
        if self._group is not None:
            oom_kills = self._group.oom_kills()
        else:
            oom_kills = machine_oom_kills() - self._oom_kills_before
        files, stamp = self.model
        return Death(
            status=status,
            doing=doing,
            oom_kills=oom_kills,
            ram_cap_bytes=self._cap_bytes,
            files=files,
            stamp=stamp,
        )


def _pidfd(pid: int) -> int | None:
    """A descriptor that is readable when the process has died; the socket tells it as well."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _is_stopped(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in ("T", "t")
