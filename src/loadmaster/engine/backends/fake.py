"""A backend without a model, for tests: set speed, load time, memory and faults.

Everything it prints says that it is fake.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loadmaster.engine.backends.fake_spec import FAULTS, FakeSpec
from loadmaster.engine.backends.fake_speech import (
    END_TEXT,
    N_BYTES,
    N_EMBD,
    Speech,
    counts,
    likeness,
)
from loadmaster.engine.backends.grammar import Grammars, byte_tokenizer
from loadmaster.engine.backends.sampled import step_result
from loadmaster.engine.meter import process_memory
from loadmaster.engine.timing import Question, TimeLink, TimeProducts
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
from loadmaster.plan.types import (
    AnySettings,
    BufferSizes,
    EngineSettings,
    Sizing,
    SizingFailure,
)
from loadmaster.schema import from_json
from loadmaster.units import Bytes, align

_CELL_BYTES = 64
_PROGRESS_STEPS = 10
_N_SEQ_IDS = 64


class Fake:
    """A byte is a token; token 256 ends a generation. A sequence's answer starts at its seed."""

    name = "fake"

    def __init__(self, *, devices: Sequence[VirtualDevice], options: Mapping[str, object]) -> None:
        self._spec = from_json(FakeSpec, dict(options))
        self._devices = tuple(devices)
        self._answer = self._spec.answer.encode()
        self._cut = threading.Event()
        self._cells: dict[int, list[int]] = {}
        self._speeches: dict[int, Speech] = {}
        self._grammars = Grammars(byte_tokenizer)
        self._settings: AnySettings | None = None
        self._draft: DraftLoad | None = None
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

    def size(self, model_path: Path, settings: AnySettings) -> Sizing | SizingFailure:
        if self._spec.fail_load is not None:
            return SizingFailure(reason=self._spec.fail_load)
        return Sizing(buffers=self._buffers(model_path, settings), n_ctx=align(settings.n_ctx, 256))

    def _buffers(self, path: Path, settings: AnySettings) -> tuple[BufferSizes, ...]:
        """All on the first device that has layers, else on the host."""
        has_layers = isinstance(settings, EngineSettings) and settings.n_gpu_layers > 0
        on_gpu = has_layers and self._devices
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

    def open_vocabulary(self, model_path: Path) -> LoadedModel:
        return LoadedModel(
            n_ctx=0,
            n_ctx_seq=0,
            n_vocab=self._spec.n_vocab,
            load_s=0.0,
            eog_tokens=(N_BYTES,),
            bos_token=None,
            add_bos=False,
        )

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
        self._draft = request.draft
        n_ctx, pooling = align(request.settings.n_ctx, 256), request.settings.pooling
        return LoadedModel(
            n_ctx=n_ctx,
            n_ctx_seq=n_ctx,
            n_vocab=self._spec.n_vocab,
            load_s=self._spec.load_s,
            eog_tokens=(N_BYTES,),
            bos_token=None,
            add_bos=False,
            pooling=pooling,
            n_embd=0 if pooling is None else 1 if pooling == "rank" else N_EMBD,
            n_embed_max=0 if pooling is None else request.settings.n_ubatch,
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
            n_seq_ids=max(self._settings.n_seq_max, _N_SEQ_IDS),
            partial_state=True,
            drafts=True,
        )

    def commit_peak(self, time_limit_s: float) -> None:
        """There is nothing to commit."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < N_BYTES else b""

    def is_eog(self, token: int) -> bool:
        return token == N_BYTES

    def special_text(self, token: int) -> bytes:
        return self.token_bytes(token) if token < N_BYTES else END_TEXT

    def check_schema(self, schema: str) -> None:
        self._grammars.check(schema)

    def start_sequence(
        self,
        seq_id: int,
        sampling: SamplingParams,
        recent: Sequence[int] = (),
        rules: OutputRules = FREE_TEXT,
    ) -> None:
        schema = rules.json_schema
        self._speeches[seq_id] = Speech(
            answer=self._answer,
            seed=sampling.seed if sampling.temperature > 0 else 0,
            eog_after=self._spec.eog_after,
            n_top=rules.top_logprobs,
            constraint=None if schema is None else self._grammars.start(schema),
        )

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """How often the bytes of each prompt are congruent to 0 … 7; of a pair, its likeness."""
        self._n_steps += 1
        self._fault()
        rank = self._settings is not None and self._settings.pooling == "rank"
        return [[likeness(prompt)] if rank else counts(prompt) for prompt in prompts]

    def pair_tokens(self, query: str, document: str) -> list[int]:
        return [*query.encode(), N_BYTES, *document.encode()]

    def resume(self) -> None:
        self._cut.clear()

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        self._n_steps += 1
        self._fault()
        if self._cut.wait(self._duration(work)):
            return StepResult(tokens={}, cut=True)
        for part in work:
            cells = self._cells.setdefault(part.seq_id, [])
            if part.seq_id >= self.capabilities().n_seq_max:
                raise EngineError(f"the fake engine cannot run sequence {part.seq_id}")
            if part.position != len(cells):
                raise EngineError(f"the fake engine has {len(cells)} cells, not {part.position}")
            cells += part.tokens
            self._swallow(cells)
        speeches = {part.seq_id: self._speeches[part.seq_id] for part in work if part.sample}
        chosen = {
            part.seq_id: speeches[part.seq_id].follow(
                part.tokens[len(part.tokens) - part.n_draft :]
            )
            for part in work
            if part.sample
        }
        constraints = {seq_id: one.constraint for seq_id, one in speeches.items()}
        return step_result(chosen, constraints, [part.seq_id for part in work if part.n_draft])

    def decode_run(
        self, first: SequenceWork, n_max: int, go_on: Callable[[], bool], *, stop_at_eog: bool
    ) -> RunResult:
        tokens: list[int] = []
        fed = first.tokens
        while True:
            position = first.position + len(tokens)
            work = SequenceWork(seq_id=first.seq_id, tokens=fed, position=position, sample=True)
            stepped = self.step([work])
            if stepped.cut:
                return RunResult(tokens=tokens, cut=True)
            fed = (stepped.tokens[first.seq_id],)
            tokens += fed
            ended = stop_at_eog and self.is_eog(fed[0])
            if ended or len(tokens) >= n_max or not go_on():
                return RunResult(tokens=tokens)

    def draft(self, wanted: Sequence[DraftWanted]) -> Mapping[int, Sequence[int]]:
        return {one.seq_id: self._speeches[one.seq_id].ahead(one.n) for one in wanted}

    def _duration(self, work: Sequence[SequenceWork]) -> float:
        long = self._spec.step_s
        if long is not None and long.at_step == self._n_steps:
            return long.seconds
        n_prefill = sum(len(p.tokens) for p in work if len(p.tokens) > 1 + p.n_draft)
        seconds = n_prefill / self._spec.prefill_tok_s if self._spec.prefill_tok_s else 0.0
        return seconds + (1 / self._spec.tok_s if self._spec.tok_s else 0.0)

    def _swallow(self, cells: Sequence[int]) -> None:
        poison = self._spec.poison
        if poison is not None and poison.encode() in bytes(t for t in cells if t < N_BYTES):
            os.abort()

    def _fault(self) -> None:
        fault = self._spec.fault
        if fault is not None and fault.at_step == self._n_steps:
            FAULTS[fault.kind]()

    def remove(self, seq_id: int, start: int) -> bool:
        cells = self._cells.setdefault(seq_id, [])
        if start > len(cells):
            cells.clear()
            return False
        del cells[start:]
        return True

    def share(self, source: int, seq_id: int, n: int) -> bool:
        self._cells[seq_id] = self._cells.get(source, [])[:n]
        return len(self._cells[seq_id]) == n

    def move_sampler(self, seq_id: int, to: int) -> None:
        self._speeches[to] = self._speeches.pop(seq_id)

    def end_sequence(self, seq_id: int) -> None:
        self._speeches.pop(seq_id, None)

    def save_state(self, seq_id: int) -> bytes:
        return b"".join(token.to_bytes(4, "little") for token in self._cells.get(seq_id, []))

    def take_state(self, seq_id: int, start: int, limit_bytes: int) -> bytes | None:
        state = self.save_state(seq_id)[4 * start :]
        self._cells.pop(seq_id, None)
        return state if len(state) <= limit_bytes else None

    def restore_state(self, seq_id: int, state: bytes, start: int = 0) -> None:
        if len(state) % 4:
            raise EngineRefusedError(f"the fake engine refuses a state of {len(state)} bytes")
        cells = self._cells.setdefault(seq_id, [])
        cells[start:] = [
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
            draft_buffers=self._draft_buffers(),
        )

    def _draft_buffers(self) -> tuple[BufferSizes, ...]:
        draft = self._draft
        return () if draft is None else self._buffers(draft.model_path, draft.settings)

    def _used(self) -> dict[str, Bytes | None]:
        buffers = self._buffers(self._path, self._settings) if self._settings else ()
        sums: dict[str, Bytes] = {}
        for row in (*buffers, *self._draft_buffers()):
            taken = row.model_bytes + row.context_bytes + row.compute_bytes
            sums[row.device] = Bytes(sums.get(row.device, 0) + taken)
        return {
            device.id: Bytes(self._spec.over_budget.get(device.id, sums.get(device.id, Bytes(0))))
            for device in self._devices
        }

    def flush(self) -> None:
        """Its steps take nothing."""

    def close(self) -> None:
        self._cells.clear()
