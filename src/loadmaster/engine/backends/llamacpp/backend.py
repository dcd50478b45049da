"""The `Backend` of llama.cpp."""

import ctypes as c
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loadmaster.engine.backends.llamacpp.batch import Batch
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.opened import OpenModel
from loadmaster.engine.backends.llamacpp.params import model_params
from loadmaster.engine.backends.llamacpp.sampling import make_chain
from loadmaster.engine.backends.llamacpp.sizer import DryRuns
from loadmaster.engine.backends.llamacpp.timing import Timers
from loadmaster.engine.meter import process_memory
from loadmaster.engine.timing import Question
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
from loadmaster.plan.types import EngineSettings, Sizing, SizingFailure
from loadmaster.units import Bytes

_NO_SLOT, _ABORTED = 1, 2


class LlamaCpp:
    """One llama.cpp, and at most one open model in it."""

    name = "llamacpp"

    def __init__(
        self, *, lib_dir: Path, python_dir: Path, devices: Sequence[VirtualDevice]
    ) -> None:
        self._library = Library(lib_dir=lib_dir, python_dir=python_dir, devices=devices)
        self._api = self._library.api
        self._dry_runs = DryRuns(self._library)
        self._stop_load = False
        self._open: OpenModel | None = None
        self._samplers: dict[int, Any] = {}
        self._pieces: dict[int, bytes] = {}
        # The engine polls a C function between operations. A Python callback would cost a
        # microsecond for each of hundreds of operations; `strlen` of one byte is "is it set?".
        self._cut = c.create_string_buffer(2)
        strlen = c.cast(self._api._lib.strlen, c.c_void_p).value
        self._abort = self._api.ggml_abort_callback(strlen)

    # -- before a model is open

    def devices(self) -> tuple[DeviceFacts, ...]:
        return tuple(self._library.facts(device) for device in self._library.devices)

    def size(self, model_path: Path, settings: EngineSettings) -> Sizing | SizingFailure:
        return self._dry_runs.size(model_path, settings)

    def time(self, question: Question) -> tuple[float, ...] | None:
        return Timers(self._library).time(question)

    def load(self, request: LoadRequest, progress: Callable[[float], bool]) -> LoadedModel:
        started = time.monotonic()
        self._dry_runs.forget()
        model = self._load_model(request, progress)
        self._open = opened = OpenModel(self._library, model, request.settings)
        opened.open_context()
        opened.apply_adapters()
        self._api.llama_set_abort_callback(opened.context, self._abort, c.addressof(self._cut))
        self._batch = Batch(self._api, opened.n_batch)
        return opened.describe(time.monotonic() - started)

    def _load_model(self, request: LoadRequest, progress: Callable[[float], bool]) -> int:
        self.resume()

        def on_progress(value: float, _: object) -> bool:
            return progress(value) and not self._stop_load

        callback = self._api.llama_progress_callback(on_progress)
        params = model_params(self._library, request.settings, dry_run=False, progress=callback)
        path = str(request.model_path).encode()
        model = self._api.llama_model_load_from_file(path, params.struct)
        if self._stop_load:
            raise EngineRefusedError(f"the load of `{request.model_path.name}` was stopped")
        if not model:
            raise EngineRefusedError(
                f"the engine cannot load `{request.model_path.name}`: {self._library.error()}"
            )
        return int(model)

    def interrupt(self) -> None:
        self._stop_load = True
        self._cut[0] = b"\x01"

    def resume(self) -> None:
        self._stop_load = False
        self._cut[0] = b"\x00"

    # -- an open model

    @property
    def _model(self) -> OpenModel:
        if self._open is None:
            raise EngineError("no model is open")
        return self._open

    def capabilities(self) -> Capabilities:
        return self._model.capabilities()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._model.tokenize(text, add_special, parse_special)

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._model.piece(token)
        return piece

    def is_eog(self, token: int) -> bool:
        return token in self._model.eog

    def start_sequence(
        self, seq_id: int, sampling: SamplingParams, recent: Sequence[int] = ()
    ) -> None:
        self._free_sampler(seq_id)
        self._samplers[seq_id] = make_chain(self._api, self._model.n_vocab, sampling, recent)

    def _free_sampler(self, seq_id: int) -> None:
        sampler = self._samplers.pop(seq_id, None)
        if sampler is not None:
            self._api.llama_sampler_free(sampler)

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        context = self._model.context
        outputs = self._batch.fill(work)
        status = self._api.llama_decode(context, self._batch.struct)
        if status == _ABORTED:
            return StepResult(tokens={}, cut=True)
        if status != 0:
            raise self._step_error(status)
        sample = self._api.llama_sampler_sample
        return StepResult(
            tokens={seq: sample(self._samplers[seq], context, row) for seq, row in outputs}
        )

    def decode_run(
        self, first: SequenceWork, n_max: int, go_on: Callable[[], bool], *, stop_at_eog: bool
    ) -> RunResult:
        """The inner loop of a lone sequence: between two steps there is as little as can be."""
        context, batch, write = self._model.context, self._batch.struct, self._batch.write_one
        decode, sample = self._api.llama_decode, self._api.llama_sampler_sample
        sampler = self._samplers[first.seq_id]
        ends = self._model.eog if stop_at_eog else frozenset()
        token, position = first.tokens[0], first.position
        tokens: list[int] = []
        self._batch.fill([first])
        while True:
            status = decode(context, batch)
            if status == _ABORTED:
                return RunResult(tokens=tokens, cut=True)
            if status != 0:
                raise self._step_error(status)
            token = sample(sampler, context, 0)
            tokens.append(token)
            if token in ends or len(tokens) >= n_max or not go_on():
                return RunResult(tokens=tokens)
            position += 1
            write(token, position)

    def _step_error(self, status: int) -> EngineError:
        if status == _NO_SLOT:
            return EngineError("the engine found no free KV cells for a step that had them")
        return EngineError(f"the engine failed a step ({status}): {self._library.error()}")

    def remove(self, seq_id: int, start: int) -> bool:
        return self._model.remove(seq_id, start)

    def save_state(self, seq_id: int) -> bytes:
        return self._model.save_state(seq_id)

    def restore_state(self, seq_id: int, state: bytes) -> None:
        self._model.restore_state(seq_id, state)

    def commit_peak(self, time_limit_s: float) -> None:
        opened = self._model
        deadline = time.monotonic() + time_limit_s
        self.start_sequence(0, SamplingParams(temperature=0))
        chunk = (opened.filler_token,) * opened.n_ubatch
        position, cut = 0, False
        last = opened.n_ctx_seq - 1
        while position < last and not cut and (position == 0 or time.monotonic() < deadline):
            tokens = chunk[: last - position]
            cut = self._step_until(deadline, tokens, position)
            position += len(tokens)
        if cut:  # how much of the last chunk is in the cells is unknown
            opened.clear()
            position = 0
        self._step_until(float("inf"), chunk[:1], position)
        opened.clear()
        self._free_sampler(0)

    def _step_until(self, deadline: float, tokens: tuple[int, ...], position: int) -> bool:
        """One step of sequence 0, cut at the deadline. Its buffers are allocated before that."""
        work = SequenceWork(seq_id=0, tokens=tokens, position=position, sample=True)
        if deadline == float("inf"):
            return self.step([work]).cut
        timer = threading.Timer(max(0.1, deadline - time.monotonic()), self.interrupt)
        timer.start()
        try:
            return self.step([work]).cut
        finally:
            timer.cancel()
            timer.join()
            self.resume()

    def memory(self) -> MemoryReport:
        process = process_memory()
        devices = self._library.devices
        usage = {device.id: self._library.usage(device) for device in devices}
        return MemoryReport(
            buffers=self._open.buffers() if self._open else (),
            process_bytes=process.own_bytes,
            process_peak_bytes=process.own_bytes,
            mapped_bytes=process.mapped_bytes,
            device_used_bytes={key: Bytes(row[0]) if row else None for key, row in usage.items()},
            device_peak_bytes={key: Bytes(row[1]) if row else None for key, row in usage.items()},
            device_denied={key: row[2] for key, row in usage.items() if row},
        )

    def close(self) -> None:
        for seq_id in tuple(self._samplers):
            self._free_sampler(seq_id)
        self._dry_runs.forget()
        if self._open is not None:
            self._open.close()
            self._open = None
