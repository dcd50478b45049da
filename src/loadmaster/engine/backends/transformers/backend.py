"""The `Backend` of transformers and bitsandbytes."""

import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loadmaster.engine.backends.grammar import Grammars
from loadmaster.engine.backends.transformers import attention, cuda
from loadmaster.engine.backends.transformers.drafter import Drafter
from loadmaster.engine.backends.transformers.opened import OpenModel, filler
from loadmaster.engine.backends.transformers.samplers import Samplers
from loadmaster.engine.backends.transformers.sizer import size_of
from loadmaster.engine.backends.transformers.vocabulary import Vocabulary
from loadmaster.engine.backends.transformers.weights import check_settings, load_weights
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
)
from loadmaster.errors import EngineError, EngineRefusedError, UsageError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_source import checkpoint_folder, read_checkpoint
from loadmaster.plan.types import AnySettings, Sizing, SizingFailure, TransformersSettings


class _LoadStopped(BaseException):
    """Not an Exception: transformers collects those of its loading and goes on."""


class Transformers:
    """At most one open model."""

    name = "transformers"

    def __init__(self) -> None:
        self._stop_load = False
        self._open: OpenModel | None = None
        self._vocabulary: Vocabulary | None = None
        self._samplers: Samplers | None = None
        self._grammars: Grammars | None = None
        self._draft_model: OpenModel | None = None
        self._drafter: Drafter | None = None
        self._used: tuple[str, ...] = ()

    # -- before a model is open

    def devices(self) -> tuple[DeviceFacts, ...]:
        return cuda.devices()

    def size(self, model_path: Path, settings: AnySettings) -> Sizing | SizingFailure:
        if not isinstance(settings, TransformersSettings):
            return SizingFailure(reason="the settings are another engine's")
        return size_of(model_path, settings)

    def time(self, question: Question) -> tuple[float, ...] | None:
        """It has no kernels of its own to time."""
        return None

    def open_vocabulary(self, model_path: Path) -> LoadedModel:
        self._vocabulary = Vocabulary(checkpoint_folder(model_path))
        return self._vocabulary.describe()

    def load(self, request: LoadRequest, progress: Callable[[float], bool]) -> LoadedModel:
        settings = request.settings
        if not isinstance(settings, TransformersSettings):
            raise EngineRefusedError("the plan is for another engine")
        started = time.monotonic()
        self.resume()
        model = read_checkpoint(request.model_path)
        check_settings(model, settings)
        torch.set_num_threads(settings.n_threads)
        cuda.cap(request.device_caps)
        maps = [settings.device_map]
        if request.draft is not None and isinstance(request.draft.settings, TransformersSettings):
            maps.append(request.draft.settings.device_map)
        self._used = tuple(sorted({device for one in maps for _, device in one}))
        vocabulary = self._vocabulary = Vocabulary(model.folder)
        if request.draft is not None:
            self._draft_model = self._open_draft(request.draft, progress)
        self._open = opened = self._load(model, settings, progress)
        if self._draft_model is not None:
            self._drafter = Drafter(self._draft_model, opened.n_vocab)
        self._grammars = Grammars(lambda: vocabulary.grammar_tokenizer(opened.n_vocab))
        self._samplers = Samplers(self._grammars, vocabulary.piece, opened.n_ctx_seq)
        _trim()
        return vocabulary.describe(
            n_ctx=opened.n_ctx_seq * opened.n_seq_max,
            n_ctx_seq=opened.n_ctx_seq,
            n_vocab=opened.n_vocab,
            load_s=time.monotonic() - started,
        )

    def _load(
        self,
        model: CheckpointSpec,
        settings: TransformersSettings,
        progress: Callable[[float], bool],
        name: str = attention.NAME,
    ) -> OpenModel:
        n_read = 0

        def watch(n_bytes: int) -> None:
            nonlocal n_read
            n_read += n_bytes
            if not progress(min(1.0, n_read / max(1, model.file_bytes))) or self._stop_load:
                raise _LoadStopped

        try:
            return OpenModel(load_weights(model, settings, watch), model, settings, name)
        except _LoadStopped:
            raise EngineRefusedError(f"the load of `{model.name}` was stopped") from None
        except (RuntimeError, MemoryError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise EngineRefusedError(f"the engine cannot load `{model.name}`: {reason}") from None

    def _open_draft(self, draft: DraftLoad, progress: Callable[[float], bool]) -> OpenModel:
        settings = draft.settings
        if not isinstance(settings, TransformersSettings):
            raise EngineRefusedError("the draft's plan is for another engine")
        model = read_checkpoint(draft.model_path)
        check_settings(model, settings)
        return self._load(model, settings, progress, attention.DRAFT_NAME)

    def interrupt(self) -> None:
        self._stop_load = True
        if self._open is not None:
            self._open.cut(now=True)

    def resume(self) -> None:
        self._stop_load = False
        if self._open is not None:
            self._open.cut(now=False)

    # -- an open model

    @property
    def _model(self) -> OpenModel:
        if self._open is None:
            raise EngineError("no model is open")
        return self._open

    @property
    def _words(self) -> Vocabulary:
        if self._vocabulary is None:
            raise EngineError("no model is open")
        return self._vocabulary

    @property
    def _sampling(self) -> Samplers:
        if self._samplers is None:
            raise EngineError("no model is open")
        return self._samplers

    def capabilities(self) -> Capabilities:
        """Cells are shared by copying them: what is saved is the feeding, not the memory."""
        has_rings = self._model.slots.ring is not None
        return Capabilities(
            n_seq_max=self._model.n_seq_max,
            shared_prefix=True,
            partial_removal=True,
            state_save=True,
            shared_at_end=has_rings,
            partial_state=not has_rings,
            drafts=not has_rings,  # a ring's new tokens take the places of those that a cut needs
        )

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._words.tokenize(text, add_special, parse_special)

    def token_bytes(self, token: int) -> bytes:
        return self._words.piece(token)

    def is_eog(self, token: int) -> bool:
        return token in self._words.ends

    def special_text(self, token: int) -> bytes:
        return self._words.piece(token, special=True)

    def check_schema(self, schema: str) -> None:
        if self._grammars is None:
            raise EngineError("no model is open")
        self._grammars.check(schema)

    def start_sequence(
        self,
        seq_id: int,
        sampling: SamplingParams,
        recent: Sequence[int] = (),
        rules: OutputRules = FREE_TEXT,
    ) -> None:
        self._sampling.start(seq_id, sampling, recent, rules)

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        done = self._model.step(work)
        if done is None:
            return StepResult(tokens={}, cut=True)
        packed, logits = done
        drafts = {part.seq_id: part.tokens[-part.n_draft :] for part in work if part.n_draft}
        if drafts:
            return self._sampling.check(logits, packed.outputs, drafts)
        return self._sampling.choose(logits, packed.outputs)

    def decode_run(
        self, first: SequenceWork, n_max: int, go_on: Callable[[], bool], *, stop_at_eog: bool
    ) -> RunResult:
        work, tokens = first, list[int]()
        while True:
            result = self.step([work])
            if result.cut:
                return RunResult(tokens=tokens, cut=True)
            token = result.tokens[first.seq_id]
            tokens.append(token)
            ended = stop_at_eog and self.is_eog(token)
            if ended or len(tokens) >= n_max or not go_on():
                return RunResult(tokens=tokens)
            position = work.position + len(work.tokens)
            work = SequenceWork(
                seq_id=first.seq_id, tokens=(token,), position=position, sample=True
            )

    def draft(self, wanted: Sequence[DraftWanted]) -> Mapping[int, Sequence[int]]:
        return {} if self._drafter is None else self._drafter.guess(wanted)

    def remove(self, seq_id: int, start: int) -> bool:
        return self._model.slots.remove(seq_id, start)

    def share(self, source: int, seq_id: int, n: int) -> bool:
        return self._model.slots.share(source, seq_id, n)

    def move_sampler(self, seq_id: int, to: int) -> None:
        self._sampling.move(seq_id, to)

    def end_sequence(self, seq_id: int) -> None:
        self._sampling.free(seq_id)

    def save_state(self, seq_id: int) -> bytes:
        return self._model.slots.save(seq_id)

    def take_state(self, seq_id: int, start: int, limit_bytes: int) -> bytes | None:
        slots = self._model.slots
        fits = slots.state_bytes(start, slots.length(seq_id)) <= limit_bytes
        state = slots.save(seq_id, start) if fits else None
        slots.remove(seq_id, 0)
        return state

    def restore_state(self, seq_id: int, state: bytes, start: int = 0) -> None:
        self._model.slots.restore(seq_id, state, start)

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        raise UsageError(
            "the transformers engine makes no embeddings", hint="take a GGUF of the model"
        )

    def pair_tokens(self, query: str, document: str) -> list[int]:
        raise UsageError(
            "the transformers engine ranks no documents", hint="take a GGUF of the model"
        )

    def commit_peak(self, time_limit_s: float) -> None:
        """A chunk of n_ubatch tokens at the end of a slot, then a token of every full one."""
        opened = self._model
        last = opened.n_ctx_seq - 1
        n_chunk = min(opened.n_ubatch, last)
        timer = threading.Timer(max(0.1, time_limit_s), self.interrupt)
        timer.start()
        try:
            opened.step([filler(0, n_chunk, last - n_chunk)])
        finally:
            timer.cancel()
            timer.join()
            self.resume()
        opened.step([filler(slot, 1, last) for slot in range(opened.n_seq_max)])
        opened.slots.clear()

    def memory(self) -> MemoryReport:
        process = process_memory()
        unknown: dict[str, Any] = {device: None for device in self._used if device != "cpu"}
        return MemoryReport(
            buffers=self._open.buffers() if self._open else (),
            process_bytes=process.own_bytes,
            process_peak_bytes=process.own_bytes,
            mapped_bytes=process.mapped_bytes,
            device_used_bytes=unknown,  # the driver says
            device_peak_bytes=dict(unknown),
            device_denied={},
            draft_buffers=self._draft_model.buffers() if self._draft_model else (),
        )

    def close(self) -> None:
        self._samplers = None
        self._grammars = None
        self._drafter = None
        if self._draft_model is not None:
            self._draft_model.close()
            self._draft_model = None
        if self._open is not None:
            self._open.close()
            self._open = None
        _trim()


def _trim() -> None:
    """Give freed memory back to the kernel, where the C library can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
