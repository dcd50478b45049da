"""An open model under a plan: what it is asked, and its memory as measured beside planned."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import (
    DoneEvent,
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
    LoadmasterError,
)
from loadmaster.plan.types import DoesNotFit, Plan
from loadmaster.tasks.measurement import MemoryRow, compare
from loadmaster.tasks.progress import Progress
from loadmaster.units import Bytes

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
            add_log(error, self._engine)
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


def add_log(error: BaseException, engine: OpenEngine) -> None:
    """Put the engine's last words beside the traceback that `--debug` shows."""
    if isinstance(error, EngineError):
        for line in engine.log_tail():
            error.add_note(f"engine: {line}")
