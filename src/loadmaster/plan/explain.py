"""What a plan says of itself: notes for a person, and the neighbouring plans with their flags."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loadmaster.plan.choices import MIN_N_CTX, first_choice, smaller_cache
from loadmaster.plan.problem import Failure, Problem, Search, Solution
from loadmaster.plan.search import search
from loadmaster.plan.speed import predict
from loadmaster.plan.types import (
    CPU,
    Alternative,
    Budget,
    DevicePlan,
    Kind,
    Knobs,
    Workload,
)
from loadmaster.units import MIB, Bytes, align, format_size, to_flag

# Plans shown beside the one that was made, or in place of one that does not fit.
_N_ALTERNATIVES = 3
# KL divergence of a q8_0 cache, Llama 3 8B (llama.cpp#7412).
_Q8_CACHE_KLD = "0.001"
# What an alternative frees: buffers, not weights, which take the freed room.
_REUSABLE: tuple[Kind, ...] = ("kv", "recurrent", "compute")


def notes_of(problem: Problem, solution: Solution) -> Iterator[str]:
    """What a person would ask about the plan."""
    model, settings, choice = problem.model, solution.settings, solution.choice
    host = solution.devices[-1]
    if problem.machine.gpus and solution.traffic.host_read_bytes:
        kept = format_size(host.of("model") + host.mapped_bytes)
        yield f"{kept} of weights stay on the CPU: decode waits for RAM on every token"
    if host.mapped_bytes:
        yield (
            f"{format_size(host.mapped_bytes)} of weights are mapped from the file: they do not fit"
            " the RAM budget beside the rest, and the kernel may read them again from disk"
        )
    if choice.type_k == "q8_0" and problem.knobs.type_k is None:
        yield (
            f"KV cache in q8_0 (KL divergence about {_Q8_CACHE_KLD}) leaves VRAM for weights;"
            " `--kv f16` keeps it exact"
        )
    n_ctx = settings.n_ctx // settings.n_seq_max
    if problem.workload.n_ctx is None and model.n_ctx_train > n_ctx:
        yield f"n_ctx {n_ctx} of the model's {model.n_ctx_train}: `-c N` asks for another"
    if not model.kv_formula:
        yield f"the cache of `{model.architecture}` is sized by the engine, not from the header"
    if problem.sizes is None:
        yield "compute buffers are bounds: no engine build was asked (`loadmaster engine build`)"


# ---- neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variation:
    flags: tuple[str, ...]
    what: str
    problem: Problem


def variations_of(problem: Problem, outcome: Solution | Failure) -> Iterator[_Variation]:
    """Changes worth showing, the cheapest for the user first."""
    settings, fits = outcome.settings, isinstance(outcome, Solution)
    n_ctx = settings.n_ctx // settings.n_seq_max
    bears_q8 = (
        smaller_cache(
            problem.model, Knobs(), first_choice(problem.model, problem.workload, Knobs())
        )
        is not None
    )
    if settings.type_k == "f16" and bears_q8 and (problem.books.gpus or not fits):
        knobs = replace(problem.knobs, type_k="q8_0", type_v="q8_0")
        yield _vary(problem, ("--kv", "q8_0"), "half the KV cache", knobs=knobs)
    if problem.knobs.n_gpu_layers is not None and isinstance(outcome, Failure):
        knobs = replace(problem.knobs, n_gpu_layers=None, layers_per_device=None)
        yield _vary(problem, ("-ngl", "auto"), "GPU layers as they fit", knobs=knobs)
    smaller = n_ctx // 2
    while smaller >= min(MIN_N_CTX, n_ctx // 2) and smaller >= 256:
        yield _at_n_ctx(problem, smaller, "a shorter context")
        if isinstance(outcome, Solution):
            break
        smaller //= 2
    if isinstance(outcome, Solution) and not outcome.traffic.host_read_bytes:
        longer = min(2 * n_ctx, problem.model.n_ctx_train)
        if longer > n_ctx:
            yield _at_n_ctx(problem, longer, "a longer context")
    if isinstance(outcome, Failure):
        if problem.knobs.load_mode == "none":
            knobs = replace(problem.knobs, load_mode="mmap")
            yield _vary(problem, ("--load-mode", "mmap"), "weights mapped", knobs=knobs)
        yield _at_larger_budget(problem, outcome)


def _at_n_ctx(problem: Problem, n_ctx: int, what: str) -> _Variation:
    workload = replace(problem.workload, n_ctx=n_ctx)
    return _vary(problem, ("-c", str(n_ctx)), what, workload=workload)


def _at_larger_budget(problem: Problem, failure: Failure) -> _Variation:
    """The budget that the closest miss needs, rounded up to what its flag can say."""
    caps = dict(problem.books.budget.caps)
    flags: list[str] = []
    gpus = {device.id: align(device.planned_bytes, MIB) for device in failure.devices}
    if any(device.left_bytes < 0 and device.id != CPU for device in failure.devices):
        sizes = {gpu.id: gpus.get(gpu.id, caps.get(gpu.id, 0)) for gpu in problem.books.gpus}
        caps.update({gpu: Bytes(max(size, caps.get(gpu, 0))) for gpu, size in sizes.items()})
        flags += ["--vram", _vram_flag({gpu: caps[gpu] for gpu in sizes})]
    if failure.devices[-1].left_bytes < 0:
        caps[CPU] = Bytes(gpus[CPU])
        flags += ["--ram", to_flag(caps[CPU])]
    budget = Budget(caps=caps, origin=problem.books.budget.origin)
    books = replace(problem.books, budget=budget)
    return _Variation(
        flags=tuple(flags), what="a larger budget", problem=replace(problem, books=books)
    )


def _vram_flag(caps: Mapping[str, Bytes]) -> str:
    if len(caps) == 1:
        return to_flag(next(iter(caps.values())))
    return ",".join(f"{gpu.removeprefix('gpu:')}={to_flag(cap)}" for gpu, cap in caps.items())


def _vary(
    problem: Problem,
    flags: tuple[str, ...],
    what: str,
    *,
    knobs: Knobs | None = None,
    workload: Workload | None = None,
) -> _Variation:
    changed = replace(problem, knobs=knobs or problem.knobs, workload=workload or problem.workload)
    return _Variation(flags=flags, what=what, problem=changed)


def solve_variations(
    problem: Problem, outcome: Solution | Failure, variations: Iterator[_Variation]
) -> Search[tuple[Alternative, ...]]:
    """The first variations that fit, each solved like a plan of its own."""
    found: list[Alternative] = []
    for variation in variations:
        if len(found) == _N_ALTERNATIVES:
            break
        solved = yield from search(variation.problem, outcome)
        if isinstance(solved, Solution):
            speed = predict(
                solved.traffic, problem.rates, solved.settings, variation.problem.workload
            )
            found.append(
                Alternative(
                    flags=variation.flags,
                    what=variation.what,
                    decode_tok_s=speed.decode_tok_s,
                    frees_bytes=_freed(outcome.devices, solved.devices),
                )
            )
    return tuple(found)


def _freed(before: tuple[DevicePlan, ...], after: tuple[DevicePlan, ...]) -> Mapping[str, Bytes]:
    """Bytes fewer for caches and compute, per device; freed room may be used for weights."""
    later = {device.id: device for device in after}
    freed: dict[str, Bytes] = {}
    for device in before:
        if device.id in later:
            saved = device.of(*_REUSABLE) - later[device.id].of(*_REUSABLE)
            if saved > 0:
                freed[device.id] = Bytes(saved)
    return freed
