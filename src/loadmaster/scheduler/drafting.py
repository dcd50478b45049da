"""Drafts: guessed tokens that a decoding sequence brings into a step, to be checked there. Pure.

A step of few tokens costs about what it moves and not what it computes, so that tokens beside the
first are cheap. Whether they pay is decided for every step: by what steps of so many tokens cost,
and by how many of the sequence's guesses came true so far. Guesses are looked up in the sequence's
own tokens, or a draft model makes them: then they are asked for before the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loadmaster.plan.types import DRAFT_SEQUENCES
from loadmaster.scheduler.guesses import CHANCE_TOKENS, Guesses
from loadmaster.scheduler.request import Request
from loadmaster.scheduler.types import DraftWanted, Limits, SequenceWork, StepCosts

# Tokens of a step and its cost, until somebody measures it: 4 % of a step for each token more, and
# a tenth of a step for each token of a draft model.
NOMINAL_COSTS = StepCosts(costs=((1, 1.0), (16, 1.6)), drafted=0.1)
_MARGIN = 1.05  # what drafts must promise, as a multiple of the speed without them
_UNPAID_STEPS = 16  # a lone sequence decodes on so far before its guesses are looked at again
_CHANCE_DRAFT = 2  # what a draft model guesses when it gets a chance


class Drafts:
    """Decides on the drafts of every step."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._n_step = limits.n_draft, limits.n_draft_step
        self._by_model = limits.draft_model
        self.costs = NOMINAL_COSTS
        self._paying = False
        # Of a draft model, for the step to come: how many tokens there were, and what it guessed.
        self._made: dict[int, tuple[int, Sequence[int]]] = {}

    @property
    def n_repeat(self) -> int:
        """How far a lone sequence that brought no draft may decode on."""
        return 1 if self._paying else _UNPAID_STEPS

    def wanted(
        self, work: Sequence[SequenceWork], requests: Mapping[int, Request], n_available: int
    ) -> tuple[DraftWanted, ...]:
        """What the draft model is to guess before this step, in which all sequences decode."""
        if not self._by_model or len(work) > DRAFT_SEQUENCES:
            return ()
        wanted = []
        for part in work:
            request = requests[part.seq_id]
            n = self._length(request, self._room(work, n_available), len(work))
            if n and self._made.get(part.seq_id, (0, ()))[0] != len(request.tokens):
                wanted.append(DraftWanted(seq_id=part.seq_id, tokens=request.tokens, n=n))
                self._made[part.seq_id] = (len(request.tokens), ())  # it is asked once
        return tuple(wanted)

    def made(self, guesses: Mapping[int, Sequence[int]], requests: Mapping[int, Request]) -> None:
        """The draft model has guessed."""
        self._made |= {s: (len(requests[s].tokens), guess) for s, guess in guesses.items()}

    def bring(
        self, work: Sequence[SequenceWork], requests: Mapping[int, Request], n_available: int
    ) -> tuple[SequenceWork, ...]:
        """The step with drafts where they pay; all its sequences decode."""
        self._paying = False
        if len(work) > DRAFT_SEQUENCES:
            return tuple(work)
        room = self._room(work, n_available)
        return tuple(self._draft(part, requests[part.seq_id], room, len(work)) for part in work)

    def _room(self, work: Sequence[SequenceWork], n_available: int) -> int:
        return min(self._most, min(self._n_step, n_available) // len(work) - 1)

    def _length(self, request: Request, room: int, n_sequences: int) -> int:
        """How long a draft of a sequence may be; 0 where none pays."""
        guesses = request.guesses
        if guesses is None:
            guesses = request.guesses = Guesses(request.tokens)
        drafted = self.costs.drafted if self._by_model else 0.0
        n = draft_length(self.costs.costs, guesses.record.share, n_sequences, room, drafted)
        if n == 0 and self._by_model and guesses.n_idle >= CHANCE_TOKENS:
            n = min(_CHANCE_DRAFT, room)
        return min(n, request.max_tokens - request.n_generated - 1)

    def _draft(
        self, part: SequenceWork, request: Request, room: int, n_sequences: int
    ) -> SequenceWork:
        n = self._length(request, room, n_sequences)
        self._paying = self._paying or n > 0
        guesses = request.guesses
        assert guesses is not None
        guesses.open = self._guess(part.seq_id, request, guesses)
        draft = tuple(guesses.open[:n])
        if not draft:
            return part
        guesses.open = draft
        return replace(part, tokens=part.tokens + draft, n_draft=len(draft))

    def _guess(self, seq_id: int, request: Request, guesses: Guesses) -> Sequence[int]:
        if not self._by_model:
            return guesses.lookup.guess(self._most)
        n_tokens, guess = self._made.pop(seq_id, (0, ()))
        return guess if n_tokens == len(request.tokens) else ()


def draft_length(
    costs: Sequence[tuple[int, float]],
    share: float,
    n_sequences: int,
    most: int,
    drafted: float = 0.0,
) -> int:
    """The draft of each of so many sequences that gives most tokens for a step's cost; 0 where
    that is not `_MARGIN` times what steps without drafts give. `drafted`: the cost of guessing a
    token for all of them."""
    best, fastest = 0, _MARGIN / cost_of(costs, n_sequences)
    expected, chance = 1.0, 1.0
    for n in range(1, most + 1):
        chance *= share
        expected += chance
        rate = expected / (cost_of(costs, n_sequences * (1 + n)) + n * drafted)
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
