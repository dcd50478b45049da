"""What goes into a step: a token of everyone who decodes, and chunks of the prompts. Pure."""

from collections.abc import Sequence

from loadmaster.scheduler.request import Request
from loadmaster.scheduler.types import Limits, SequenceWork

# Steps in a row without those who answer, at the most.
_MOST_OUT = 3
# What is left of a prompt is little when it is at most one in so many tokens of a step.
_LITTLE = 4


def sits_out(limits: Limits, ready: Sequence[Request], n_out: int) -> bool:
    """Whether the next step is for prompts alone, after `n_out` in a row that were.

    Where the CPU computes, a token of an answer costs as much as one of a prompt, and in a tile of
    its attention those of all answers together as much as 64 that see every cell in use. All of
    them join at once, for the tile's sake, and so rarely that it is no more than
    `answers_beside` of them for each step. A step that prompts do not fill has room for them: apart
    from it they would read the weights once more.
    """
    waiting = [request for request in ready if not request.decoding]
    if not limits.answers_beside or not waiting or waiting[0].priority > 0:
        return False
    if sum(request.n_left for request in waiting) < min(limits.n_ubatch, limits.n_batch):
        return False
    n_answers = len(ready) - len(waiting)
    return n_out < _MOST_OUT and (n_out + 1) * limits.answers_beside < n_answers


def step_work(
    limits: Limits, ready: Sequence[Request], n_available: int, *, prompts_alone: bool = False
) -> tuple[tuple[SequenceWork, ...], int]:
    """The next step of these requests, in order of rank, and how many of them decode; with
    `prompts_alone` none do.

    Each of them needs a cell: `n_available` are there at least.
    """
    decoding = [request for request in ready if request.decoding and not prompts_alone]
    work = [_work(request, 1) for request in decoding]
    prefilling = [request for request in ready if not request.decoding]
    if prefilling:
        room = min(limits.n_ubatch, limits.n_batch) if prompts_alone else _room(limits, len(work))
        work += _chunks(limits, prefilling, min(room, n_available - len(work)))
    return tuple(work), len(decoding)


def _room(limits: Limits, n_decoding: int) -> int:
    """Tokens of prompts in a step. Beside decodes it stays below n_ubatch, where that leaves
    prompts a quarter of it: whoever decodes waits for them."""
    if n_decoding == 0:
        return limits.n_batch
    tokens = max(limits.n_ubatch, n_decoding + limits.n_ubatch // 4)
    return min(limits.n_batch, tokens) - n_decoding


def _chunks(limits: Limits, prefilling: Sequence[Request], room: int) -> list[SequenceWork]:
    """The first in rank gets as much as there is, less what is set aside for others."""
    work = []
    aside = _set_aside(limits, prefilling, room)
    behind = sum(aside)
    for request, own in zip(prefilling, aside, strict=True):
        behind -= own
        n = min(request.n_left, max(own, room - behind), _until_stop(limits, request), room)
        if n > 0:
            room -= n
            work.append(_work(request, n))
    return work


def _set_aside(limits: Limits, prefilling: Sequence[Request], room: int) -> list[int]:
    """Tokens of a step that others have for sure. Items of jobs: one. Of people, those who need
    little get all of it in up to half of the step, the others nothing: cells apart from the rest
    of their sequence are one more tile for each of its tokens to compute."""
    if prefilling[0].priority > 0:
        return [1] * len(prefilling)
    aside, left = [], room // 2
    for request in prefilling:
        n = request.n_left if request.n_left <= min(left, limits.n_ubatch // _LITTLE) else 0
        aside.append(n)
        left -= n
    return aside


def _until_stop(limits: Limits, request: Request) -> int:
    """Where the cache can share only what a sequence stands at, it halts for its followers."""
    if limits.shared_at_end and request.stops:
        for stop in request.stops:
            if stop > request.n_fed:
                return stop - request.n_fed
    return request.n_left


def _work(request: Request, n: int) -> SequenceWork:
    """Feed the next `n` tokens of a request; sample if they are its last."""
    assert request.seq_id is not None
    start = request.n_fed
    return SequenceWork(
        seq_id=request.seq_id,
        tokens=tuple(request.tokens[start : start + n]),
        position=start,
        sample=start + n == len(request.tokens),
    )
