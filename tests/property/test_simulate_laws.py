"""Laws of playing a job: against brute force step by step, and what must never be slower."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.plan.batch import ItemClass, JobOutline
from loadmaster.plan.rates import Rates
from loadmaster.plan.simulate import simulate
from loadmaster.plan.speed import Traffic
from loadmaster.plan.steps import Step, StepCosts
from loadmaster.plan.types import EngineSettings
from tests.job_parts import toy_setting

SETTINGS = toy_setting()
items = st.lists(
    st.builds(
        ItemClass,
        count=st.integers(1, 3),
        prompt_tokens=st.integers(1, 400),
        output_tokens=st.integers(1, 60),
    ),
    min_size=1,
    max_size=5,
)
jobs = st.builds(lambda classes: JobOutline(classes=tuple(classes)), items)


@dataclass(slots=True)
class _One:
    prompt: int
    output: int
    fed: int = 0
    generated: int = 0


def _brute(traffic: Traffic, rates: Rates, settings: EngineSettings, job: JobOutline) -> float:
    """Every step by itself, every sequence by itself; cells are ample."""
    costs = StepCosts(traffic, rates, settings)
    queue = [
        _One(it.prompt_tokens, it.output_tokens) for it in job.classes for _ in range(it.count)
    ]
    running: list[_One] = []
    seconds = 0.0
    while queue or running:
        while queue and len(running) < settings.n_seq_max:
            running.append(queue.pop(0))
        decoding = [one for one in running if one.fed == one.prompt]
        room, chunks = settings.n_ubatch - len(decoding), []
        for one in running:
            if one.fed < one.prompt and room:
                chunks.append((one, min(room, one.prompt - one.fed)))
                room -= chunks[-1][1]
        fed = sum(n for _, n in chunks)
        ended = [one for one, n in chunks if one.fed + n == one.prompt]
        seconds += costs.seconds(
            Step(
                n_decode=len(decoding),
                n_prefill=fed,
                n_outputs=len(decoding) + len(ended),
                decode_cells=_mean([one.prompt + one.generated - 0.5 for one in decoding]),
                prefill_cells=sum(n * (one.fed + n / 2) for one, n in chunks) / max(1, fed),
                used_cells=sum(one.fed + max(0, one.generated - 1) for one in running)
                + (len(decoding) + fed) / 2,
            )
        )
        if settings.n_seq_max > 1:
            seconds += 20e-6 + 12e-6 * (len(decoding) + len(ended))  # the driver's own
        for one, n in chunks:
            one.fed += n
        for one in (*decoding, *ended):
            one.generated += 1
        running = [one for one in running if one.generated < one.output]
    return seconds


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@given(jobs, st.sampled_from([1, 3, 8]))
def test_playing_is_as_brute_force(job: JobOutline, n_seq_max: int) -> None:
    traffic, rates, settings = SETTINGS
    settings = replace(settings, n_seq_max=n_seq_max, n_ctx=1 << 16)
    played = simulate(traffic, rates, settings, job).seconds
    assert played == pytest.approx(_brute(traffic, rates, settings, job), rel=0.02)


@given(jobs, st.integers(1, 4))
def test_more_items_never_end_sooner(job: JobOutline, more: int) -> None:
    """Without sending weights: there one token more may be what makes a step quicker."""
    traffic, rates, settings = SETTINGS
    settings = replace(settings, op_offload=False)
    longer = replace(
        job, classes=(*job.classes, ItemClass(count=more, prompt_tokens=9, output_tokens=5))
    )
    before = simulate(traffic, rates, settings, job).seconds
    assert simulate(traffic, rates, settings, longer).seconds >= before


@given(jobs, st.integers(0, 300), st.integers(1, 40))
def test_longer_items_never_end_sooner(job: JobOutline, prompt: int, output: int) -> None:
    traffic, rates, settings = SETTINGS
    settings = replace(settings, n_seq_max=1, kv_unified=False, op_offload=False)
    longer = replace(
        job,
        classes=tuple(
            replace(
                it,
                prompt_tokens=it.prompt_tokens + prompt,
                output_tokens=it.output_tokens + output,
            )
            for it in job.classes
        ),
    )
    before = simulate(traffic, rates, settings, job).seconds
    assert simulate(traffic, rates, settings, longer).seconds > before


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 40), st.integers(2, 9))
def test_everyone_ends_whatever_the_cells(prompt: int, output: int, count: int, times: int) -> None:
    traffic, rates, settings = SETTINGS
    settings = replace(settings, n_ctx=times * 128)
    job = JobOutline(classes=(ItemClass(count=count, prompt_tokens=prompt, output_tokens=output),))
    found = simulate(traffic, rates, settings, job)
    assert found.n_items == count
    assert found.prefilled_tokens == count * prompt
    assert found.generated_tokens == count * output
