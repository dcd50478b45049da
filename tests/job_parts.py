"""A machine and settings for playing jobs: costs of a step without an engine."""

from dataclasses import replace
from typing import Any

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec
from loadmaster.plan.batch import ItemClass, JobOutline
from loadmaster.plan.forecast import forecast
from loadmaster.plan.job_planning import JobPlan, job_planning
from loadmaster.plan.rates import Rates
from loadmaster.plan.speed import Traffic
from loadmaster.plan.types import (
    DoesNotFit,
    EngineSettings,
    Knobs,
    Plan,
    Sizing,
    SizingFailure,
    Workload,
)
from loadmaster.units import MIB
from tests.toy import NO_OVERHEADS, plan_toy, toy_budget, toy_engine, toy_machine, toy_model


def toy_setting(
    n_seq_max: int = 8, n_ctx: int = 4096, **changes: Any
) -> tuple[Traffic, Rates, EngineSettings]:
    """What a toy model moves on a toy machine, half of it on the GPU."""
    machine, model = toy_machine(4 * MIB), toy_model(n_layer=6)
    plan = plan_toy(model, machine, workload=Workload(n_ctx=512))
    assert isinstance(plan, Plan)
    settings = replace(
        plan.llamacpp, n_seq_max=n_seq_max, n_ctx=n_ctx, kv_unified=n_seq_max > 1, n_ubatch=128,
        **changes,
    )  # fmt: skip
    found = forecast(machine, model, settings)
    return found.traffic, found.rates, settings


def job_of(*items: tuple[int, int, int, int], prefix: int = 0) -> JobOutline:
    """Classes as (count, prompt, output, shared)."""
    return JobOutline(
        classes=tuple(
            ItemClass(count=n, prompt_tokens=p, output_tokens=o, shared_tokens=s)
            for n, p, o, s in items
        ),
        prefix_tokens=prefix,
    )


def plan_job_toy(
    model: ModelSpec,
    machine: Machine,
    job: JobOutline,
    *,
    workload: Workload | None = None,
    knobs: Knobs | None = None,
    bounds: bool = False,
) -> JobPlan | DoesNotFit:
    """Plan a job to the end, answering every question with the toy engine."""
    engine = toy_engine(model, machine)
    sizes: dict[EngineSettings, Sizing | SizingFailure] = {}
    steps = job_planning(
        machine, model, job, workload or Workload(), toy_budget(machine), knobs or Knobs(),
        NO_OVERHEADS, None if bounds else sizes,
    )  # fmt: skip
    try:
        while True:
            sizes.update({settings: engine(settings) for settings in next(steps).settings})
    except StopIteration as end:
        outcome: JobPlan | DoesNotFit = end.value
        return outcome
