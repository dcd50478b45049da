"""What would reach a demand that no candidate reaches: a smaller model, or another machine."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loadmaster.errors import DoesNotFitError, LoadmasterError, UsageError
from loadmaster.machine.profiles import load_profile, profile_names
from loadmaster.machine.types import Machine
from loadmaster.model.shapes.library import (
    ShapeReference,
    load_shape,
    shape_header,
    shape_model,
    shape_names,
)
from loadmaster.plan.budget import make_budget
from loadmaster.plan.compare import Candidate, Limits
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import DoesNotFit, Plan
from loadmaster.tasks.comparison import Comparison, split_quantize
from loadmaster.tasks.locating import locate_header
from loadmaster.tasks.planning import PlanRequest, plan_model

_USUAL = "Q4_K_M"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Something to type, and the decode rate that its plan predicts."""

    flags: str
    decode_tok_s: float


class NothingKeepsError(DoesNotFitError):
    """No candidate keeps `--min-speed` and `--max-kl`."""


def refusal(comparison: Comparison) -> LoadmasterError:
    """Why nothing was picked, and what would be.

    Compute buffers are bounds here: the machines and models looked at are many.
    """
    limits, usable = comparison.limits, _usable(comparison)
    if not usable and any(one.plan is not None for one in comparison.candidates):
        return UsageError(
            f"the speed of {comparison.machine_name} is not known, so nothing can reach "
            f"{limits.min_speed:g} tok/s for certain",
            hint="`loadmaster doctor --measure` measures it; without `--min-speed` quality decides",
        )
    if not usable:
        return NothingKeepsError(
            f"none of {len(comparison.candidates)} candidates fits on {comparison.machine_name}",
            hint=_hint(_smaller_model(comparison)),
        )
    if limits.min_speed is None:
        return _too_coarse(comparison, usable)
    fastest = max(usable, key=lambda one: one.decode_tok_s or 0)
    speed = fastest.decode_tok_s or 0.0
    within = "" if limits.max_kl is None else f" with KL divergence up to {limits.max_kl:g}"
    remedies = [
        *_smaller_model(comparison),
        *_other_machine(comparison, _best(usable)),
    ]
    lower = f"`--min-speed {_below(speed)}` takes {fastest.reference}"
    return NothingKeepsError(
        f"nothing{within} reaches {limits.min_speed:g} tok/s on {comparison.machine_name}: the "
        f"fastest is {fastest.reference} at {speed:.1f}",
        hint=_hint(remedies, lower),
        numbers={"min_speed": limits.min_speed, "fastest_tok_s": round(speed, 2)},
    )


def _usable(comparison: Comparison) -> list[Candidate]:
    """Candidates that fit; those within `--max-kl` where there are any."""
    fitting = [one for one in comparison.candidates if one.plan is not None]
    if comparison.limits.min_speed is not None:
        fitting = [one for one in fitting if one.decode_tok_s is not None]
    cap = comparison.limits.max_kl
    if cap is None:
        return fitting
    return [one for one in fitting if one.kl is not None and one.kl <= cap] or fitting


def _too_coarse(comparison: Comparison, usable: list[Candidate]) -> LoadmasterError:
    known = [one for one in usable if one.kl is not None]
    cap = comparison.limits.max_kl
    if not known:
        return NothingKeepsError(
            f"no KL divergence is published for these {len(usable)} candidates",
            hint="leave `--max-kl` out",
        )
    best = min(known, key=lambda one: one.kl or 0.0)
    return NothingKeepsError(
        f"nothing that fits has a KL divergence up to {cap:g}: the lowest is {best.kl:.4f}, "
        f"{best.reference}",
        hint=f"`--max-kl {best.kl:.4f}` takes it",
    )


def _below(speed: float) -> str:
    """A flag's value that this speed reaches."""
    return f"{int(speed * 10) / 10:g}"


def _hint(remedies: list[Remedy], *others: str) -> str:
    said = [f"`{one.flags}` reaches {one.decode_tok_s:.1f} tok/s" for one in remedies]
    return "; ".join([*said, *others]) or "take a smaller model or more memory"


def _best(usable: list[Candidate]) -> Candidate:
    """The candidate to look for another machine with: Q4_K_M, the usual one, if it is there."""
    usual = [one for one in usable if one.quantization == _USUAL]
    return usual[0] if usual else usable[0]


def _reaches(outcome: object, limits: Limits) -> float | None:
    if not isinstance(outcome, Plan) or outcome.predicted.decode_tok_s is None:
        return None
    speed = outcome.predicted.decode_tok_s
    return speed if speed >= (limits.min_speed or 0.0) else None


def _smaller_model(comparison: Comparison) -> list[Remedy]:
    """The largest shape below the smallest candidate that reaches the speed here."""
    smallest = min(one.file_bytes for one in comparison.candidates)
    for size, reference in sorted(_shapes(), key=lambda pair: -pair[0]):
        if size >= smallest:
            continue
        knobs = replace(comparison.request.knobs, quantize=None, double_quant=None)
        request = replace(comparison.request, model=shape_model(reference), knobs=knobs)
        speed = _reaches(plan_model(_fitted(request), None, alternatives=False), comparison.limits)
        if speed is not None:
            return [Remedy(flags=f"loadmaster plan {reference}", decode_tok_s=speed)]
    return []


def _shapes() -> Iterator[tuple[int, ShapeReference]]:
    for name in shape_names():
        shape = load_shape(name)
        quantization = shape.only[0] if shape.only else _USUAL
        yield (
            shape_header(shape, quantization)[1],
            ShapeReference(name=name, quantization=quantization),
        )


def _fitted(request: PlanRequest) -> PlanRequest:
    """The request with an n_ctx that the model takes."""
    n_ctx = request.workload.n_ctx
    if n_ctx is None or n_ctx <= request.model.n_ctx_train:
        return request
    return replace(request, workload=replace(request.workload, n_ctx=request.model.n_ctx_train))


def _other_machine(comparison: Comparison, candidate: Candidate) -> list[Remedy]:
    """The shipped profile with the least VRAM on which the candidate reaches the speed."""
    here = _vram(comparison.request.machine)
    name, quantize = split_quantize(candidate.reference)
    located = locate_header(name, quantize)
    model = located.model
    knobs = replace(
        comparison.request.knobs, type_k=candidate.type_k, type_v=candidate.type_v,
        quantize=located.quantize or quantize,
    )  # fmt: skip
    machines = [load_profile(name) for name in profile_names()]
    for machine in sorted(machines, key=_vram):
        if _vram(machine) <= here:
            continue
        request = replace(
            comparison.request, model=model, knobs=knobs, machine=machine,
            budget=make_budget(machine), overheads=default_overheads(machine.gpus),
        )  # fmt: skip
        speed = _reaches(_planned(request), comparison.limits)
        if speed is not None:
            flags = f"--machine {machine.name} {candidate.reference}"
            return [Remedy(flags=flags, decode_tok_s=speed)]
    return []


def _planned(request: PlanRequest) -> Plan | DoesNotFit | None:
    """None on a machine whose GPUs the engine does not drive."""
    try:
        return plan_model(request, None, alternatives=False)
    except UsageError:
        return None


def _vram(machine: Machine) -> int:
    return sum(gpu.total_bytes for gpu in machine.gpus)
