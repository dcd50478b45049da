"""Beside the plan of a checkpoint: a server for several GPUs, a machine that holds it."""

from dataclasses import replace

from loadmaster.engine.types import EngineBuild
from loadmaster.errors import UsageError
from loadmaster.machine.profiles import load_profile, profile_names
from loadmaster.machine.target import for_target
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.shapes.library import is_shape, load_shape, parse_shape
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_planner import plan_checkpoint
from loadmaster.plan.hf_vllm import server_note
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import CPU, Alternative, DoesNotFit, Knobs, Plan
from loadmaster.tasks.planning import PlanRequest


def with_server(plan: Plan, request: PlanRequest, reference: str) -> Plan:
    """The plan with the command of an engine that lets several GPUs work at the same time."""
    model = request.model
    if not isinstance(model, CheckpointSpec) or _n_gpus(plan) < 2:
        return plan
    if is_shape(reference):
        reference = load_shape(parse_shape(reference).name).published
    note = server_note(reference, model, request.machine, plan, request.budget)
    return plan if note is None else replace(plan, notes=(*plan.notes, note))


def _n_gpus(plan: Plan) -> int:
    return sum(device.id != CPU for device in plan.devices)


def with_machine(refusal: DoesNotFit, request: PlanRequest) -> DoesNotFit:
    """The refusal with the shipped machine of the least VRAM that holds the model as asked for."""
    model = request.model
    assert isinstance(model, CheckpointSpec)
    weights = sum(device.of("model") for device in refusal.devices)
    least = max(_vram(request.machine) + 1, weights)
    for machine in sorted(map(load_profile, profile_names()), key=_vram):
        if _vram(machine) < least:
            continue
        outcome = _on(machine, model, request)
        if isinstance(outcome, Plan):
            found = Alternative(
                flags=("--machine", machine.name),
                what="another machine",
                decode_tok_s=outcome.predicted.decode_tok_s,
            )
            return replace(refusal, nearest=(*refusal.nearest, found))
    return refusal


def _on(machine: Machine, model: CheckpointSpec, request: PlanRequest) -> Plan | DoesNotFit | None:
    knobs: Knobs = replace(request.knobs, n_gpu_layers=None, layers_per_device=None)
    try:
        return plan_checkpoint(
            machine, model, request.workload, make_budget(machine), knobs,
            default_overheads(machine.gpus), alternatives=False,
        )  # fmt: skip
    except UsageError:
        return None  # not an engine for this machine


def undriven(machine: Machine, build: EngineBuild) -> str | None:
    """What to type where torch is built without the GPUs that are here; None where it is not."""
    gpu = next((gpu for gpu in machine.gpus if gpu.backend in ("cuda", "rocm")), None)
    if gpu is None or for_target(machine, build.target).gpus:
        return None
    torch = build.version.partition(",")[0]
    if gpu.backend == "rocm":
        return f"{gpu.name} is here, and {torch} is built without ROCm: install one that has it"
    return (
        f"{gpu.name} is here, and {torch} is built without CUDA: `pip install --force-reinstall "
        "torch` brings one that has it, on Linux"
    )


def _vram(machine: Machine) -> int:
    return sum(gpu.total_bytes for gpu in machine.gpus)
