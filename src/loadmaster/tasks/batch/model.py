"""The model of a running job: what the executor asks of it, and the open session behind that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import LoadmasterError
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.template import ChatMessage

Messages = tuple[ChatMessage, ...]
Vectors = list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much of a job may be with the engine at once."""

    most_ahead: int  # requests beside those that run, for the scheduler to choose from
    chunk_items: int  # made ready in one call of the tokenizer
    chunk_cost: int  # tokens of such a chunk, roughly: of very long prompts it has fewer
    embed_inputs: int  # of one call
    embed_calls: int  # one under way, the others behind it


ALONE = Pace(most_ahead=32, chunk_items=32, chunk_cost=1 << 18, embed_inputs=64, embed_calls=2)
# Beside people, who wait while the worker tokenizes or embeds: little at a time.
SHARED = Pace(most_ahead=2, chunk_items=8, chunk_cost=1 << 13, embed_inputs=8, embed_calls=1)


class BatchModel(Protocol):
    """A model that can be opened, lost, and opened again."""

    name: str  # as answers have it
    pace: Pace

    @property
    def withheld(self) -> str | None:
        """Why the job may not have the model now; None while it may. What is in flight is given up
        then, and the model closed."""

    @property
    def n_ctx(self) -> int:
        """Tokens of one request, prompt and answer; of a model that was opened for embeddings,
        tokens of one input."""

    @property
    def n_vocab(self) -> int:
        """Tokens are smaller than this."""

    @property
    def n_sequences(self) -> int:
        """Requests that run at the same time."""

    @property
    def failure(self) -> LoadmasterError | None:
        """Why the worker is no more; None while it lives."""

    def render(self, messages: Messages) -> str:
        """A conversation as the text of a prompt.

        Raises:
            UsageError, DamagedFileError: the template refuses it, or cannot be used.
        """

    def tokens_of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokens of texts.

        Raises:
            EngineError: the worker is gone.
        """

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        """Begin a request beside others; see `Engine.start_request`."""

    def cancel(self, request_id: str) -> None:
        """End a request."""

    def embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        """A vector for each prompt. Waits.

        Raises:
            UsageError: the model gives no embeddings.
        """

    def reopen(self) -> None:
        """Open the model again, after its worker died or it was closed.

        Raises:
            LoadmasterError: it cannot be opened.
        """

    def close(self) -> None:
        """Give its memory back; `reopen` may follow."""


class OpenedModel:
    """A `BatchModel` on an open session."""

    pace = ALONE
    withheld = None

    def __init__(
        self, opened: Opened, name: str, progress: Progress, *, most_n_ctx: int | None = None
    ) -> None:
        """`most_n_ctx`: one request gets no more, though the cells of all were free."""
        self.opened = opened
        self.name = name
        self._progress = progress
        self._most_n_ctx = most_n_ctx

    @property
    def n_ctx(self) -> int:
        session = self.opened.session
        n_ctx = session.loaded.n_embed_max or session.n_ctx
        return n_ctx if self._most_n_ctx is None else min(n_ctx, self._most_n_ctx)

    @property
    def n_vocab(self) -> int:
        return self.opened.session.loaded.n_vocab

    @property
    def n_sequences(self) -> int:
        return self.opened.session.plan.engine.n_seq_max

    @property
    def failure(self) -> LoadmasterError | None:
        return self.opened.session.engine.failure

    def render(self, messages: Messages) -> str:
        loaded = self.opened.session.loaded
        return self.opened.template.render(
            messages, bos_text=loaded.bos_text, eos_text=loaded.eos_text
        )

    def tokens_of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return self.opened.session.tokens_of(texts)

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        self.opened.session.engine.start_request(request, sink)

    def cancel(self, request_id: str) -> None:
        self.opened.session.engine.cancel(request_id)

    def embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        return self.opened.session.engine.embed(prompts)

    def reopen(self) -> None:
        self.opened.restart(self._progress)

    def close(self) -> None:
        self.opened.session.close()
