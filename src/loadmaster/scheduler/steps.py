"""What goes into a step: a token of everyone who decodes, and chunks of the prompts. Pure."""

from collections.abc import Sequence

from loadmaster.scheduler.request import Request
from loadmaster.scheduler.types import Limits, SequenceWork


def step_work(
    limits: Limits, ready: Sequence[Request], n_available: int
) -> tuple[tuple[SequenceWork, ...], int]:
    """The next step of these requests, in order of rank, and how many of them decode.

    Each of them needs a cell: `n_available` are there at least.
    """
    decoding = [request for request in ready if request.decoding]
    work = [_work(request, 1) for request in decoding]
    if len(ready) > len(decoding):
        prefilling = [request for request in ready if not request.decoding]
        room = min(_room(limits, len(decoding)), n_available - len(decoding))
        work += _chunks(limits, prefilling, room)
    return tuple(work), len(decoding)


def _room(limits: Limits, n_decoding: int) -> int:
    """Tokens of prompts in a step. Beside decodes it stays below n_ubatch, where that leaves
    prompts a quarter of it: whoever decodes waits for them."""
    if n_decoding == 0:
        return limits.n_batch
    tokens = max(limits.n_ubatch, n_decoding + limits.n_ubatch // 4)
    return min(limits.n_batch, tokens) - n_decoding


def _chunks(limits: Limits, prefilling: Sequence[Request], room: int) -> list[SequenceWork]:
    """The first in rank gets as much as there is, the others a token at least."""
    work = []
    n_behind = len(prefilling)
    for request in prefilling:
        n_behind -= 1
        if room <= 0:
            break
        n = min(request.n_left, max(1, room - n_behind), _until_stop(limits, request))
        room -= n
        work.append(_work(request, n))
    return work


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
