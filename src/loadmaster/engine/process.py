"""The parent's side of an engine: a handle on one worker process, safe from any thread.

A watcher thread starts the worker, reads what it sends, and notices its death or its silence. Then
every open call raises the one error that says why, every open request gets its `DoneEvent`, and
nothing is left running.
"""

import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from loadmaster.engine.driver import context_length_error
from loadmaster.engine.embedding import check_prompts, normalized, packed, vectors_of
from loadmaster.engine.exchange import Sink
from loadmaster.engine.meter import GpuMeter
from loadmaster.engine.request_checks import check_request, check_tokens
from loadmaster.engine.timing import Question, question_to_json
from loadmaster.engine.types import (
    Capabilities,
    DeviceFacts,
    DoneEvent,
    EngineBuild,
    GenerateEvent,
    GenerateRequest,
    LoadedModel,
    LoadRequest,
    MemoryReport,
    SchedulerStats,
    VirtualDevice,
)
from loadmaster.engine.watch import Watcher
from loadmaster.errors import EngineError, LoadmasterError, UsageError
from loadmaster.machine.types import Confinement
from loadmaster.plan.types import AnySettings, Sizing, SizingFailure
from loadmaster.schema import SchemaError, from_json, to_json
from loadmaster.units import Bytes

START_TIMEOUT_S = 120.0  # a first CUDA context on a slow disk takes tens of seconds
PEAK_TIME_LIMIT_S = 5.0
STEP_DEADLINE_S = 600.0

OnProgress = Callable[[float], bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceState:
    """A sequence's cells, and the tokens they stand for."""

    tokens: tuple[int, ...]
    data: bytes


class Engine:
    """A worker process and what may be asked of it."""

    def __init__(self, watcher: Watcher, confinements: tuple[Confinement, ...]) -> None:
        """Use `Engine.start`."""
        self._watcher = watcher
        self._confinements = confinements
        self._gpu_meter = GpuMeter(watcher.pid, os.environ.get("CUDA_VISIBLE_DEVICES"))
        watcher.on_tick = self._gpu_meter.sample
        self.loaded: LoadedModel | None = None
        self.capabilities: Capabilities | None = None

    @classmethod
    def start(
        cls,
        build: EngineBuild,
        *,
        devices: Sequence[VirtualDevice] = (),
        backend: str = "llamacpp",
        min_batch: int | None = None,
        ram_cap_bytes: Bytes | None = None,
        options: Mapping[str, object] | None = None,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> Self:
        """Start a worker with a backend; with `devices`, on virtual GPUs instead of real ones.

        `min_batch` is the plan's `op_offload_min_batch`: it counts for the life of the process.
        `options` are the backend's own (the fake backend's faults).

        Raises:
            EngineMissingError: the build cannot be loaded.
            EngineError: the worker did not come up.
        """
        watcher = Watcher(build, min_batch=min_batch, step_deadline_s=step_deadline_s)
        try:
            if ram_cap_bytes is not None:
                watcher.cap_ram(ram_cap_bytes)
            answer = watcher.open(
                {
                    "backend": backend,
                    "lib_dir": str(build.lib_dir),
                    "python_dir": str(build.python_dir),
                    "devices": to_json(tuple(devices)),
                    "options": dict(options or {}),
                },
                START_TIMEOUT_S,
            )
            confinements = _decode(tuple[Confinement, ...], answer.result)
        except BaseException:
            watcher.close()
            raise
        return cls(watcher, confinements)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._watcher.pid

    @property
    def failure(self) -> LoadmasterError | None:
        """Why the worker is no more; None while it lives, and after `close`."""
        return self._watcher.exchange.failure

    @property
    def confinements(self) -> tuple[Confinement, ...]:
        """Which protections this worker runs under."""
        return (*self._confinements, *self._watcher.cap_confinements())

    def limit_steps(self, deadline_s: float) -> None:
        """From now on a step, or a call, that takes longer ends the worker."""
        self._watcher.step_deadline_s = deadline_s

    def give_up(self, error: LoadmasterError) -> None:
        """Have the worker killed; every open call and request ends with `error`."""
        self._watcher.give_up(error)

    def log_tail(self) -> tuple[str, ...]:
        """The engine's last log lines."""
        return self._watcher.log.lines()

    # -- calls

    def devices(self) -> tuple[DeviceFacts, ...]:
        """The GPUs that the engine sees. On CUDA this makes a context on each."""
        answer = self._watcher.call("devices", {}, doing="listing devices")
        devices: tuple[DeviceFacts, ...] = _decode(tuple[DeviceFacts, ...], answer.result)
        return devices

    def size(self, path: Path, settings: AnySettings) -> Sizing | SizingFailure:
        """Dry run: what a load with these settings would take (as `load_mode` none)."""
        body = {"path": str(path), "settings": to_json(settings)}
        result = self._watcher.call("size", body, doing="sizing the model").result
        failed = isinstance(result, dict) and "reason" in result
        sizing: Sizing | SizingFailure = _decode(SizingFailure if failed else Sizing, result)
        return sizing

    def open_vocabulary(self, path: Path) -> LoadedModel:
        """Read a model's vocabulary alone, for `tokenize` and `tokenize_many` without a load.

        Raises:
            EngineRefusedError: the file was refused.
        """
        body = {"path": str(path)}
        answer = self._watcher.call("open_vocabulary", body, doing="reading the vocabulary")
        vocabulary: LoadedModel = _decode(LoadedModel, answer.result)
        return vocabulary

    def time(self, question: Question) -> tuple[float, ...] | None:
        """Seconds of every run; None where the device cannot do it. No request may be running."""
        body = {"question": question_to_json(question)}
        result = self._watcher.call("time", body, doing="timing").result
        if result is None:
            return None
        seconds: tuple[float, ...] = _decode(tuple[float, ...], result)
        return seconds

    def load(
        self,
        request: LoadRequest,
        on_progress: OnProgress | None = None,
        *,
        files: Sequence[Path] = (),
    ) -> LoadedModel:
        """Open a model. `files` are all its shards, by default the one path.

        `on_progress` gets 0…1 and stops the load by returning False.

        Raises:
            ModelChangedError: the files are not those of `model_stamp`.
            EngineRefusedError: the engine cannot read the file or get its memory.
        """
        paths = tuple(files) or (request.model_path,)
        self._watcher.model = (paths, request.model_stamp)
        if request.ram_cap_bytes is not None:
            self._watcher.cap_ram(request.ram_cap_bytes)
        body = {
            "request": to_json(request),
            "files": [str(path) for path in paths],
            "cap_data": not self._watcher.has_cgroup,
        }

        def progress(value: float) -> None:
            if on_progress is not None and on_progress(value) is False:
                self._watcher.send({"kind": "stop_load"})

        result = self._watcher.call("load", body, doing="loading the model", progress=progress)
        fields = result.result if isinstance(result.result, dict) else {}
        self.capabilities = _decode(Capabilities, fields.get("capabilities"))
        self.loaded = _decode(LoadedModel, fields.get("loaded"))
        return self.loaded

    def commit_peak(self, time_limit_s: float = PEAK_TIME_LIMIT_S) -> MemoryReport:
        """Make every lazily allocated buffer as large as it will get, and measure."""
        body = {"time_limit_s": time_limit_s}
        answer = self._watcher.call("commit_peak", body, doing="committing its peak memory")
        return self._with_driver_figures(_decode(MemoryReport, answer.result))

    def memory(self) -> MemoryReport:
        """Measure now. During a step, the answer comes at its end."""
        answer = self._watcher.call("memory", {}, doing="measuring memory")
        return self._with_driver_figures(_decode(MemoryReport, answer.result))

    def _with_driver_figures(self, report: MemoryReport) -> MemoryReport:
        """Fill in what the GPU driver knows of the process; a virtual device knows itself."""
        used, peak = self._gpu_meter.sample(), self._gpu_meter.peak
        return replace(
            report,
            device_used_bytes=_fill(report.device_used_bytes, used),
            device_peak_bytes=_fill(report.device_peak_bytes, peak),
        )

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Text to tokens of the open model."""
        body = {"text": text, "add_special": add_special, "parse_special": parse_special}
        answer = self._watcher.call("tokenize", body, doing="tokenizing")
        return list(_decode(tuple[int, ...], answer.result))

    def tokenize_many(
        self, texts: Sequence[tuple[str, bool]], parse_special: bool = False
    ) -> list[list[int]]:
        """Each text's tokens; the flag beside it is `add_special`. One answer between two steps."""
        body = {"texts": [list(text) for text in texts], "parse_special": parse_special}
        answer = self._watcher.call("tokenize_many", body, doing="tokenizing")
        return [list(tokens) for tokens in _decode(tuple[tuple[int, ...], ...], answer.result)]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Tokens to text, control tokens as the texts that stand for them."""
        check_tokens(tokens, self._open_model().n_vocab)
        answer = self._watcher.call("detokenize", {"tokens": list(tokens)}, doing="detokenizing")
        return str(_decode(str, answer.result))

    def stats(self) -> SchedulerStats:
        """What the scheduler has counted, and what is in use. During a step it comes at its end."""
        answer = self._watcher.call("stats", {}, doing="counting")
        stats: SchedulerStats = _decode(SchedulerStats, answer.result)
        return stats

    def embed(
        self, prompts: Sequence[Sequence[int]], *, normalize: bool = True
    ) -> list[list[float]]:
        """A vector for each prompt, of length 1 if normalized; of a model opened with a pooling.

        Raises:
            UsageError: the model was opened to write text.
            ContextLengthError: a prompt is longer than a step.
        """
        loaded = self._open_model()
        check_prompts(prompts, loaded)
        check_tokens([token for prompt in prompts for token in prompt], loaded.n_vocab)
        n_prompts = self.capabilities.n_seq_max if self.capabilities else 1
        vectors: list[list[float]] = [[] for _ in prompts]
        for step in packed([len(prompt) for prompt in prompts], loaded.n_embed_max, n_prompts):
            body = {"prompts": [list(prompts[index]) for index in step]}
            answer = self._watcher.call("embed", body, doing="embedding")
            found = vectors_of(answer.payload, len(step), loaded.n_embd)
            for index, vector in zip(step, found, strict=True):
                vectors[index] = normalized(vector) if normalize else vector
        return vectors

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        """How well each document answers the query; of a model opened with pooling `rank`.

        Raises:
            UsageError: the model was not opened for ranks.
            ContextLengthError: query and document are longer than a step.
        """
        if self._open_model().pooling != "rank":
            raise UsageError("the model was not opened for ranks", hint="open it with pooling rank")
        body = {"query": query, "documents": list(documents)}
        answer = self._watcher.call("pair_tokens", body, doing="tokenizing")
        pairs = _decode(tuple[tuple[int, ...], ...], answer.result)
        return [scores[0] for scores in self.embed(pairs, normalize=False)]

    def _open_model(self) -> LoadedModel:
        if self.loaded is None:
            raise UsageError("no model is open in this engine")
        return self.loaded

    def save_state(self) -> SequenceState:
        """The cells of the sequence whose request ended last."""
        answer = self._watcher.call("save_state", {}, doing="saving a sequence")
        return SequenceState(tokens=_decode(tuple[int, ...], answer.result), data=answer.payload)

    def restore_state(self, state: SequenceState) -> None:
        """Put saved cells back: a prompt that begins with their tokens goes on from them.

        Raises:
            EngineRefusedError: the state belongs to another model or other KV types.
        """
        body = {"tokens": list(state.tokens)}
        self._watcher.call("restore_state", body, state.data, doing="restoring a sequence")

    # -- requests

    def generate(self, request: GenerateRequest) -> Iterator[GenerateEvent]:
        """Run a request. The last event is its one `DoneEvent`; leaving early cancels it.

        The request is submitted now, not at the first `next`.

        Raises:
            ContextLengthError: the prompt does not fit in n_ctx; nothing was fed.
            UsageError: a parameter is out of range, or the JSON schema cannot be used.
            EngineError: no model is open, or the worker is gone already.
        """
        self._check_prompt(request)
        events = self._watcher.open_stream(request)
        return self._events(request.request_id, events)

    def start_request(self, request: GenerateRequest, sink: Sink) -> None:
        """Run a request among others; its events go to `sink`, which must not wait or raise.

        The last one is its one DoneEvent, or the error with which the worker refused it.

        Raises:
            ContextLengthError: the prompt does not fit in n_ctx; nothing was fed.
            UsageError: a parameter is out of range, or the JSON schema cannot be used.
            EngineError: no model is open, or the worker is gone already.
        """
        self._check_prompt(request)
        self._watcher.submit(request, sink)

    def _check_prompt(self, request: GenerateRequest) -> None:
        loaded = self._open_model()
        if loaded.pooling is not None:
            raise UsageError(f"the model was opened for embeddings ({loaded.pooling}), not text")
        n_prompt = len(request.prompt)
        if n_prompt == 0 or n_prompt >= loaded.n_ctx_seq:
            raise context_length_error(n_prompt, loaded.n_ctx_seq)
        check_request(request, loaded)

    def _events(
        self, request_id: str, events: "queue.SimpleQueue[GenerateEvent | LoadmasterError]"
    ) -> Iterator[GenerateEvent]:
        done = False
        try:
            while not done:
                event = events.get()
                done = isinstance(event, DoneEvent | LoadmasterError)
                if isinstance(event, LoadmasterError):
                    raise event
                yield event
        finally:
            if not done:
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """End a request; its `DoneEvent` says `cancelled`. Unknown and ended ones are ignored."""
        if self._watcher.exchange.failure is None:
            self._watcher.send({"kind": "cancel", "request_id": request_id}, quiet=True)

    def close(self) -> None:
        """End the worker, whatever it is doing. Idempotent; open requests end as failed."""
        self._watcher.close()


def _fill(
    known: Mapping[str, Bytes | None], driver: Mapping[str, Bytes]
) -> dict[str, Bytes | None]:
    return {key: driver.get(key) if value is None else value for key, value in known.items()}


def _decode(cls: Any, value: object) -> Any:
    """A reply of the worker, checked like any input."""
    try:
        return from_json(cls, value)
    except SchemaError as error:
        raise EngineError(f"the worker sent a malformed reply: {error}") from None
