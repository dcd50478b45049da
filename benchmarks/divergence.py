"""How far one model's next-token probabilities are from another's; how sure a mean over texts is.

Pure: logits in, figures out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Vector = npt.NDArray[np.float64]

# The columns of a text's sums.
TOKENS, BYTES, SURPRISE, REFERENCE_SURPRISE, DIVERGENCE, SAME_FIRST = range(6)
LEVEL = 0.95
_ROWS = 32  # at a time: in double precision they stay in the CPU's caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A row of figures for each token of a stretch of text, in nats."""

    surprise: Vector  # -log q(next token) of the model that is judged
    reference_surprise: Vector  # -log p(next token) of the one it is judged by
    divergence: Vector  # Σ p log(p / q)
    same_first: npt.NDArray[np.bool_]  # both have the same likeliest token

    def sums(self, n_bytes: int) -> Vector:
        """What `intervals` resamples: one row of a text."""
        rows = (self.surprise, self.reference_surprise, self.divergence, self.same_first)
        return np.array([len(self.surprise), n_bytes, *(row.sum() for row in rows)], np.float64)


def compare(reference: Floats, judged: Floats, following: Sequence[int]) -> Compared:
    """Two models' logits at the same places, (token, vocabulary), and the tokens that follow."""
    parts = [
        _compare(reference[at : at + _ROWS], judged[at : at + _ROWS], following[at : at + _ROWS])
        for at in range(0, len(following), _ROWS)
    ]
    return Compared(
        surprise=np.concatenate([part.surprise for part in parts]),
        reference_surprise=np.concatenate([part.reference_surprise for part in parts]),
        divergence=np.concatenate([part.divergence for part in parts]),
        same_first=np.concatenate([part.same_first for part in parts]),
    )


def _compare(reference: Floats, judged: Floats, following: Sequence[int]) -> Compared:
    p, q = log_probabilities(reference), log_probabilities(judged)
    places = np.arange(len(following))
    return Compared(
        surprise=-q[places, following],
        reference_surprise=-p[places, following],
        divergence=(np.exp(p) * (p - q)).sum(axis=1),
        same_first=p.argmax(axis=1) == q.argmax(axis=1),
    )


def log_probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    """Row by row, in double precision: a divergence of 10⁻⁵ is a difference of such rows."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def _ratio(above: int, below: int) -> Callable[[Vector], Vector]:
    return lambda sums: sums[..., above] / sums[..., below]


# Each is a ratio of sums, so that long texts count by their tokens.
FIGURES: Mapping[str, Callable[[Vector], Vector]] = {
    "perplexity": lambda sums: np.exp(_ratio(SURPRISE, TOKENS)(sums)),
    "bits_per_byte": lambda sums: _ratio(SURPRISE, BYTES)(sums) / np.log(2),
    "perplexity_ratio": lambda sums: np.exp(
        (sums[..., SURPRISE] - sums[..., REFERENCE_SURPRISE]) / sums[..., TOKENS]
    ),
    "kl": _ratio(DIVERGENCE, TOKENS),
    "same_first": _ratio(SAME_FIRST, TOKENS),
}


def intervals(
    texts: Sequence[Vector], *, n_resamples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Every figure over all texts, with its percentile bootstrap interval.

    Whole texts are drawn with replacement, because tokens of one text resemble each other; both
    models are drawn together, so what they share does not widen the ratio's interval.
    """
    rows = np.stack(texts)
    draws = np.random.default_rng(seed).multinomial(
        len(rows), [1 / len(rows)] * len(rows), size=n_resamples
    )
    drawn, edges = draws @ rows, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found = {}
    for name, figure in FIGURES.items():
        low, high = np.quantile(figure(drawn), edges)
        found[name] = (float(figure(rows.sum(axis=0))), float(low), float(high))
    return found
