"""The `Backend` of transformers and bitsandbytes."""

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loadmaster.engine.backends.grammar import Grammars
from loadmaster.engine.backends.transformers import attention, cuda, timing
from loadmaster.engine.backends.transformers.drafter import Drafter
from loadmaster.engine.backends.transformers.environment import keep_scratch, trim
from loadmaster.engine.backends.transformers.kept import TYPES
from loadmaster.engine.backends.transformers.kernels import attention_text
from loadmaster.engine.backends.transformers.opened import OpenModel, filler
from loadmaster.engine.backends.transformers.samplers import Samplers
from loadmaster.engine.backends.transformers.sizer import size_of
from loadmaster.engine.backends.transformers.vectors import VectorModel
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
from loadmaster.errors import EngineError, EngineRefusedError, LoadmasterError, UsageError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_source import checkpoint_folder, read_checkpoint
from loadmaster.plan.types import AnySettings, Sizing, SizingFailure, TransformersSettings

# Tokens of prompts and answers that make a job large: after fewer, what is kept is used again soon.
FLUSH_TOKENS = 1 << 13


class _LoadStopped(BaseException):
    """Not an Exception: transformers collects those of its loading and goes on."""


class Transformers:
    """At most one open model."""

    name = "transformers"

    def __init__(self) -> None:
        cuda.prefer_flash()
        self._stop_load = False
        self._open: OpenModel | VectorModel | None = None
        self._vocabulary: Vocabulary | None = None
        self._samplers: Samplers | None = None
        self._grammars: Grammars | None = None
        self._draft_model: OpenModel | None = None
        self._drafter: Drafter | None = None
        self._used: tuple[str, ...] = ()
        self._n_fed = 0  # tokens since the last flush

    # -- before a model is open

    def devices(self) -> tuple[DeviceFacts, ...]:
        return cuda.devices()

    def size(self, model_path: Path, settings: AnySettings) -> Sizing | SizingFailure:
        if not isinstance(settings, TransformersSettings):
            return SizingFailure(reason="the settings are another engine's")
        return size_of(model_path, settings)

    def time(self, question: Question) -> tuple[float, ...] | None:
        opened = self._open if isinstance(self._open, OpenModel) else None
        return timing.answer(question, opened)

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
        maps = [settings.device_map]
        if request.draft is not None and isinstance(request.draft.settings, TransformersSettings):
            maps.append(request.draft.settings.device_map)
        self._used = tuple(sorted({device for one in maps for _, device in one}))
        cuda.check_present(self._used)
        cuda.cap(request.device_caps)
        try:
            told = self._opened(request, model, settings, progress)
        except LoadmasterError as error:
            # Its frames hold what was loaded, and so does what it came of.
            refusal = error.with_traceback(None)
            refusal.__context__ = None
        else:
            return self._words.describe(**told, load_s=time.monotonic() - started)
        self.close()
        raise refusal

    def _opened(
        self,
        request: LoadRequest,
        model: CheckpointSpec,
        settings: TransformersSettings,
        progress: Callable[[float], bool],
    ) -> dict[str, Any]:
        """Open the model, and its draft before it; what is told of them."""
        vocabulary = self._vocabulary = Vocabulary(model.folder)
        if request.draft is not None:
            self._draft_model = self._open_draft(request.draft, progress)
        self._open = opened = self._load(model, settings, progress)
        told = self._told(opened, vocabulary, model)
        trim()
        told["attention"] = attention_text(
            model,
            opened.device,
            TYPES[settings.compute_type],
            plain=settings.attention == "eager",
        )
        return told

    def _told(
        self, opened: OpenModel | VectorModel, vocabulary: Vocabulary, model: CheckpointSpec
    ) -> dict[str, Any]:
        """What is told of the open model; one that writes text also gets its samplers."""
        if isinstance(opened, VectorModel):
            n_ubatch = opened.n_ubatch
            return {"n_ctx": n_ubatch, "n_ctx_seq": n_ubatch, "n_vocab": opened.n_vocab,
                    "pooling": opened.pooling, "n_embd": model.n_embd,
                    "n_embed_max": n_ubatch}  # fmt: skip
        if self._draft_model is not None:
            self._drafter = Drafter(self._draft_model, opened.n_vocab)
        self._grammars = Grammars(lambda: vocabulary.grammar_tokenizer(opened.n_vocab))
        self._samplers = Samplers(self._grammars, vocabulary.piece, opened.n_ctx_seq)
        n_ctx = opened.n_ctx_seq * opened.n_seq_max
        return {"n_ctx": n_ctx, "n_ctx_seq": opened.n_ctx_seq, "n_vocab": opened.n_vocab}

    def _load(
        self,
        model: CheckpointSpec,
        settings: TransformersSettings,
        progress: Callable[[float], bool],
        name: str = attention.NAME,
    ) -> OpenModel | VectorModel:
        n_read = 0

        def watch(n_bytes: int) -> None:
            nonlocal n_read
            n_read += n_bytes
            if not progress(min(1.0, n_read / max(1, model.file_bytes))) or self._stop_load:
                raise _LoadStopped

        keep_scratch()
        try:
            weights = load_weights(model, settings, watch)
            if settings.pooling is not None:
                return VectorModel(weights, model, settings, settings.pooling)
            return OpenModel(weights, model, settings, name)
        except _LoadStopped:
            raise EngineRefusedError(f"the load of `{model.name}` was stopped") from None
        except (RuntimeError, MemoryError, ValueError, ImportError) as error:
            raise EngineRefusedError(
                f"the engine cannot load `{model.name}`: {cuda.words_of(error)}",
                hint=cuda.hint_of(error),
            ) from None

    def _open_draft(self, draft: DraftLoad, progress: Callable[[float], bool]) -> OpenModel:
        settings = draft.settings
        if not isinstance(settings, TransformersSettings):
            raise EngineRefusedError("the draft's plan is for another engine")
        model = read_checkpoint(draft.model_path)
        check_settings(model, settings)
        opened = self._load(model, settings, progress, attention.DRAFT_NAME)
        assert isinstance(opened, OpenModel)  # planned to write text
        return opened

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
        if not isinstance(self._open, OpenModel):
            raise EngineError("no model is open that writes text")
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
        if isinstance(self._open, VectorModel):
            return Capabilities(
                n_seq_max=self._open.n_seq_max,
                shared_prefix=False,
                partial_removal=False,
                state_save=False,
            )
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
        self._n_fed += len(packed.tokens)
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
        if not isinstance(self._open, VectorModel):
            raise EngineError("no model is open that makes vectors")
        self._n_fed += sum(map(len, prompts))
        return self._open.embed(prompts)

    def pair_tokens(self, query: str, document: str) -> list[int]:
        raise UsageError(
            "the transformers engine ranks no documents", hint="take a GGUF of the model"
        )

    def commit_peak(self, time_limit_s: float) -> None:
        """A chunk of n_ubatch tokens at the end of a slot, then a token of every full one; or the
        longest prompt."""
        opened = self._open
        timer = threading.Timer(max(0.1, time_limit_s), self.interrupt)
        timer.start()
        try:
            if isinstance(opened, VectorModel):
                opened.commit_peak()
                return
            last = self._model.n_ctx_seq - 1
            n_chunk = min(self._model.n_ubatch, last)
            self._model.step([filler(0, n_chunk, last - n_chunk)])
        finally:
            timer.cancel()
            timer.join()
            self.resume()
        self._model.step([filler(slot, 1, last) for slot in range(self._model.n_seq_max)])
        self._model.slots.clear()

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

    def flush(self) -> None:
        """What torch and the C library keep of freed tensors goes back, after a large job."""
        if self._n_fed >= FLUSH_TOKENS:
            self._n_fed = 0
            gc.collect()
            cuda.release()
            trim()

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
        trim()
