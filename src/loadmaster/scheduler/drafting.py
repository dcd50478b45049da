"""Drafts: guessed tokens that a decoding sequence brings into a step, to be checked there. Pure.

A step of few tokens costs about what it moves and not what it computes, so that tokens beside the
first are cheap. Whether they pay is decided for every step: by what steps of so many tokens cost,
and by how many of the sequence's guesses came true so far, whether they were fed or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loadmaster.scheduler.guesses import Guesses
from loadmaster.scheduler.request import Request
from loadmaster.scheduler.types import Limits, SequenceWork

# Tokens of a step and its cost, until somebody measures it: 4 % of a step for each token more.
NOMINAL_COSTS = ((1, 1.0), (16, 1.6))
# With more sequences a step is full enough: of four sessions with drafts Tanguille/cluster#3258 had
# 10.8 tok/s in all, where one had 33.
MOST_SEQUENCES = 4
_MARGIN = 1.05  # what drafts must promise, as a multiple of the speed without them
_UNPAID_STEPS = 16  # a lone sequence decodes on so far before its guesses are looked at again


class Drafts:
    """Decides on the drafts of every step."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._n_step = limits.n_draft, limits.n_draft_step
        self.costs: Sequence[tuple[int, float]] = NOMINAL_COSTS
        self._paying = False

    @property
    def n_repeat(self) -> int:
        """How far a lone sequence that brought no draft may decode on."""
        return 1 if self._paying else _UNPAID_STEPS

    def bring(
        self, work: Sequence[SequenceWork], requests: Mapping[int, Request], n_available: int
    ) -> tuple[SequenceWork, ...]:
        """The step with drafts where they pay; all its sequences decode."""
        self._paying = False
        if not self._most or len(work) > MOST_SEQUENCES:
            return tuple(work)
        room = min(self._n_step, n_available) // len(work) - 1
        return tuple(self._draft(part, requests[part.seq_id], room, len(work)) for part in work)

    def _draft(
        self, part: SequenceWork, request: Request, room: int, n_sequences: int
    ) -> SequenceWork:
        guesses = request.guesses
        if guesses is None:
            guesses = request.guesses = Guesses(request.tokens)
        n = draft_length(self.costs, guesses.record.share, n_sequences, min(self._most, room))
        self._paying = self._paying or n > 0
        guesses.open = guesses.lookup.guess(self._most)
        draft = guesses.open[: min(n, request.max_tokens - request.n_generated - 1)]
        if not draft:
            return part
        guesses.open = draft
        return replace(part, tokens=part.tokens + draft, n_draft=len(draft))


def draft_length(
    costs: Sequence[tuple[int, float]], share: float, n_sequences: int, most: int
) -> int:
    """The draft of each of so many sequences that gives most tokens for a step's cost; 0 where
    that is not `_MARGIN` times what steps without drafts give."""
    best, fastest = 0, _MARGIN / cost_of(costs, n_sequences)
    expected, chance = 1.0, 1.0
    for n in range(1, most + 1):
        chance *= share
        expected += chance
        rate = expected / cost_of(costs, n_sequences * (1 + n))
        if rate > fastest:
            best, fastest = n, rate
    return best


def cost_of(costs: Sequence[tuple[int, float]], n_tokens: int) -> float:
    """What a step of so many tokens costs: on a line between the known ones, and beyond the last
    as much for each token as there."""
    (n, cost), *others = costs
    for next_n, next_cost in others:
        if n_tokens <= next_n:
            return cost + (next_cost - cost) * (n_tokens - n) / (next_n - n)
        n, cost = next_n, next_cost
    return cost * n_tokens / n
