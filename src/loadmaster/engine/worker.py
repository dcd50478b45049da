"""The worker: `python -m loadmaster.engine.worker`, one process for one open model.

It confines itself, loads a backend and serves its parent over a socket. Three threads: the main
one makes every backend call but one; another reads the socket, and makes tokens of texts while the
main one steps; the third beats, so that the parent can tell a long step from a stopped process. It
ends when the socket closes, whatever it is doing.
"""

import argparse
import gc
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadmaster.engine.backends import open_backend
from loadmaster.engine.confine import cap_data, confine_worker
from loadmaster.engine.drafts import step_costs
from loadmaster.engine.driver import Driver
from loadmaster.engine.limits import limits_of
from loadmaster.engine.meter import process_memory
from loadmaster.engine.pulse import Pulse
from loadmaster.engine.remote_errors import error_json
from loadmaster.engine.step_timing import time_steps
from loadmaster.engine.timing import TimeSteps, question_from_json
from loadmaster.engine.types import (
    Backend,
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    LoadRequest,
    MemoryReport,
    PrefillEvent,
    TextEvent,
    VirtualDevice,
)
from loadmaster.engine.wire import Channel, Frame
from loadmaster.errors import EngineError, LoadmasterError, ModelChangedError
from loadmaster.machine.types import Confinement
from loadmaster.model.stamp import check_unchanged
from loadmaster.plan.types import AnySettings
from loadmaster.schema import from_json, to_json
from loadmaster.units import Bytes

_PROGRESS_S = 0.05
_FLUSH_S = 1.0  # without a request: a job has ended
_EVENT_KINDS = {TextEvent: "text", PrefillEvent: "prefill", DoneEvent: "done"}
FATAL_STATUS = 70
# Calls that need nothing of a step: a prompt becomes tokens while others are decoded. One after a
# step would miss the next one too, for the request itself comes only when its tokens are known.
_BESIDE_STEPS = frozenset({"tokenize", "tokenize_many"})
# Calls that compute as a step does: after an engine error in one the context cannot be trusted.
_STEPPING = frozenset({"embed"})


class Worker:
    """The child's side of an engine."""

    def __init__(self, channel: Channel, confinements: tuple[Confinement, ...]) -> None:
        self._channel = channel
        self._confinements = confinements
        self._inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._backend: Backend | None = None
        self._driver: Driver | None = None
        self._ram_cap_bytes: Bytes | None = None  # of which the states of requests get a part
        self._events: list[dict[str, Any]] = []  # of the step that runs
        self._pulse = Pulse(channel)
        self._calls = {
            "devices": self._devices,
            "size": self._size,
            "open_vocabulary": self._open_vocabulary,
            "load": self._load,
            "commit_peak": self._commit_peak,
            "memory": self._memory,
            "tokenize": self._tokenize,
            "tokenize_many": self._tokenize_many,
            "detokenize": self._detokenize,
            "embed": self._embed,
            "pair_tokens": self._pair_tokens,
            "time": self._time,
            "stats": self._stats,
            "save_state": self._save_state,
            "restore_state": self._restore_state,
        }
        threading.Thread(target=self._read, daemon=True, name="reader").start()

    def run(self) -> None:
        """Serve until the socket closes."""
        while True:
            while self._driver is None or self._driver.idle or not self._inbox.empty():
                self._pulse.doing("idle")
                self._handle(self._next_frame())
                self._send_events()
            self._pulse.doing("a step")
            try:
                self._driver.step()
            finally:
                self._send_events()

    def _next_frame(self) -> Frame:
        """What is to be done next. When nobody has asked for a while, freed memory goes back."""
        if self._driver is None:
            return self._inbox.get()
        try:
            return self._inbox.get(timeout=_FLUSH_S)
        except queue.Empty:
            self._opened.flush()
            return self._inbox.get()

    def _read(self) -> None:
        """Fill the inbox; what cannot wait for the main thread is done here."""
        try:
            while (frames := self._channel.receive()) is not None:
                for frame in frames:
                    self._receive(frame)
        except BaseException as error:
            _fail(self._channel, error)
        os._exit(0)  # the parent is gone, or wants us gone; native code cannot be asked to end

    def _receive(self, frame: Frame) -> None:
        loaded = self._driver is not None
        if loaded and frame.kind == "call" and frame.body["method"] in _BESIDE_STEPS:
            self._answer(frame.body, lambda: self._calls[frame.body["method"]](frame))
            return
        self._inbox.put(frame)
        if frame.kind == "cancel" and self._driver is not None:
            self._driver.interrupt(frame.body["request_id"])
        elif frame.kind == "stop_load" and self._backend is not None:
            self._backend.interrupt()

    def _handle(self, frame: Frame) -> None:
        body = frame.body
        match frame.kind:
            case "open":
                self._answer(body, lambda: self._open(body))
            case "call":
                self._pulse.doing(body["method"])
                self._answer(body, lambda: self._calls[body["method"]](frame))
            case "submit" if self._driver is not None:
                self._pulse.doing("taking a request")
                self._driver.submit(from_json(GenerateRequest, body["request"]))
            case "cancel" if self._driver is not None:
                self._driver.cancel(body["request_id"])

    def _answer(self, body: Mapping[str, Any], call: Any) -> None:
        """Reply with the result or with the error; only our own errors leave the worker usable."""
        try:
            result, payload = call()
        except LoadmasterError as error:
            if isinstance(error, EngineError) and body.get("method") in _STEPPING:
                raise
            self._channel.send({"kind": "error", "id": body["id"], "error": error_json(error)})
        else:
            self._channel.send({"kind": "reply", "id": body["id"], "result": result}, payload)

    # -- calls: each returns a JSON value and a payload

    def _open(self, body: Mapping[str, Any]) -> tuple[object, bytes]:
        self._backend = open_backend(
            body["backend"],
            lib_dir=Path(body["lib_dir"]),
            python_dir=Path(body["python_dir"]),
            devices=[from_json(VirtualDevice, device) for device in body["devices"]],
            options=body["options"],
        )
        return to_json(self._confinements), b""

    @property
    def _opened(self) -> Backend:
        if self._backend is None:
            raise EngineError("no backend is open")
        return self._backend

    @property
    def _running(self) -> Driver:
        if self._driver is None:
            raise EngineError("no model is open")
        return self._driver

    def _devices(self, frame: Frame) -> tuple[object, bytes]:
        return to_json(self._opened.devices()), b""

    def _size(self, frame: Frame) -> tuple[object, bytes]:
        settings = from_json(any_settings, frame.body["settings"])
        return to_json(self._opened.size(Path(frame.body["path"]), settings)), b""

    def _open_vocabulary(self, frame: Frame) -> tuple[object, bytes]:
        return to_json(self._opened.open_vocabulary(Path(frame.body["path"]))), b""

    def _time(self, frame: Frame) -> tuple[object, bytes]:
        question = question_from_json(frame.body["question"])
        if isinstance(question, TimeSteps):
            self._running.forget()
            seconds: tuple[float, ...] | None = time_steps(
                self._opened, question, self._running.n_ubatch
            )
        else:
            seconds = self._opened.time(question)
        return None if seconds is None else list(seconds), b""

    def _load(self, frame: Frame) -> tuple[object, bytes]:
        request = from_json(LoadRequest, frame.body["request"])
        files = [Path(path) for path in frame.body["files"]]
        if request.model_stamp:
            check_unchanged(files, request.model_stamp)
        if frame.body["cap_data"] and request.ram_cap_bytes is not None:
            cap_data(request.ram_cap_bytes)
        draft = request.draft
        if draft is not None:
            check_unchanged(draft.files, draft.model_stamp)
        loaded = self._opened.load(request, self._progress(frame.body["id"]))
        if request.model_stamp:
            _check_after_load(files, request.model_stamp)
        capabilities = self._opened.capabilities()
        limits = limits_of(request, loaded, capabilities)
        self._ram_cap_bytes = request.ram_cap_bytes if request.state_bytes is None else None
        self._driver = Driver(
            self._opened,
            limits,
            report=self._report,
            refuse=self._refuse,
            attention=lambda: not self._inbox.empty(),
        )
        gc.freeze()  # what is loaded now stays: collections need not look at it
        return {"loaded": to_json(loaded), "capabilities": to_json(capabilities)}, b""

    def _progress(self, call_id: int) -> Any:
        last = float("-inf")

        def progress(value: float) -> bool:
            nonlocal last
            now = time.monotonic()
            self._pulse.doing("load")  # it moves: the deadline starts anew
            if now - last >= _PROGRESS_S or value >= 1:
                last = now
                self._channel.send({"kind": "progress", "id": call_id, "value": value})
            return True

        return progress

    def _commit_peak(self, frame: Frame) -> tuple[object, bytes]:
        self._running.forget()
        self._opened.commit_peak(float(frame.body["time_limit_s"]))
        if self._running.n_draft_step:
            n_step, by_model = self._running.n_draft_step, self._running.draft_model
            costs = step_costs(self._opened, n_step, draft_model=by_model)
            self._running.note_costs(costs)
        if self._ram_cap_bytes is not None:  # half of what is left now that all else is in use
            left = self._ram_cap_bytes - process_memory().own_bytes
            self._running.allow_states(max(0, left) // 2)
        return self._memory(frame)

    def _memory(self, frame: Frame) -> tuple[object, bytes]:
        report = self._opened.memory()
        self._pulse.sample()
        return to_json(_with_peak(report, self._pulse.peak_bytes)), b""

    def _tokenize(self, frame: Frame) -> tuple[object, bytes]:
        body = frame.body
        tokens = self._opened.tokenize(
            body["text"], add_special=body["add_special"], parse_special=body["parse_special"]
        )
        return tokens, b""

    def _tokenize_many(self, frame: Frame) -> tuple[object, bytes]:
        tokenize, parse_special = self._opened.tokenize, frame.body["parse_special"]
        texts = frame.body["texts"]
        return [
            tokenize(text, add_special=add_special, parse_special=parse_special)
            for text, add_special in texts
        ], b""

    def _detokenize(self, frame: Frame) -> tuple[object, bytes]:
        tokens = from_json(list_of_tokens, frame.body["tokens"])
        return b"".join(map(self._opened.special_text, tokens)).decode("utf-8", "replace"), b""

    def _stats(self, frame: Frame) -> tuple[object, bytes]:
        return to_json(self._running.stats()), b""

    def _embed(self, frame: Frame) -> tuple[object, bytes]:
        self._running.forget()  # it takes all cells
        vectors = self._opened.embed(from_json(lists_of_tokens, frame.body["prompts"]))
        return None, b"".join(array("f", vector).tobytes() for vector in vectors)

    def _pair_tokens(self, frame: Frame) -> tuple[object, bytes]:
        pair, query = self._opened.pair_tokens, frame.body["query"]
        return [pair(query, document) for document in frame.body["documents"]], b""

    def _save_state(self, frame: Frame) -> tuple[object, bytes]:
        tokens, state = self._running.save()
        return list(tokens), state

    def _restore_state(self, frame: Frame) -> tuple[object, bytes]:
        tokens = from_json(list_of_tokens, frame.body["tokens"])
        self._running.restore(tokens, frame.payload)
        return None, b""

    # -- events

    def _report(self, event: GenerateEvent) -> None:
        body = to_json(event)
        self._events.append({"kind": "event", "event": _EVENT_KINDS[type(event)], "body": body})

    def _refuse(self, request_id: str, error: LoadmasterError) -> None:
        self._events.append(
            {"kind": "refused", "request_id": request_id, "error": error_json(error)}
        )

    def _send_events(self) -> None:
        """All events of a step at once: they wake the parent once."""
        if self._events:
            events, self._events = self._events, []
            self._channel.send_all(events)


any_settings: Any = AnySettings
list_of_tokens: Any = tuple[int, ...]
lists_of_tokens: Any = tuple[tuple[int, ...], ...]


def _check_after_load(files: list[Path], stamp: str) -> None:
    """A file that was replaced while it was read is a mixture of two."""
    try:
        check_unchanged(files, stamp)
    except ModelChangedError as error:
        raise EngineError(f"{error.message}, while it was loaded", hint=error.hint) from None


def _with_peak(report: MemoryReport, peak_bytes: Bytes) -> MemoryReport:
    return replace(report, process_peak_bytes=max(report.process_peak_bytes, peak_bytes))


def _fail(channel: Channel, error: BaseException) -> None:
    """Say why, and end: after an engine error the process is not used again."""
    if not isinstance(error, LoadmasterError):
        traceback.print_exception(error)
        error = EngineError(f"the worker failed: {type(error).__name__}: {error}")
    channel.send({"kind": "fatal", "error": error_json(error)})
    os._exit(FATAL_STATUS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="loadmaster.engine.worker")
    parser.add_argument("--fd", type=int, help="the socket to the parent")
    parser.add_argument("--parent", type=int, help="its process id")
    parser.add_argument("--target", default="cpu", help="the engine build's target")
    parser.add_argument("--confinements", action="store_true", help="print them and exit")
    options = parser.parse_args(argv)
    parent = os.getppid() if options.parent is None else options.parent
    confinements = confine_worker(target=options.target, parent_pid=parent)
    if options.confinements:
        json.dump(to_json(confinements), sys.stdout)
        return
    channel = Channel(socket.socket(fileno=options.fd))
    try:
        Worker(channel, confinements).run()
    except BaseException as error:  # whatever it is, the parent must hear of it
        _fail(channel, error)


if __name__ == "__main__":
    main()
