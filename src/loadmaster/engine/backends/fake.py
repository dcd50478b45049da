"""A backend without a model, for tests: set speed, load time, memory and faults.

Everything it prints says that it is fake. Options (JSON, all optional):

    tok_s            tokens per second of decoding (default: no delay)
    prefill_tok_s    tokens per second of prefill
    load_s           time to load
    n_vocab          size of the vocabulary (256 bytes and an end token at least)
    memory_bytes     process memory that it reports
    answer           what it says, over and over; the default names itself
    eog_after        end the generation after so many tokens
    fail_load        refuse to load, with this reason
    over_budget      {"gpu:0": bytes}: what `memory` reports as used on a device
    fault            {"kind": "raise" | "abort" | "segv" | "kill" | "stop" | "exit" | "garbage",
                      "at_step": n}: what happens at the n-th step, counted from 1
    step_s           {"at_step": n, "seconds": s}: one long step
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadmaster.engine.meter import process_memory
from loadmaster.engine.timing import Question, TimeLink, TimeProducts
from loadmaster.engine.types import (
    Capabilities,
    DeviceFacts,
    LoadedModel,
    LoadRequest,
    MemoryReport,
    RunResult,
    SamplingParams,
    SequenceWork,
    StepResult,
    VirtualDevice,
)
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.plan.types import BufferSizes, EngineSettings, Sizing, SizingFailure
from loadmaster.schema import from_json
from loadmaster.units import Bytes, align

ANSWER = "This is the fake engine: it has no model. "
_N_BYTES = 256
_CELL_BYTES = 64
_PROGRESS_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong, and at which step."""

    kind: str
    at_step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LongStep:
    """One step that takes its time."""

    seconds: float
    at_step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSpec:
    """The options above."""

    tok_s: float | None = None
    prefill_tok_s: float | None = None
    load_s: float = 0.0
    n_vocab: int = _N_BYTES + 1
    memory_bytes: int | None = None
    answer: str = ANSWER
    eog_after: int | None = None
    fail_load: str | None = None
    over_budget: Mapping[str, int] = field(default_factory=dict)
    fault: Fault | None = None
    step_s: LongStep | None = None


class Fake:
    """A byte is a token; token 256 ends a generation. A sequence's answer starts at its seed."""

    name = "fake"

    def __init__(self, *, devices: Sequence[VirtualDevice], options: Mapping[str, object]) -> None:
        self._spec = from_json(FakeSpec, dict(options))
        self._devices = tuple(devices)
        self._answer = self._spec.answer.encode()
        self._cut = threading.Event()
        self._cells: dict[int, list[int]] = {}
        self._said: dict[int, int] = {}
        self._seed: dict[int, int] = {}
        self._settings: EngineSettings | None = None
        self._n_steps = 0

    def devices(self) -> tuple[DeviceFacts, ...]:
        return tuple(
            DeviceFacts(
                id=device.id,
                engine_name=f"FAKE{index}",
                description="fake device",
                total_bytes=device.total_bytes,
                free_bytes=device.total_bytes,
            )
            for index, device in enumerate(self._devices)
        )

    def size(self, model_path: Path, settings: EngineSettings) -> Sizing | SizingFailure:
        if self._spec.fail_load is not None:
            return SizingFailure(reason=self._spec.fail_load)
        return Sizing(buffers=self._buffers(model_path, settings), n_ctx=align(settings.n_ctx, 256))

    def _buffers(self, path: Path, settings: EngineSettings) -> tuple[BufferSizes, ...]:
        """All on the first device that has layers, else on the host."""
        on_gpu = settings.n_gpu_layers > 0 and self._devices
        row = BufferSizes(
            device=self._devices[0].id if on_gpu else "cpu",
            model_bytes=Bytes(path.stat().st_size),
            context_bytes=Bytes(align(settings.n_ctx, 256) * _CELL_BYTES),
            compute_bytes=Bytes(settings.n_ubatch * 1024),
        )
        return (row,)

    def time(self, question: Question) -> tuple[float, ...] | None:
        """A microsecond for everything; it has no link and no repacked weights."""
        if isinstance(question, TimeLink) or getattr(question, "repacked", False):
            return None
        points = len(question.points) if isinstance(question, TimeProducts) else 1
        return (1e-6,) * (points * getattr(question, "runs", 1))

    def load(self, request: LoadRequest, progress: Callable[[float], bool]) -> LoadedModel:
        if self._spec.fail_load is not None:
            raise EngineRefusedError(f"the fake engine refuses: {self._spec.fail_load}")
        self._cut.clear()
        for part in range(_PROGRESS_STEPS + 1):
            if not progress(part / _PROGRESS_STEPS) or self._cut.is_set():
                raise EngineRefusedError("the load of the fake engine was stopped")
            self._cut.wait(self._spec.load_s / _PROGRESS_STEPS)
        self._settings = request.settings
        self._path = request.model_path
        n_ctx = align(request.settings.n_ctx, 256)
        return LoadedModel(
            n_ctx=n_ctx,
            n_ctx_seq=n_ctx,
            n_vocab=self._spec.n_vocab,
            load_s=self._spec.load_s,
            eog_tokens=(_N_BYTES,),
            bos_token=None,
            add_bos=False,
        )

    def interrupt(self) -> None:
        self._cut.set()

    def capabilities(self) -> Capabilities:
        assert self._settings is not None
        return Capabilities(
            n_seq_max=self._settings.n_seq_max,
            shared_prefix=True,
            partial_removal=True,
            state_save=True,
        )

    def commit_peak(self, time_limit_s: float) -> None:
        """There is nothing to commit."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < _N_BYTES else b""

    def is_eog(self, token: int) -> bool:
        return token == _N_BYTES

    def start_sequence(
        self, seq_id: int, sampling: SamplingParams, recent: Sequence[int] = ()
    ) -> None:
        self._said[seq_id] = 0
        self._seed[seq_id] = sampling.seed if sampling.temperature > 0 else 0

    def resume(self) -> None:
        self._cut.clear()

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        self._n_steps += 1
        self._fault()
        if self._cut.wait(self._duration(work)):
            return StepResult(tokens={}, cut=True)
        for part in work:
            cells = self._cells.setdefault(part.seq_id, [])
            if part.position != len(cells):
                raise EngineError(f"the fake engine has {len(cells)} cells, not {part.position}")
            cells += part.tokens
        return StepResult(tokens={p.seq_id: self._next(p.seq_id) for p in work if p.sample})

    def decode_run(
        self, first: SequenceWork, n_max: int, go_on: Callable[[], bool], *, stop_at_eog: bool
    ) -> RunResult:
        tokens: list[int] = []
        fed = first.tokens
        while True:
            position = first.position + len(tokens)
            work = SequenceWork(seq_id=first.seq_id, tokens=fed, position=position, sample=True)
            result = self.step([work])
            if result.cut:
                return RunResult(tokens=tokens, cut=True)
            fed = (result.tokens[first.seq_id],)
            tokens += fed
            ended = stop_at_eog and self.is_eog(fed[0])
            if ended or len(tokens) >= n_max or not go_on():
                return RunResult(tokens=tokens)

    def _duration(self, work: Sequence[SequenceWork]) -> float:
        long = self._spec.step_s
        if long is not None and long.at_step == self._n_steps:
            return long.seconds
        n_prefill = sum(len(part.tokens) for part in work if len(part.tokens) > 1)
        seconds = n_prefill / self._spec.prefill_tok_s if self._spec.prefill_tok_s else 0.0
        return seconds + (1 / self._spec.tok_s if self._spec.tok_s else 0.0)

    def _next(self, seq_id: int) -> int:
        said = self._said[seq_id]
        self._said[seq_id] = said + 1
        if self._spec.eog_after is not None and said >= self._spec.eog_after:
            return _N_BYTES
        return self._answer[(said + self._seed[seq_id]) % len(self._answer)]

    def _fault(self) -> None:
        fault = self._spec.fault
        if fault is not None and fault.at_step == self._n_steps:
            _FAULTS[fault.kind]()

    def remove(self, seq_id: int, start: int) -> bool:
        cells = self._cells.setdefault(seq_id, [])
        if start > len(cells):
            cells.clear()
            return False
        del cells[start:]
        return True

    def save_state(self, seq_id: int) -> bytes:
        return b"".join(token.to_bytes(4, "little") for token in self._cells.get(seq_id, []))

    def restore_state(self, seq_id: int, state: bytes) -> None:
        if len(state) % 4:
            raise EngineRefusedError(f"the fake engine refuses a state of {len(state)} bytes")
        self._cells[seq_id] = [
            int.from_bytes(state[at : at + 4], "little") for at in range(0, len(state), 4)
        ]

    def memory(self) -> MemoryReport:
        process = process_memory()
        own = process.own_bytes
        if self._spec.memory_bytes is not None:
            own = Bytes(self._spec.memory_bytes)
        used = self._used()
        return MemoryReport(
            buffers=self._buffers(self._path, self._settings) if self._settings else (),
            process_bytes=own,
            process_peak_bytes=own,
            mapped_bytes=process.mapped_bytes,
            device_used_bytes=used,
            device_peak_bytes=used,
            device_denied={device.id: 0 for device in self._devices},
        )

    def _used(self) -> dict[str, Bytes | None]:
        buffers = self._buffers(self._path, self._settings) if self._settings else ()
        sums = {
            row.device: Bytes(row.model_bytes + row.context_bytes + row.compute_bytes)
            for row in buffers
        }
        return {
            device.id: Bytes(self._spec.over_budget.get(device.id, sums.get(device.id, Bytes(0))))
            for device in self._devices
        }

    def close(self) -> None:
        self._cells.clear()


def _raise() -> None:
    raise EngineError("the fake engine failed a step")


def _send_garbage() -> None:
    """Write what is no frame to every socket of this process."""
    for descriptor in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue


def _by_signal(number: int) -> Callable[[], Any]:
    return lambda: os.kill(os.getpid(), number)


_FAULTS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "abort": os.abort,
    "segv": lambda: ctypes.string_at(0),
    "kill": _by_signal(signal.SIGKILL),
    "stop": _by_signal(signal.SIGSTOP),
    "exit": lambda: os._exit(3),
    "garbage": _send_garbage,
}
