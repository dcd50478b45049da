"""Steps with drafts: what of them becomes text, and what such steps cost."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from loadmaster.engine.stream import Stream
from loadmaster.engine.types import Accepted, Backend, SamplingParams, SequenceWork, StepResult
from loadmaster.scheduler.types import DraftWanted, StepCosts

_NOTHING = Accepted(tokens=())
_TOKEN = 1  # which token is fed makes no difference to the time
_WIDTHS = (1, 2, 4, 8, 16)
_ROUNDS = 3
_LONG_S = 0.5  # after so long there is no other round
_CHUNK = 1024  # tokens to read, of which a draft model takes a chunk
_N_GUESSED = 4


def without_drafts(work: Sequence[SequenceWork]) -> tuple[SequenceWork, ...]:
    """The same step, each sequence with its one token."""
    return tuple(
        replace(part, tokens=part.tokens[: -part.n_draft], n_draft=0) if part.n_draft else part
        for part in work
    )


def feed_checked(
    stream: Stream, backend: Backend, seq_id: int, result: StepResult
) -> tuple[tuple[int, ...], bool]:
    """Add what a sequence sampled in a step to its stream, one token after the other; those that
    came before its end, and whether it stops there."""
    more = result.accepted.get(seq_id, _NOTHING)
    tokens = (result.tokens[seq_id], *more.tokens)
    logprobs = (result.logprobs.get(seq_id), *more.logprobs)
    for n, token in enumerate(tokens):
        if stream.feed(backend, (token,), logprobs[n] if n < len(logprobs) else None):
            return tokens[: n + 1], True
    if stream.request.json_schema is not None:
        stream.failure = result.failed.get(seq_id)
    return tokens, seq_id in result.ended


def step_costs(
    backend: Backend,
    most: int,
    *,
    draft_model: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Seconds of a step of 1, 2, 4 … tokens of one sequence, a logit row for each, up to `most`;
    and of a token of the draft model.

    The least of a few rounds: other programs make steps longer, never shorter. So a step that took
    longer than one of more tokens was held up, and costs as much as that at the most.
    """
    backend.remove(0, 0)
    backend.start_sequence(0, SamplingParams(temperature=0))
    widths = [width for width in _WIDTHS if width <= most]
    steps = [partial(_step, backend, width) for width in widths]
    seconds = _least_s(steps, clock)
    drafted = _drafted_s(backend, clock) if draft_model else 0.0
    backend.remove(0, 0)
    backend.end_sequence(0)
    levelled = [min(seconds[index:]) for index in range(len(seconds))]
    return StepCosts(costs=tuple(zip(widths, levelled, strict=True)), drafted=drafted)


def _step(backend: Backend, width: int) -> None:
    work = SequenceWork(
        seq_id=0, tokens=(_TOKEN,) * width, position=0, sample=True, n_draft=width - 1
    )
    backend.step([work])
    backend.remove(0, 0)


def _least_s(calls: Sequence[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    """Seconds of each call, the least of rounds of all of them."""
    best, spent = [float("inf")] * len(calls), 0.0
    for _ in range(_ROUNDS):
        for index, call in enumerate(calls):
            start = clock()
            call()
            seconds = clock() - start
            best[index], spent = min(best[index], seconds), spent + seconds
        if spent > _LONG_S:
            break
    return best


def _drafted_s(backend: Backend, clock: Callable[[], float]) -> float:
    """Of a token guessed; the draft model has read its largest chunk before."""
    backend.draft([DraftWanted(seq_id=0, tokens=[_TOKEN] * _CHUNK, n=1)])
    wanted = DraftWanted(seq_id=0, tokens=[_TOKEN] * 2, n=_N_GUESSED)
    (seconds,) = _least_s([lambda: backend.draft([wanted])], clock)
    return seconds / _N_GUESSED
