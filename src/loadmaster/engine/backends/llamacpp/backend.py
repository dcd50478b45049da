"""The `Backend` of llama.cpp."""

import ctypes as c
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loadmaster.engine.backends.grammar import Grammars
from loadmaster.engine.backends.llamacpp.batch import Batch
from loadmaster.engine.backends.llamacpp.drafter import Drafter
from loadmaster.engine.backends.llamacpp.embed import embed
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.opened import OpenModel
from loadmaster.engine.backends.llamacpp.params import llamacpp_settings, model_params
from loadmaster.engine.backends.llamacpp.samplers import Samplers
from loadmaster.engine.backends.llamacpp.sizer import DryRuns
from loadmaster.engine.backends.llamacpp.timing import Timers
from loadmaster.engine.backends.llamacpp.vocabulary import Vocabulary
from loadmaster.engine.meter import process_memory
from loadmaster.engine.timing import Question
from loadmaster.engine.types import (
    FREE_TEXT,
    Capabilities,
    DeviceFacts,
    DraftLoad,
    DraftWanted,
    LoadedModel,
    LoadRequest,
    MemoryReport,
    OutputRules,
    RunResult,
    SamplingParams,
    SequenceWork,
    StepResult,
    VirtualDevice,
)
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.plan.types import AnySettings, EngineSettings, Sizing, SizingFailure
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
        self._vocabulary: Vocabulary | None = None
        self._samplers: Samplers | None = None
        self._draft_model: OpenModel | None = None
        self._drafter: Drafter | None = None
        self._pieces: dict[int, bytes] = {}
        # The engine polls a C function between operations. A Python callback would cost a
        # microsecond for each of hundreds of operations; `strlen` of one byte is "is it set?".
        self._cut = c.create_string_buffer(2)
        strlen = c.cast(self._api._lib.strlen, c.c_void_p).value
        self._abort = self._api.ggml_abort_callback(strlen)

    # -- before a model is open

    def devices(self) -> tuple[DeviceFacts, ...]:
        return tuple(self._library.facts(device) for device in self._library.devices)

    def size(self, model_path: Path, settings: AnySettings) -> Sizing | SizingFailure:
        return self._dry_runs.size(model_path, llamacpp_settings(settings))

    def time(self, question: Question) -> tuple[float, ...] | None:
        return Timers(self._library).time(question)

    def open_vocabulary(self, model_path: Path) -> LoadedModel:
        if self._vocabulary is not None:
            self._vocabulary.close()
        self._vocabulary = Vocabulary(self._library, model_path)
        return self._vocabulary.describe()

    def load(self, request: LoadRequest, progress: Callable[[float], bool]) -> LoadedModel:
        started = time.monotonic()
        settings = llamacpp_settings(request.settings)
        self._dry_runs.forget()
        if request.draft is not None:  # before the other: less is in memory while it is read
            self._draft_model = self._open_draft(request.draft, progress)
        model = self._load_model(request.model_path, settings, progress)
        self._open = opened = OpenModel(self._library, model, settings)
        opened.open_context()
        opened.apply_adapters()
        self._api.llama_set_abort_callback(opened.context, self._abort, c.addressof(self._cut))
        self._batch = Batch(self._api, opened.n_batch)
        self._one_cache = opened.capabilities().shared_prefix
        self._grammars = Grammars(opened.grammar_tokenizer)
        self._samplers = Samplers(self._library, opened, self._grammars, self.token_bytes)
        if self._draft_model is not None:
            self._drafter = Drafter(self._library, self._draft_model, opened.n_vocab)
        return opened.describe(time.monotonic() - started)

    def _open_draft(self, draft: DraftLoad, progress: Callable[[float], bool]) -> OpenModel:
        settings = llamacpp_settings(draft.settings)
        model = self._load_model(draft.model_path, settings, progress)
        opened = OpenModel(self._library, model, settings)
        opened.open_context()
        return opened

    def _load_model(
        self, model_path: Path, settings: EngineSettings, progress: Callable[[float], bool]
    ) -> int:
        self.resume()

        def on_progress(value: float, _: object) -> bool:
            return progress(value) and not self._stop_load

        callback = self._api.llama_progress_callback(on_progress)
        params = model_params(self._library, settings, dry_run=False, progress=callback)
        path = str(model_path).encode()
        model = self._api.llama_model_load_from_file(path, params.struct)
        if self._stop_load:
            raise EngineRefusedError(f"the load of `{model_path.name}` was stopped")
        if not model:
            raise EngineRefusedError(
                f"the engine cannot load `{model_path.name}`: {self._library.error()}"
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
        if self._open is None and self._vocabulary is not None:
            return self._vocabulary.tokenize(text, add_special, parse_special)
        return self._model.tokenize(text, add_special, parse_special)

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._model.piece(token)
        return piece

    def is_eog(self, token: int) -> bool:
        return token in self._model.eog

    def special_text(self, token: int) -> bytes:
        return self._model.piece(token, special=True)

    def check_schema(self, schema: str) -> None:
        self._grammars.check(schema)

    def start_sequence(
        self,
        seq_id: int,
        sampling: SamplingParams,
        recent: Sequence[int] = (),
        rules: OutputRules = FREE_TEXT,
    ) -> None:
        self._sampling.start(seq_id, sampling, recent, rules)

    @property
    def _sampling(self) -> Samplers:
        if self._samplers is None:
            raise EngineError("no model is open")
        return self._samplers

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        context = self._model.context
        if not self._one_cache:
            # The engine takes sequences into one pass only as long as each id follows the last
            # (llama_batch_allocr::split_equal).
            work = sorted(work, key=lambda part: part.seq_id)
        outputs = self._batch.fill(work)
        status = self._api.llama_decode(context, self._batch.struct)
        if status == _NO_SLOT:
            return StepResult(tokens={}, no_room=True)
        if status == _ABORTED:
            return StepResult(tokens={}, cut=True)
        if status != 0:
            raise self._step_error(status)
        if self._batch.drafts:
            return self._sampling.check(outputs, self._batch.drafts)
        return self._sampling.choose(outputs)

    def decode_run(
        self, first: SequenceWork, n_max: int, go_on: Callable[[], bool], *, stop_at_eog: bool
    ) -> RunResult:
        """The inner loop of a lone sequence: between two steps there is as little as can be."""
        context, batch, write = self._model.context, self._batch.struct, self._batch.write_one
        decode, sample = self._api.llama_decode, self._api.llama_sampler_sample
        sampler = self._sampling.chain(first.seq_id)
        ends = self._model.eog if stop_at_eog else frozenset()
        token, position = first.tokens[0], first.position
        tokens: list[int] = []
        self._batch.fill([first])
        while True:
            status = decode(context, batch)
            if status != 0:
                return self._cut_run(status, tokens)
            token = sample(sampler, context, 0)
            tokens.append(token)
            if token in ends or len(tokens) >= n_max or not go_on():
                return RunResult(tokens=tokens)
            position += 1
            write(token, position)

    def _cut_run(self, status: int, tokens: list[int]) -> RunResult:
        if status == _ABORTED:
            return RunResult(tokens=tokens, cut=True)
        if status == _NO_SLOT:  # after some tokens: as if `go_on` had said no
            return RunResult(tokens=tokens, no_room=not tokens)
        raise self._step_error(status)

    def draft(self, wanted: Sequence[DraftWanted]) -> Mapping[int, Sequence[int]]:
        return {} if self._drafter is None else self._drafter.guess(wanted)

    def _step_error(self, status: int) -> EngineError:
        return EngineError(f"the engine failed a step ({status}): {self._library.error()}")

    def remove(self, seq_id: int, start: int) -> bool:
        return self._model.remove(seq_id, start)

    def share(self, source: int, seq_id: int, n: int) -> bool:
        return self._model.share(source, seq_id, n)

    def move_sampler(self, seq_id: int, to: int) -> None:
        self._sampling.move(seq_id, to)

    def end_sequence(self, seq_id: int) -> None:
        self._sampling.free(seq_id)

    def save_state(self, seq_id: int) -> bytes:
        return self._model.save_state(seq_id)

    def take_state(self, seq_id: int, start: int, limit_bytes: int) -> bytes | None:
        return self._model.take_state(seq_id, start, limit_bytes)

    def restore_state(self, seq_id: int, state: bytes, start: int = 0) -> None:
        self._model.restore_state(seq_id, state, start)

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        return embed(self._library, self._model, self._batch, prompts)

    def pair_tokens(self, query: str, document: str) -> list[int]:
        return self._model.pair_tokens(query, document)

    def commit_peak(self, time_limit_s: float) -> None:
        opened = self._model
        if opened.pooling is not None:
            self.embed([(opened.filler_token,) * opened.n_ubatch])
            return
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
        self._sampling.free(0)

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
            draft_buffers=self._draft_model.buffers() if self._draft_model else (),
        )

    def flush(self) -> None:
        """Its buffers are those of the plan, and are made once."""

    def close(self) -> None:
        if self._samplers is not None:
            self._samplers.free_all()
            self._samplers = None
        self._dry_runs.forget()
        if self._vocabulary is not None:
            self._vocabulary.close()
            self._vocabulary = None
        if self._drafter is not None:
            self._drafter.close()
        elif self._draft_model is not None:
            self._draft_model.close()
        self._drafter = self._draft_model = None
        if self._open is not None:
            self._open.close()
            self._open = None
