"""`doctor --measure`: what this machine's memory, link, disk and kernels really do.

Every figure is timed by a worker with the engine's own kernels, on weights that overflow the
caches. What disturbs a run only lengthens it, so of a few runs the second shortest counts; a
disturbed question is asked again. The order is by importance: what the time limit cuts off is the
rarer types of weights.
"""

import datetime
import time
from collections.abc import Callable
from pathlib import Path

from loadmaster.engine.process import Engine
from loadmaster.engine.timing import TimeProducts
from loadmaster.engine.types import EngineBuild
from loadmaster.machine.measurements import AttentionTime, DeviceTimes, Measurements, ProductTime
from loadmaster.machine.types import Machine
from loadmaster.plan.types import CPU
from loadmaster.tasks.measuring.asking import Ask, Asker
from loadmaster.tasks.measuring.attention import attention_times, hidden_cell_s
from loadmaster.tasks.measuring.disk import disk_read_bytes_s
from loadmaster.tasks.measuring.operations import (
    copy_bytes_s,
    link_bytes_s,
    node_s,
    ram_read,
    small_s,
)
from loadmaster.tasks.measuring.products import (
    ALL_POINTS,
    COMMON_TYPES,
    EXPERT_TYPES,
    FEW_POINTS,
    OTHER_TYPES,
    SECOND_POINTS,
    expert_times,
    merged,
    product_times,
)
from loadmaster.tasks.measuring.scale import CARD_SCALE, cpu_scale
from loadmaster.tasks.measuring.step import probe_steps, step_s

TIME_LIMIT_S = 17.0
# A card does a 4096 × 4096 product of 64 tokens faster than this; nothing else does.
_CARD_S = 1e-3


def measure_machine(
    build: EngineBuild,
    machine: Machine,
    folder: Path,
    *,
    n_threads: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Measurements:
    """Time everything, in a worker of its own; `folder` is where models are kept.

    Raises:
        EngineError: the worker died.
    """
    threads = n_threads or machine.cpu.physical_cores or machine.cpu.logical_cores
    start = time.monotonic()
    report("disk")
    disk = disk_read_bytes_s(folder)
    report("a step")
    with Engine.start(build) as engine:
        steps = probe_steps(engine, threads)
    with Engine.start(build) as engine:
        asker = Asker(engine.time, deadline=start + TIME_LIMIT_S)
        names = {facts.id: facts.description for facts in engine.devices()}
        names = {CPU: machine.cpu.name or "CPU", **names}
        report("RAM")
        ram = ram_read(asker, threads)
        measured = []
        for index, (device, name) in enumerate(names.items()):
            report(f"{device} {name}")
            asker.share(len(names) - index)
            measured.append(measure_device(asker, device, name, threads))
    return Measurements(
        taken=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        ram_read_bytes_s=ram,
        disk_read_bytes_s=disk,
        step_s=step_s(steps, measured[0].node_s),
        spread=asker.spread,
        devices=tuple(measured),
    )


def measure_device(ask: Asker, device: str, name: str, threads: int) -> DeviceTimes:
    """One device: what every model needs first, then common types of weights, then rarer ones."""
    card = device != CPU and _is_card(ask, device)
    scale = CARD_SCALE if card else cpu_scale(threads)
    norm, gate, rope = (small_s(ask, device, kind, scale) for kind in ("norm", "gate", "rope"))
    node, hidden = node_s(ask, device, scale), hidden_cell_s(ask, device, scale)
    links = [link_bytes_s(ask, device, pinned=p) if device != CPU else None for p in (True, False)]
    products: list[ProductTime] = []
    missing = [] if device == CPU or links[0] else ["link from page-locked memory"]
    attention: tuple[AttentionTime, ...] = ()
    for quant in (*COMMON_TYPES, *OTHER_TYPES):
        common = quant in COMMON_TYPES
        if not common and not attention:
            attention = tuple(attention_times(ask, device, scale))
        found = product_times(ask, device, quant, scale, ALL_POINTS if common else FEW_POINTS)
        found += expert_times(ask, device, quant, scale) if quant in EXPERT_TYPES else []
        products += found
        missing += [] if found else [f"{quant} (time limit)" if ask.late else quant]
    again = [
        row
        for quant in COMMON_TYPES
        for row in product_times(ask, device, quant, scale, SECOND_POINTS)
    ]
    return DeviceTimes(
        id=device,
        name=name,
        n_threads=threads if device == CPU else 0,
        products=tuple(merged(products, again)),
        attention=attention,
        hidden_cell_s=hidden,
        node_s=node,
        norm_s=norm,
        gate_s=gate,
        rope_s=rope,
        memory_bytes_s=copy_bytes_s(ask, device, scale) if device != CPU else None,
        pinned_bytes_s=links[0],
        pageable_bytes_s=links[1],
        not_measured=tuple(missing),
    )


def _is_card(ask: Ask, device: str) -> bool:
    seconds = ask(
        TimeProducts(
            device=device, n_threads=0, type="f16", repacked=False, n_in=4096, n_out=4096,
            n_matrices=1, points=((64, 1),), runs=2,
        )
    )  # fmt: skip
    return bool(seconds) and min(seconds or (1.0,)) < _CARD_S
