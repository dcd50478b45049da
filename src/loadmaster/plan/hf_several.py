"""What a plan over several GPUs comes to: whose turn takes how long, who waits, what links carry.
Pure.

Layers run one GPU after another, for one sequence as for many: a step passes every GPU once.
"""

from collections.abc import Iterator

from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_placement import SPEED_TOLERANCE
from loadmaster.plan.hf_speed import HfSpeed, decoding, speed_of
from loadmaster.plan.types import CPU, DevicePlan, StageShare, TransformersSettings, Workload
from loadmaster.units import format_size

_LINK_SHARE = 0.05  # of a token: below it a link is not worth a thought


def stage_shares(
    machine: Machine, model: CheckpointSpec, settings: TransformersSettings, workload: Workload
) -> tuple[StageShare, ...]:
    """Each GPU's part of a token, where there are several; none without figures."""
    speed = speed_of(machine, model, settings)
    if len(speed.stages) < 2 or speed.basis == "unknown":
        return ()
    seconds = speed.stage_seconds(decoding(1, workload.prompt_tokens))
    return tuple(
        StageShare(device=stage.device, n_layers=stage.n_layers, decode_s=time)
        for stage, time in zip(speed.stages, seconds, strict=True)
    )


def notes_of_several(
    machine: Machine,
    model: CheckpointSpec,
    settings: TransformersSettings,
    devices: tuple[DevicePlan, ...],
    workload: Workload,
) -> Iterator[str]:
    """Balance, who waits, and which link bounds it; nothing where there is one GPU."""
    gpus = [device for device in devices if device.id != CPU and device.of("model")]
    if len(gpus) < 2:
        return
    n = len(gpus)
    yield (
        f"layers are split over {n} GPUs and run one after another: for one sequence "
        f"{n - 1} of {n} wait at any moment (a pipeline bubble of {100 * (n - 1) / n:.0f} %), and "
        "more GPUs are no faster"
    )
    yield _balance(machine, gpus)
    speed = speed_of(machine, model, settings)
    if speed.basis != "unknown":
        yield _links(speed, workload)


def _balance(machine: Machine, gpus: list[DevicePlan]) -> str:
    speeds = [machine.gpu(gpu.id).bandwidth_bytes_s or 0 for gpu in gpus]
    if max(speeds) > SPEED_TOLERANCE * min(speeds):
        return (
            "GPUs that are faster are filled first: at batch 1 a token takes the sum of their "
            "times, whatever is left on the others"
        )
    filled = [100 * gpu.planned_bytes / max(1, gpu.budget_bytes) for gpu in gpus]
    low, high = f"{min(filled):.0f}", f"{max(filled):.0f}"
    even = f"{low if low == high else f'{low} to {high}'} % of their budgets"
    return f"GPUs are equally fast, so they are filled evenly: {even}"


def _links(speed: HfSpeed, workload: Workload) -> str:
    """What passes between GPUs for a token, beside what the token takes."""
    costs = speed.of(decoding(1, workload.prompt_tokens))
    whole, handover = sum(costs.values()), costs["handover"]
    row = format_size(speed.handover_bytes)
    prompt = format_size(speed.handover_bytes * speed.settings.n_ubatch)
    passes = (
        f"between two GPUs {row} pass for a token and {prompt} for a step of a prompt, over "
        f"{speed.link_bytes_s / 1e9:.0f} GB/s: {1000 * handover:.2f} ms of a token's "
        f"{1000 * whole:.0f}"
    )
    streamed = costs.get("link", 0.0)
    if streamed > handover:
        share = 100 * streamed / whole
        return f"{passes}; the link to the CPU's layers takes {share:.0f} % and bounds it"
    if handover < _LINK_SHARE * whole:
        return f"{passes}, so no link bounds it"
    return f"{passes}: the link between them bounds it"
