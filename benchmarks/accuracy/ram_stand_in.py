"""Opens a model on a stand-in GPU as the command would on a real one; a process of its own.

    python -m benchmarks.accuracy.ram_stand_in FILE N_CTX KV_TYPE N_UBATCH N_THREADS SHARE BUDGET

The stand-in has SHARE of what the model takes with all layers on it. Without a budget (0) it prints
the plan; with one it opens the model, decodes a few tokens and prints the plan.
"""

import json
import sys
from pathlib import Path

from benchmarks.accuracy.stand_in import (
    SizingEngine,
    budget_of,
    devices_of,
    generate_some,
    plan_with,
)
from benchmarks.accuracy.stand_in import stand_in_machine as machine_of
from loadmaster.engine.builds import find_build
from loadmaster.engine.process import Engine
from loadmaster.engine.types import LoadRequest
from loadmaster.machine.types import Machine
from loadmaster.model.source import read_model
from loadmaster.plan.codec import plan_to_json
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import Knobs, Plan, Workload
from loadmaster.tasks.template import ChatTemplate
from loadmaster.units import GIB


def main(words: list[str]) -> None:
    path, n_ctx, kv_type, n_ubatch, n_threads, share, budget = words
    knobs = Knobs(type_k=kv_type, type_v=kv_type, n_ubatch=int(n_ubatch), n_threads=int(n_threads))
    plan, machine = _plan(Path(path), Workload(n_ctx=int(n_ctx)), knobs, float(share), int(budget))
    if int(budget):
        _open(plan, machine)
        print(json.dumps({"plan": plan_to_json(plan)}))
    else:
        print(json.dumps(plan_to_json(plan)))


def _plan(
    path: Path, workload: Workload, knobs: Knobs, share: float, budget: int
) -> tuple[Plan, Machine]:
    model = read_model(path)
    build = find_build()
    with SizingEngine(build, 1) as sizing:
        roomy = machine_of([64 * GIB])
        whole = plan_with(sizing, roomy, model, workload, knobs)
        assert isinstance(whole, Plan)
        machine = machine_of([int(whole.device("gpu:0").planned_bytes * share)])
        caps = budget_of(machine, budget or 64 * GIB)
        overheads = default_overheads(machine.gpus)
        plan = plan_with(sizing, machine, model, workload, knobs, budget=caps, overheads=overheads)
    assert isinstance(plan, Plan), "the plan's own total does not fit it"
    return plan, machine


def _open(plan: Plan, machine: Machine) -> None:
    """Load and use the plan.

    A session would count the device's bytes, which are host memory, against the RAM cap.
    """
    model = read_model(plan.model_files[0])
    request = LoadRequest(
        model_path=model.path,
        model_stamp=plan.model_stamp,
        settings=plan.llamacpp,
        ram_cap_bytes=None,
    )
    with (
        ChatTemplate(model.chat_template),
        Engine.start(find_build(), devices=devices_of(machine)) as engine,
    ):
        loaded = engine.load(request)
        engine.commit_peak()
        generate_some(engine, plan, loaded)


if __name__ == "__main__":
    main(sys.argv[1:])
