"""Candidates for the plan of a job: sequences, cells, cache types, sizes of steps, as estimated.

A candidate's placement is estimated (matrices divisible, compute buffers bounded) and the job is
played on it; the engine is not asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, sqrt

from loadmaster.plan.batch import JobOutline
from loadmaster.plan.bounds import bound_compute_bytes
from loadmaster.plan.choices import (
    MAX_SEQUENCES,
    N_CTX_STEP,
    Choice,
    first_choice,
    pinned_overrides,
    smaller_cache,
)
from loadmaster.plan.objective import cost_s
from loadmaster.plan.parts import Parts, cut
from loadmaster.plan.placement import place
from loadmaster.plan.problem import Problem, traffic_of
from loadmaster.plan.search import base_of, estimated_traffic
from loadmaster.plan.simulate import simulate
from loadmaster.plan.speed import Traffic
from loadmaster.plan.steps import crossing_tokens
from loadmaster.plan.types import CPU, EngineSettings, Knobs
from loadmaster.units import align

# Numbers of sequences that are looked at, beside the job's own number of items.
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, MAX_SEQUENCES)
# So many are worth it on any machine.
_WORTH_IT = 8
# Prompts share much when so much of them need not be fed: then one cache for all is taken.
_MUCH_SHARED = 0.5
# Tokens of a step that are tried beside the default, with the first so many candidates.
_WIDER_N_UBATCHES = (1024, 2048)
_WIDENED = 4
_ESTIMATE_ROUNDS = 3
# Lengths vary: cells for so many standard deviations more than the mean.
_DEVIATIONS = 2.0
# A q8_0 cache must end the job this much sooner to be taken over f16.
_CACHE_GAIN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A choice for some number of sequences, and about where it would put everything."""

    problem: Problem
    choice: Choice
    base: EngineSettings
    traffic: Traffic  # of an estimated placement

    def played_s(self, job: JobOutline) -> float:
        """Seconds of the job, by a short play."""
        rates = self.problem.rates
        return simulate(self.traffic, rates, self.base, job, rounds=_ESTIMATE_ROUNDS).seconds


def ranked_candidates(problem: Problem, job: JobOutline) -> list[tuple[float, Candidate]]:
    """Candidates with the time of the job, the shortest first."""
    ranked = [
        (candidate.played_s(job), candidate)
        for n in _counts(problem, job)
        for asked in _arrangements(problem, job, n)
        for choice in _choices(asked)
        for candidate in _candidates(asked, choice)
    ]
    ranked.sort(key=_rank)
    if problem.knobs.n_ubatch is None:
        ranked += [
            (candidate.played_s(job), candidate)
            for _, it in ranked[:_WIDENED]
            for n_ubatch in _WIDER_N_UBATCHES
            for candidate in _candidates(it.problem, replace(it.choice, n_ubatch=n_ubatch))
        ]
    return sorted(ranked, key=_rank)


def _rank(pair: tuple[float, Candidate]) -> float:
    return pair[0] * _handicap(pair[1])


def _handicap(candidate: Candidate) -> float:
    """What an f16 cache may cost more."""
    chosen = candidate.problem.knobs.type_k is None and candidate.choice.type_k != "f16"
    return 1 / (1 - _CACHE_GAIN) if chosen else 1.0


def _counts(problem: Problem, job: JobOutline) -> list[int]:
    """Numbers of sequences to look at. On a machine of unknown rates a few are always worth it."""
    fixed = problem.knobs.n_seq_max
    if fixed is not None:
        return [fixed]
    most = max(1, min(MAX_SEQUENCES, job.n_items))
    counts = sorted({n for n in _SEQUENCES if n <= most} | {most})
    if problem.rates.basis == "unknown":
        return [n for n in counts if n >= min(most, _WORTH_IT)]
    return counts


def _choices(problem: Problem) -> Iterator[Choice]:
    """With an f16 cache and, where the model bears it and VRAM is short, with half of it."""
    first = first_choice(problem.model, problem.workload, problem.knobs)
    yield first
    smaller = smaller_cache(problem.model, problem.knobs, first)
    if smaller is not None and problem.books.gpus:
        yield smaller


def _arrangements(problem: Problem, job: JobOutline, n: int) -> Iterator[Problem]:
    """One cache for all sequences; where items share little, also one for each of them, which
    passes over nobody else's cells."""
    unified = problem.knobs.kv_unified
    if unified is not False:
        yield for_sequences(problem, job, n)
    little = job.prompt_tokens - job.distinct_tokens < _MUCH_SHARED * job.prompt_tokens
    if n > 1 and (unified is False or (unified is None and little)):
        apart = replace(problem, knobs=replace(problem.knobs, kv_unified=False))
        yield for_sequences(apart, job, n)


def for_sequences(problem: Problem, job: JobOutline, n: int) -> Problem:
    """The same problem for `n` sequences of the job."""
    n_items = max(1, job.n_items)
    given = problem.workload
    workload = replace(
        given,
        n_ctx=_longest(problem, job),
        n_seq_max=n,
        prompt_tokens=max(1, ceil(job.prompt_tokens / n_items)),
        output_tokens=max(1, ceil(job.output_tokens / n_items)),
        shared_tokens=int(job.prefix_cells(1)) if job.prefix_tokens else 0,
        n_cells=given.n_cells or _cells(problem, job, n),
    )
    return replace(problem, workload=workload)


def _longest(problem: Problem, job: JobOutline) -> int:
    """Tokens of the longest item; one beyond what the model was trained for fails by itself."""
    trained = problem.model.n_ctx_train or job.longest
    return max(problem.workload.n_ctx or 0, min(job.longest, trained), 1)


def _cells(problem: Problem, job: JobOutline, n: int) -> int:
    if problem.knobs.kv_unified is False:
        return n * align(_longest(problem, job), N_CTX_STEP)
    return needed_cells(job, n)


def needed_cells(job: JobOutline, n: int) -> int:
    """Cells for `n` items of the job at once, to the end of their answers.

    Enough for all but unusual mixtures; more than all items together are never needed.
    """
    n = min(n, max(1, job.n_items))
    mean = sum(it.count * it.cells for it in job.classes) / max(1, job.n_items)
    squares = sum(it.count * (it.cells - mean) ** 2 for it in job.classes) / max(1, job.n_items)
    spread = _DEVIATIONS * sqrt(squares * n)
    whole = job.prefix_tokens + sum(it.count * it.cells for it in job.classes)
    wanted = min(whole, job.prefix_cells(n) + n * mean + spread)
    return align(max(job.longest, ceil(wanted), 1), N_CTX_STEP)


def _candidates(problem: Problem, choice: Choice) -> Iterator[Candidate]:
    """The choice on its estimated placement, if one fits; with the threshold that suits it."""
    base = base_of(problem, choice)
    traffic = _estimate(problem, base)
    if traffic is None:
        return
    knobs = _with_threshold(problem, base, traffic)
    if knobs != problem.knobs:
        problem = replace(problem, knobs=knobs)
        base = base_of(problem, choice)
    yield Candidate(problem=problem, choice=choice, base=base, traffic=traffic)


def _with_threshold(problem: Problem, base: EngineSettings, traffic: Traffic) -> Knobs:
    """From how many tokens on a step is quicker with its weights sent to the GPU."""
    knobs, rates = problem.knobs, problem.rates
    fixed = knobs.op_offload is not None or knobs.op_offload_min_batch is not None
    if fixed or not rates.gpus or rates.basis == "unknown" or not traffic.host_read_bytes:
        return knobs
    tokens = crossing_tokens(traffic, rates, base.n_ubatch)
    if tokens is None:
        return replace(knobs, op_offload=False)
    return replace(knobs, op_offload_min_batch=tokens)


def _estimate(problem: Problem, base: EngineSettings) -> Traffic | None:
    """What a token moves in the placement that would be about right."""
    gpus = problem.books.gpus
    parts = cut(problem.model, base, [gpu.rules for gpu in gpus], pinned_overrides(problem.knobs))
    compute = bound_compute_bytes(problem.model, base, problem.books.rules)
    if not gpus:
        placement = place(parts, 0, ())
        assert placement is not None
        return _with_host(problem, parts, 0, traffic_of(problem, parts, placement), compute[CPU])
    overheads, budget = problem.books.overheads.device_bytes, problem.books.budget
    rooms = [budget.cap(gpu.id) - overheads.get(gpu.id, 0) - compute[gpu.id] for gpu in gpus]
    found = [
        _with_host(problem, parts, count, traffic, compute[CPU])
        for count in _layer_counts(problem, parts)
        if (traffic := estimated_traffic(problem, parts, count, rooms)) is not None
    ]
    return min(
        found, key=lambda it: cost_s(it, problem.rates, base, problem.workload), default=None
    )


def _layer_counts(problem: Problem, parts: Parts) -> list[int]:
    """Numbers of GPU layers to estimate with: what the user fixed, or some from all to none."""
    n, knobs = len(parts.layers), problem.knobs
    if knobs.layers_per_device is not None:
        return [min(sum(knobs.layers_per_device), n)]
    if knobs.n_gpu_layers is not None:
        return [min(knobs.n_gpu_layers, n)]
    return list(dict.fromkeys(round(n * eighths / 8) for eighths in range(8, -1, -1)))


def _with_host(
    problem: Problem, parts: Parts, count: int, traffic: Traffic, compute: int
) -> Traffic:
    """Weights that do not fit the RAM cap beside the caches are read from disk for every step."""
    on_host = parts.layers[: len(parts.layers) - count]
    caches = sum(layer.cache_bytes for layer in on_host)
    left = problem.books.budget.cap(CPU) - problem.books.overheads.process_bytes - caches - compute
    beyond = traffic.host_bytes - max(0, left)
    return replace(traffic, disk_read_bytes=max(0, min(beyond, traffic.host_read_bytes)))
