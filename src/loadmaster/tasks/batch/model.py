"""The model of a running job: what the executor asks of it, and the open session behind that."""

from collections.abc import Sequence
from typing import Protocol

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import LoadmasterError
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.template import ChatMessage

Messages = tuple[ChatMessage, ...]
Vectors = list[list[float]]


class BatchModel(Protocol):
    """A model that can be opened, lost, and opened again."""

    name: str  # as answers have it

    @property
    def n_ctx(self) -> int:
        """Tokens of one request, prompt and answer."""

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
        n_ctx = self.opened.session.n_ctx
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
