"""Vectors and ranks from models that were opened for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.errors import UsageError
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.requests import check_text

MOST_PAIRS_BYTES = 32 << 20  # of a query beside each of its documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """A vector for each text, and how many tokens were read."""

    model: str
    vectors: list[list[float]]
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A score for each document, in their order."""

    model: str
    scores: list[float]

    def best(self, n: int | None) -> list[tuple[int, float]]:
        """Indices and scores of the best documents, the best one first."""
        order = sorted(range(len(self.scores)), key=lambda index: -self.scores[index])
        return [(index, self.scores[index]) for index in order[:n]]


async def embed(serving: Serving, name: str | None, texts: Sequence[str]) -> Vectors:
    """Vectors of length 1, one for each text.

    Raises:
        UsageError: the model was opened to write text.
        ContextLengthError: a text is longer than what is pooled at once.
    """

    def work(opened: Opened) -> tuple[list[list[float]], int]:
        for text in texts:
            check_text(opened, text)
        prompts = opened.session.tokens_of(texts)
        return opened.session.engine.embed(prompts), sum(map(len, prompts))

    async with serving.use(name) as model:
        _check_pooling(model, await serving.live(model), ranks=False)
        vectors, n_tokens = await serving.call(model, work)
        _count(serving, model, n_tokens)
        return Vectors(model=model.id, vectors=vectors, n_tokens=n_tokens)


async def rank(serving: Serving, name: str | None, query: str, documents: Sequence[str]) -> Ranks:
    """How well each document answers a query.

    Raises:
        UsageError: the model does not rank, or it would be far too much text.
    """
    n_bytes = len(query.encode()) * len(documents) + sum(len(d.encode()) for d in documents)
    if n_bytes > MOST_PAIRS_BYTES:
        raise UsageError(
            f"the query beside {len(documents)} documents is {n_bytes} bytes of text",
            hint=f"{MOST_PAIRS_BYTES} are ranked at once: send fewer documents",
            numbers={"n_bytes": n_bytes, "limit_bytes": MOST_PAIRS_BYTES},
        )

    def score(opened: Opened) -> list[float]:
        for document in documents:
            check_text(opened, query, document)
        return opened.session.engine.rerank(query, documents)

    async with serving.use(name) as model:
        _check_pooling(model, await serving.live(model), ranks=True)
        scores = await serving.call(model, score)
        _count(serving, model)
        return Ranks(model=model.id, scores=scores)


def _count(serving: Serving, model: ServedModel, n_tokens: int = 0) -> None:
    """Such requests are no events of a worker, from which the others are counted."""
    counts = serving.counts[model.id]
    counts.ended("stop")
    counts.prompt_tokens += n_tokens


def _check_pooling(model: ServedModel, opened: Opened, *, ranks: bool) -> None:
    pooling = opened.session.plan.engine.pooling
    if pooling is None:
        name = model.offer.model
        raise UsageError(
            f"`{model.id}` is served to write text",
            hint=f"`loadmaster serve --embeddings embed={name}` offers it for embeddings",
        )
    if ranks != (pooling == "rank"):
        what = "ranks documents, and gives no embeddings" if not ranks else "does not rank"
        raise UsageError(f"`{model.id}` {what}", hint="ask another model; `/v1/models` lists them")
