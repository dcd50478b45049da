"""Times steps of an open model through its backend, as the driver would make them."""

import time
from collections.abc import Callable

from loadmaster.engine.timing import TimeSteps
from loadmaster.engine.types import Backend, SamplingParams, SequenceWork

_TOKEN = 1  # which token is fed makes no difference to the time


def time_steps(
    backend: Backend,
    question: TimeSteps,
    n_ubatch: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, ...]:
    """Seconds of the first sequence's prompt chunks, then of the decode steps. Cells are dropped
    before and after."""
    sequences = range(question.n_sequences)
    for seq_id in sequences:
        backend.remove(seq_id, 0)
        backend.start_sequence(seq_id, SamplingParams(temperature=0))
    chunks = [_prefill(backend, seq_id, question.depth, n_ubatch, clock) for seq_id in sequences]
    seconds = list(chunks[0]) if chunks else []
    for position in range(question.depth, question.depth + question.n_steps):
        work = [_work(seq_id, 1, position, sample=True) for seq_id in sequences]
        start = clock()
        backend.step(work)
        seconds.append(clock() - start)
    for seq_id in sequences:
        backend.remove(seq_id, 0)
    return tuple(seconds)


def _prefill(
    backend: Backend, seq_id: int, depth: int, n_ubatch: int, clock: Callable[[], float]
) -> list[float]:
    seconds = []
    for position in range(0, depth, n_ubatch):
        n_tokens = min(n_ubatch, depth - position)
        last = position + n_tokens == depth
        start = clock()
        backend.step([_work(seq_id, n_tokens, position, sample=last)])
        seconds.append(clock() - start)
    return seconds


def _work(seq_id: int, n_tokens: int, position: int, *, sample: bool) -> SequenceWork:
    return SequenceWork(
        seq_id=seq_id, tokens=(_TOKEN,) * n_tokens, position=position, sample=sample
    )
