"""What runs next: a job's items in their order, made ready ahead of their turn.

Templates and the tokenizer run on a thread of their own, a chunk at a time, so that the executor
never waits for them; no more is made ready than the engine takes soon.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from loadmaster.errors import (
    ContextLengthError,
    EngineCrashedError,
    EngineError,
    LoadmasterError,
)
from loadmaster.jobs.types import Item
from loadmaster.tasks.api.openai_requests import (
    BadFieldError,
    ChatRequest,
    EmbeddingRequest,
    OpenAIRequest,
    Prompt,
    parse_request,
)
from loadmaster.tasks.batch.flights import DEATHS_TO_FAIL
from loadmaster.tasks.batch.items import Ready, Refused
from loadmaster.tasks.batch.model import BatchModel


class Supply:
    """Items on their way from the store to the engine. One thread calls it."""

    def __init__(
        self,
        items: Iterator[Item],
        model: BatchModel,
        *,
        n_ahead: int,
        on_ready: Callable[[], None],
        only: Collection[int] | None = None,
    ) -> None:
        """`on_ready` is called from another thread when `collect` has something to give."""
        self._items = items
        self._model = model
        self._n_ahead = n_ahead
        self._on_ready = on_ready
        self._only = only
        self._ended = False
        self._again: deque[Item] = deque()  # read already, to be made ready one by one
        self._deaths: Counter[int] = Counter()  # of workers, while an item was made ready
        self._guilty: list[Refused] = []
        self._ready: deque[Ready] = deque()
        self._suspects: deque[Ready] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch-prepare")
        self._job: Future[list[Ready | Refused]] | None = None
        self._chunk: list[Item] = []
        self._alone = False  # the chunk is one of `_again`

    def close(self) -> None:
        """Stop making ready; what was is forgotten. Waits for the chunk under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to give, now or later."""
        return (
            self._ended and self._job is None and not (self._again or self._ready or self._suspects)
        )

    # -- giving

    def next(self) -> Ready | None:
        """The next item that may run beside others, if one is ready."""
        self._prepare_more()
        return self._ready.popleft() if self._ready else None

    def next_suspect(self) -> Ready | None:
        """The next item that must run alone."""
        return self._suspects.popleft() if self._suspects else None

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    def put_back(self, ready: Ready) -> None:
        """Give an item again, before all others of its kind."""
        (self._suspects if ready.alone else self._ready).appendleft(ready)

    def release_suspects(self) -> None:
        """Another one has been found guilty: the rest may run beside others."""
        while self._suspects:
            ready = self._suspects.pop()
            item = replace(ready.item, deaths=0)
            self._ready.appendleft(replace(ready, item=item, alone=False))

    # -- making ready

    @property
    def is_careful(self) -> bool:
        """A worker died over a chunk: each item of it is made ready by itself, and nothing runs."""
        return bool(self._again) or (self._job is not None and self._alone)

    def prepare_one(self) -> None:
        """Make the next item of such a chunk ready, by itself."""
        if self._job is None and self._again:
            self._prepare([self._again.popleft()], alone=True)

    def _prepare_more(self) -> None:
        if self._job is not None or len(self._ready) >= self._n_ahead:
            return
        if chunk := self._next_chunk():
            self._prepare(chunk, alone=False)

    def _prepare(self, chunk: list[Item], *, alone: bool) -> None:
        self._chunk, self._alone = chunk, alone
        self._job = self._pool.submit(prepare, chunk, self._model)
        self._job.add_done_callback(lambda _: self._on_ready())

    def _lost_chunk(self, death: EngineError) -> None:
        """The worker died over it, or was closed."""
        if self._model.failure is not None:
            self._deaths.update(item.number for item in self._chunk)
        item, *_ = self._chunk
        if self._alone and (n_deaths := self._deaths[item.number]) >= DEATHS_TO_FAIL:
            reason = f"{n_deaths} workers died over its prompt: {death.message}"
            self._guilty.append(Refused(item=item, error=EngineCrashedError(reason)))
        else:
            self._again.extend(self._chunk)

    def take_guilty(self) -> list[Refused]:
        """Items that killed workers while they were made ready, the last time alone."""
        guilty, self._guilty = self._guilty, []
        return guilty

    def _next_chunk(self) -> list[Item]:
        chunk: list[Item] = []
        cost, pace = 0, self._model.pace
        while (
            len(chunk) < pace.chunk_items and cost < pace.chunk_cost and (item := self._next_item())
        ):
            chunk.append(item)
            cost += item.cost
        return chunk

    def _next_item(self) -> Item | None:
        for item in self._items:
            if self._only is None or item.number in self._only:
                return item
        self._ended = True
        return None

    def settle(self) -> None:
        """Wait for the chunk under way. If the worker died over it, it will be made ready again."""
        if self._job is None:
            return
        wait([self._job])
        if isinstance(error := self._job.exception(), EngineError):
            self._job = None
            self._lost_chunk(error)

    def collect(self) -> list[Refused]:
        """Take over what has been made ready; the items that cannot be run are returned.

        Raises:
            EngineError: the worker died over it; its items will be made ready again.
        """
        if self._job is None or not self._job.done():
            return []
        job, self._job = self._job, None
        try:
            prepared = job.result()
        except EngineError as error:
            self._lost_chunk(error)
            raise
        refused: list[Refused] = []
        for entry in prepared:
            if isinstance(entry, Refused):
                refused.append(entry)
            else:
                (self._suspects if entry.alone else self._ready).append(entry)
        return refused


# -- on the other thread


def prepare(items: list[Item], model: BatchModel) -> list[Ready | Refused]:
    """Render and tokenize a chunk; one call of the tokenizer for all of it.

    Raises:
        EngineError: the worker is gone.
    """
    texts: list[str] = []
    drafts: list[tuple[Item, OpenAIRequest, list[int | tuple[int, ...]]] | Refused] = []
    for item in items:
        try:
            request = parse_request(item.url, dict(item.body))
            slots = _slots(_prompts(request, model), texts)
            drafts.append((item, request, slots))
        except EngineError:
            raise
        except LoadmasterError as error:
            drafts.append(Refused(item=item, error=error))
    tokens = model.tokens_of(texts) if texts else []
    return [d if isinstance(d, Refused) else _ready(*d, tokens, model) for d in drafts]


def _prompts(request: OpenAIRequest, model: BatchModel) -> tuple[Prompt, ...]:
    if isinstance(request, ChatRequest):
        return (model.render(request.messages),)
    return request.inputs if isinstance(request, EmbeddingRequest) else request.prompts


def _slots(prompts: tuple[Prompt, ...], texts: list[str]) -> list[int | tuple[int, ...]]:
    """Where each prompt's tokens will come from: a text to be tokenized, or they are here."""
    slots: list[int | tuple[int, ...]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            slots.append(len(texts))
            texts.append(prompt)
        else:
            slots.append(prompt)
    return slots


def _ready(
    item: Item,
    request: OpenAIRequest,
    slots: list[int | tuple[int, ...]],
    tokens: list[tuple[int, ...]],
    model: BatchModel,
) -> Ready | Refused:
    prompts = tuple(tokens[slot] if isinstance(slot, int) else slot for slot in slots)
    try:
        for prompt in prompts:
            _check(prompt, model, answers=not isinstance(request, EmbeddingRequest))
    except LoadmasterError as error:
        return Refused(item=item, error=error)
    return Ready(item=item, request=request, prompts=prompts, alone=item.deaths > 0)


def _check(prompt: tuple[int, ...], model: BatchModel, *, answers: bool) -> None:
    n_prompt, n_ctx = len(prompt), model.n_ctx
    if n_prompt == 0:
        raise BadFieldError("prompt", "the prompt has no tokens")
    if n_prompt + answers > n_ctx:  # an answer has a token at least
        words = f"n_ctx is {n_ctx} for prompt and answer together" if answers else (
            f"an embedding takes {n_ctx} at most"
        )  # fmt: skip
        raise ContextLengthError(
            f"the prompt has {n_prompt} tokens, {words}",
            hint="shorten it, or run the job with a larger `--ctx`",
            numbers={"n_prompt": n_prompt, "n_ctx": n_ctx},
        )
    if max(prompt) >= model.n_vocab:
        raise BadFieldError(
            "prompt", f"token {max(prompt)} is not one of the model's {model.n_vocab}"
        )
