"""An open model under a plan: loaded, proved against the plan, ready to answer.

Opening ends in one of two ways: the engine's buffers equal the plan and the process totals are
inside the caps, or nothing is left running.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import (
    DoneEvent,
    DraftLoad,
    GenerateEvent,
    GenerateRequest,
    LoadedModel,
    LoadRequest,
    MemoryReport,
    PrefillEvent,
    SamplingParams,
)
from loadmaster.errors import (
    ContextLengthError,
    EngineError,
    EngineRefusedError,
    LoadmasterError,
    OverBudgetError,
)
from loadmaster.plan.types import CPU, DoesNotFit, DraftModel, MemoryItem, Plan
from loadmaster.tasks.measurement import MemoryRow, compare, excess_by_device
from loadmaster.tasks.progress import Progress
from loadmaster.units import MIB, Bytes, format_size

MAX_ATTEMPTS = 3
# What a plan gives up on every device when the engine refused an allocation and named no figure.
REFUSED_STEP_BYTES = Bytes(256 * MIB)

Replan = Callable[[dict[str, Bytes], str], Plan | DoesNotFit]


class OpenEngine(Protocol):
    """What a session asks of `loadmaster.engine.process.Engine`."""

    @property
    def failure(self) -> LoadmasterError | None:
        """Why the worker is no more."""

    def load(
        self,
        request: LoadRequest,
        on_progress: Callable[[float], bool | None] | None = None,
        *,
        files: Sequence[Path] = (),
    ) -> LoadedModel:
        """Open the model."""

    def commit_peak(self) -> MemoryReport:
        """Touch the worst case."""

    def memory(self) -> MemoryReport:
        """Measure the worker now."""

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Text to tokens."""

    def tokenize_many(
        self, texts: Sequence[tuple[str, bool]], parse_special: bool = False
    ) -> list[list[int]]:
        """Each text's tokens; the flag beside it is `add_special`."""

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Tokens to text, control tokens as the texts that stand for them."""

    def embed(
        self, prompts: Sequence[Sequence[int]], *, normalize: bool = True
    ) -> list[list[float]]:
        """A vector for each prompt, of a model opened with a pooling."""

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        """How well each document answers the query, of a model opened for ranks."""

    def generate(self, request: GenerateRequest) -> Iterator[GenerateEvent]:
        """Events of one request, a DoneEvent last; leaving early cancels it."""

    def start_request(self, request: GenerateRequest, sink: Sink) -> None:
        """Events of one request to `sink`, on another thread; a DoneEvent or an error last."""

    def cancel(self, request_id: str) -> None:
        """End a request early."""

    def limit_steps(self, deadline_s: float) -> None:
        """A step, or a call, that takes longer ends the worker."""

    def give_up(self, error: LoadmasterError) -> None:
        """Have the worker killed; whatever is open ends with `error`."""

    def log_tail(self) -> tuple[str, ...]:
        """The engine's last log lines."""

    def close(self) -> None:
        """Stop the worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How a session comes by its parts; a test passes its own."""

    start_engine: Callable[[Plan], OpenEngine]
    parent_bytes: Callable[[], Bytes]  # our own process and its helpers, inside the RAM cap
    free_bytes: Callable[[str], Bytes | None]  # what a device has free now
    replan: Replan | None  # None: this very plan or none


class Session:
    """One open model. `close` it, or use it as a context manager; one caller at a time."""

    def __init__(
        self, *, plan: Plan, engine: OpenEngine, loaded: LoadedModel, opening: Opening
    ) -> None:
        self.plan = plan
        self.loaded = loaded
        self._engine = engine
        self._opening = opening
        self._ids = itertools.count()
        self._running: str | None = None

    @property
    def engine(self) -> OpenEngine:
        """For those who run many requests at once; its life is the session's."""
        return self._engine

    @property
    def n_ctx(self) -> int:
        """Tokens that one conversation may fill."""
        return self.loaded.n_ctx_seq

    def memory(self) -> tuple[MemoryRow, ...]:
        """Planned beside measured, now."""
        return compare(self.plan, self._engine.memory(), parent_bytes=self._opening.parent_bytes())

    def tokens(self, prompt: str) -> tuple[int, ...]:
        """The prompt's tokens; a BOS token it starts with is not doubled by the engine's own."""
        special = self._adds_special(prompt)
        return tuple(self._engine.tokenize(prompt, add_special=special, parse_special=True))

    def tokens_of(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """The same for many prompts, in one call."""
        texts = [(prompt, self._adds_special(prompt)) for prompt in prompts]
        return [tuple(t) for t in self._engine.tokenize_many(texts, parse_special=True)]

    def _adds_special(self, prompt: str) -> bool:
        bos = self.loaded.bos_text
        return not (bool(bos) and prompt.startswith(bos))

    def generate(
        self,
        prompt: Sequence[int],
        *,
        sampling: SamplingParams,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        json_schema: str | None = None,
        progress: Progress | None = None,
    ) -> Generator[GenerateEvent, None, None]:
        """Events of one answer, a DoneEvent last. Closing the generator early cancels it.

        Raises:
            ContextLengthError: the prompt leaves no room in n_ctx; nothing was fed.
            EngineError: the worker failed; the session is of no more use.
        """
        self.check_length(len(prompt))
        request = GenerateRequest(
            request_id=f"r{next(self._ids)}",
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=tuple(stop),
            json_schema=json_schema,
        )
        return self._events(request, progress)

    def check_length(self, n_prompt: int) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises:
            ContextLengthError: with both numbers.
        """
        if n_prompt >= self.n_ctx:
            raise ContextLengthError(
                f"the prompt has {n_prompt} tokens, n_ctx is {self.n_ctx}",
                hint=f"`--ctx {n_prompt + 256}` or more makes room, if it fits; or shorten it",
                numbers={"n_prompt": n_prompt, "n_ctx": self.n_ctx},
            )

    def _events(
        self, request: GenerateRequest, progress: Progress | None
    ) -> Generator[GenerateEvent, None, None]:
        events = self._engine.generate(request)
        self._running = request.request_id
        done = False
        try:
            for event in events:
                done = isinstance(event, DoneEvent)
                if isinstance(event, PrefillEvent) and progress:
                    progress.prefill(event.n_done, event.n_prompt)
                self._raise_if_failed(event)
                yield event
        except EngineError as error:
            _add_log(error, self._engine)
            raise
        finally:
            self._running = None
            if not done:
                self._engine.cancel(request.request_id)
            if progress:
                progress.finish()

    def _raise_if_failed(self, event: GenerateEvent) -> None:
        if not isinstance(event, DoneEvent) or event.finish_reason != "failed":
            return
        raise self._engine.failure or EngineError(
            f"the engine failed after {event.n_generated} tokens: {event.error or 'no reason'}",
            hint="run it again; `--debug` shows more",
        )

    def cancel(self) -> None:
        """End the answer under way; its events end with a DoneEvent. From any thread."""
        if self._running is not None:
            self._engine.cancel(self._running)

    def close(self) -> None:
        """Stop the worker; its memory is free when this returns."""
        self._engine.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_session(plan: Plan, opening: Opening, progress: Progress) -> Session:
    """Load and prove `plan`; where the machine disagrees with it, take a smaller one.

    Raises:
        ModelChangedError: the file is another than the one planned.
        OverBudgetError, EngineRefusedError: no smaller plan was left to try.
        EngineError: the worker died.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            _check_free(plan, opening)
            return _load(plan, opening, progress)
        except (OverBudgetError, EngineRefusedError) as error:
            progress.finish()
            smaller = None if attempt == MAX_ATTEMPTS else _smaller(plan, opening, error)
            if smaller is None:
                raise
            progress.say(f"{error.message}; taking a smaller plan: {_difference(plan, smaller)}")
            plan = smaller
    raise AssertionError("unreachable")


def _load(plan: Plan, opening: Opening, progress: Progress) -> Session:
    engine = opening.start_engine(plan)
    try:
        files = tuple(map(Path, plan.model_files))
        loaded = engine.load(_request(plan, opening), progress.loading, files=files)
        engine.commit_peak()
        progress.finish()
        session = Session(plan=plan, engine=engine, loaded=loaded, opening=opening)
        _prove(session)
    except BaseException as error:
        progress.finish()
        _add_log(error, engine)
        engine.close()
        raise
    return session


def _add_log(error: BaseException, engine: OpenEngine) -> None:
    """Put the engine's last words beside the traceback that `--debug` shows."""
    if isinstance(error, EngineError):
        for line in engine.log_tail():
            error.add_note(f"engine: {line}")


def _request(plan: Plan, opening: Opening) -> LoadRequest:
    host = plan.device(CPU)
    cap = host.budget_bytes - opening.parent_bytes()
    return LoadRequest(
        model_path=Path(plan.model_files[0]),
        model_stamp=plan.model_stamp,
        settings=plan.engine,
        ram_cap_bytes=Bytes(max(0, cap)),
        state_bytes=host.of("cache"),
        device_caps=allocator_caps(plan),
        draft=None if plan.draft is None else _draft_load(plan.draft),
    )


def _draft_load(draft: DraftModel) -> DraftLoad:
    files = tuple(map(Path, draft.model_files))
    return DraftLoad(
        model_path=files[0], model_stamp=draft.model_stamp, files=files, settings=draft.engine
    )


def allocator_caps(plan: Plan) -> dict[str, Bytes]:
    """Of each GPU, its cap less the driver's context: what is left is the engine's to allocate."""
    return {
        device.id: Bytes(
            max(0, device.budget_bytes - sum(i.bytes for i in device.items if _is_context(i)))
        )
        for device in plan.devices
        if device.id != CPU
    }


def _is_context(item: MemoryItem) -> bool:
    return item.kind == "overhead" and item.why.endswith(" context")


def _prove(session: Session) -> None:
    excess = excess_by_device(session.memory())
    if not excess:
        return
    amounts = " and ".join(
        f"{format_size(size)} above the plan on {device}" for device, size in excess.items()
    )
    raise OverBudgetError(
        f"measured memory is {amounts}",
        hint="give it more with `--vram` or `--ram`, or take less with a smaller `--ctx`",
        numbers={f"excess_bytes.{device}": size for device, size in excess.items()},
    )


def _check_free(plan: Plan, opening: Opening) -> None:
    for device in plan.devices:
        free = opening.free_bytes(device.id)
        if free is not None and free < device.needed_bytes:
            raise OverBudgetError(
                f"{device.id} has {format_size(free)} free, the plan takes "
                f"{format_size(device.needed_bytes)}",
                hint="close what uses it, or lower `--vram` or `--ram`",
                numbers={f"excess_bytes.{device.id}": device.needed_bytes - free},
            )


def _smaller(plan: Plan, opening: Opening, error: EngineError) -> Plan | None:
    """A plan under caps lowered by what was too much; None when there is none."""
    if opening.replan is None:
        return None
    caps: dict[str, Bytes] = {}
    for device in plan.devices:
        excess = error.numbers.get(f"excess_bytes.{device.id}")
        if isinstance(excess, int):
            # The room that was left does not help again: what was planned was already too much.
            caps[device.id] = Bytes(max(0, device.needed_bytes - excess))
        elif isinstance(error, EngineRefusedError) and device.id != CPU:
            caps[device.id] = Bytes(max(0, device.needed_bytes - REFUSED_STEP_BYTES))
    if not caps:
        return None
    outcome = opening.replan(caps, "less what the last load took above its plan")
    return outcome if isinstance(outcome, Plan) else None


def _difference(before: Plan, after: Plan) -> str:
    changed = []
    for name in (field.name for field in fields(before.engine)):
        old, new = getattr(before.engine, name), getattr(after.engine, name)
        if old != new and name == "overrides":
            changed.append(f"{len(old)} → {len(new)} tensor overrides")
        elif old != new:
            changed.append(f"{name} {old} → {new}")
    return ", ".join(changed) or "the same settings under smaller caps"
