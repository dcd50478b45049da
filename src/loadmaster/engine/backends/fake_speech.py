"""What the fake backend says: its answer, JSON by a schema, log-probabilities, vectors, ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.engine.backends.grammar import Constraint
from loadmaster.engine.backends.sampled import Choice, follow
from loadmaster.engine.types import TokenLogprob

N_BYTES = 256  # a byte is a token; this one ends a text
N_EMBD = 8
END_TEXT = b"<end>"
_LOGPROB = -0.5
_ALL_BYTES = (*range(33, N_BYTES), *range(33))  # spaces last
_IN_A_STRING = (N_BYTES, *b'"a', *_ALL_BYTES)
_ELSEWHERE = (N_BYTES, *b'}]",:', *_ALL_BYTES)


@dataclass(slots=True, kw_only=True)
class Speech:
    """Where a sequence stands in what it says."""

    answer: bytes
    seed: int  # where in the answer it begins
    eog_after: int | None
    n_top: int | None
    constraint: Constraint | None
    said: int = 0

    def ahead(self, n: int) -> list[int]:
        """What a draft model thinks it says next: every fifth token it gets wrong."""
        said = [self.answer[(self.said + self.seed + i) % len(self.answer)] for i in range(n)]
        return [t if (self.said + i) % 5 else N_BYTES - 1 for i, t in enumerate(said)]

    def follow(self, draft: Sequence[int]) -> list[Choice]:
        """What it says next, for as long as it is the draft."""
        return follow(lambda _: self._next(), 0, draft, self.constraint)

    def _next(self) -> Choice:
        token = self._token()
        return token, None if self.n_top is None else _logprob(token, self.n_top)

    def _token(self) -> int:
        said, self.said = self.said, self.said + 1
        if self.constraint is not None:
            return _constrained(self.constraint)
        if self.eog_after is not None and said >= self.eog_after:
            return N_BYTES
        return self.answer[(said + self.seed) % len(self.answer)]


def _constrained(constraint: Constraint) -> int:
    """A token that the schema allows; one that ends a value, if there is such."""
    bits = constraint.allowed()
    allowed = {token for token in range(N_BYTES + 1) if bits[token // 32] >> token % 32 & 1}
    order = _IN_A_STRING if ord("a") in allowed else _ELSEWHERE
    token: int = next(token for token in order if token in allowed)
    constraint.accept(token)
    return token


def _logprob(token: int, n_top: int) -> TokenLogprob:
    """Made up, always the same: each token is e times likelier than the next."""
    near = [(token + i) % N_BYTES for i in range(n_top)]
    top = tuple((t, (t,), _LOGPROB - i) for i, t in enumerate(near))
    raw = (token,) if token < N_BYTES else ()
    return TokenLogprob(token=token, raw=raw, logprob=_LOGPROB, top=top)


def counts(prompt: Sequence[int]) -> list[float]:
    """A vector: how many of the prompt's bytes are congruent to 0 … 7."""
    return [float(sum(token % N_EMBD == i for token in prompt)) for i in range(N_EMBD)]


def likeness(pair: Sequence[int]) -> float:
    """A rank: the part of the query's bytes that the document has, too."""
    middle = pair.index(N_BYTES) if N_BYTES in pair else 0
    query, document = set(pair[:middle]), set(pair[middle + 1 :])
    return len(query & document) / max(1, len(query))
