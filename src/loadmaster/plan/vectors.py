"""How long a job of embeddings takes: every prompt is fed once, in a step with others like it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.forecast import forecast
from loadmaster.plan.hf_speed import speed_of
from loadmaster.plan.rates import Basis
from loadmaster.plan.simulate import Costs, JobPrediction
from loadmaster.plan.steps import Step, StepCosts
from loadmaster.plan.types import AnySettings, EngineSettings, TransformersSettings

Lengths = tuple[int, ...]  # of the prompts of a step


def predict_vectors(
    machine: Machine, model: AnyModel, settings: AnySettings, job: JobOutline
) -> JobPrediction:
    """The time of a job whose prompts become vectors, under settings that pool.

    Inputs longer than a step fail by themselves and take no time.
    """
    if isinstance(model, CheckpointSpec):
        assert isinstance(settings, TransformersSettings)
        speed = replace(speed_of(machine, model, settings), sequence_s=0.0)
        return _played(speed, settings, job, speed.basis, output=False)
    assert isinstance(settings, EngineSettings)
    found = forecast(machine, model, settings)
    rates = replace(found.rates, sequence_s=0.0)  # nothing is sampled
    return _played(StepCosts(found.traffic, rates, settings), settings, job, rates.basis)


def _played(
    costs: Costs, settings: AnySettings, job: JobOutline, basis: Basis, *, output: bool = True
) -> JobPrediction:
    """All steps by their prices. With `output` the engine makes logits of every token, whatever is
    asked of it."""
    steps = packed_steps(job, settings)
    by_cause: dict[str, float] = {}
    for lengths, times in steps.items():
        for cause, seconds in costs.of(_step(lengths, output=output)).items():
            by_cause[cause] = by_cause.get(cause, 0.0) + times * seconds
    n_steps = sum(steps.values())
    n_items = sum(len(lengths) * times for lengths, times in steps.items())
    return JobPrediction(
        seconds=sum(by_cause.values()),
        n_items=n_items,
        prefilled_tokens=sum(sum(lengths) * times for lengths, times in steps.items()),
        generated_tokens=0,
        n_steps=n_steps,
        peak_cells=max(map(sum, steps), default=0),
        n_preempted=0,
        costs=by_cause,
        basis=basis,
    )


def _step(lengths: Lengths, *, output: bool) -> Step:
    tokens = sum(lengths)
    seen = sum(length * length for length in lengths) / 2 / tokens
    return Step(
        n_decode=0,
        n_prefill=tokens,
        n_outputs=tokens if output else 0,
        prefill_cells=seen,
        used_cells=tokens,
        n_chunks=len(lengths),
    )


def packed_steps(job: JobOutline, settings: AnySettings) -> Mapping[Lengths, int]:
    """Steps by the lengths of their prompts, and how many are alike: at most `n_ubatch` tokens and
    `n_seq_max` prompts, similar lengths together."""
    steps: Counter[Lengths] = Counter()
    step: list[int] = []
    for length, count in _by_length(job, settings.n_ubatch):
        left = count
        while left:
            most = min((settings.n_ubatch - sum(step)) // length, settings.n_seq_max - len(step))
            if most <= 0:
                steps[tuple(step)] += 1
                step = []
            elif not step and left > most:  # all but the last step have nothing else in them
                steps[(length,) * most] += (left - 1) // most
                left -= (left - 1) // most * most
            else:
                step += [length] * min(left, most)
                left -= min(left, most)
    if step:
        steps[tuple(step)] += 1
    return steps


def _by_length(job: JobOutline, longest: int) -> list[tuple[int, int]]:
    counts: Counter[int] = Counter()
    for it in job.classes:
        if 0 < it.prompt_tokens <= longest:
            counts[it.prompt_tokens] += it.count
    return sorted(counts.items(), reverse=True)
