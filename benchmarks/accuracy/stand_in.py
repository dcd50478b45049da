"""A stand-in GPU for the benchmarks: plans made with the engine's own sizes, and loads of them.

The stand-in is a virtual device of the engine: it computes on the CPU, lies in host memory, refuses
what is beyond its size and counts what it gave. Its bandwidths are those of a 24 GiB card, so that
the planner prefers it to the host as it would a real one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loadmaster.engine.process import Engine
from loadmaster.engine.types import (
    DoneEvent,
    EngineBuild,
    GenerateRequest,
    LoadedModel,
    LoadRequest,
    MemoryReport,
    SamplingParams,
    VirtualDevice,
)
from loadmaster.machine.types import Cpu, Gpu, Machine, Ram, SizingRules
from loadmaster.model.stamp import model_stamp
from loadmaster.model.types import ModelSpec
from loadmaster.plan.planner import planning
from loadmaster.plan.types import (
    CPU,
    Budget,
    BufferSizes,
    DoesNotFit,
    EngineSettings,
    Kind,
    Knobs,
    Overheads,
    Plan,
    Sizing,
    SizingFailure,
    Workload,
)
from loadmaster.units import GIB, Bytes

CUDA_RULES = SizingRules(
    alignment_bytes=128, row_padding=512, offload_min_batch=32, pinned_host=True
)
RAM_BYTES = Bytes(16 * GIB)
# A stand-in has no context and no pools; the host's side is the business of `ram`.
NO_OVERHEADS = Overheads(
    device_bytes={}, device_source="calibrated", process_bytes=Bytes(0), process_source="calibrated"
)
N_DECODED = 6


# The models are a thousandth of real ones, and so are the rates of a RTX 3090 and its host here: a
# handover, which takes as long as it does, then weighs against bytes as it does with real ones.
SCALE = 1000


def stand_in_machine(device_bytes: Sequence[int], n_threads: int = 1) -> Machine:
    """A machine with one stand-in GPU for each size."""
    gpus = tuple(_gpu(index, size) for index, size in enumerate(device_bytes))
    cpu = Cpu(
        name="host", architecture="x86_64", physical_cores=n_threads, logical_cores=n_threads,
        isa=(),
    )  # fmt: skip
    ram = Ram(
        total_bytes=RAM_BYTES, available_bytes=RAM_BYTES, swap_total_bytes=Bytes(0),
        swap_free_bytes=Bytes(0), cgroup_version=None, cgroup_limit_bytes=None,
        cgroup_used_bytes=None, mlock_limit_bytes=None, bandwidth_bytes_s=60 * 10**9 // SCALE,
    )  # fmt: skip
    return Machine(name="stand-in", os="Linux", wsl=None, cpu=cpu, ram=ram, gpus=gpus)


def _gpu(index: int, size: int) -> Gpu:
    return Gpu(
        id=f"gpu:{index}", name="stand-in", vendor="virtual", backend="virtual",
        total_bytes=Bytes(size), free_bytes=Bytes(size), free_source="engine",
        unified_memory=False, rules=CUDA_RULES, bandwidth_bytes_s=936 * 10**9 // SCALE,
        link_bytes_s=24 * 10**9 // SCALE,
    )  # fmt: skip


def devices_of(machine: Machine) -> tuple[VirtualDevice, ...]:
    """The virtual devices that stand for the machine's GPUs."""
    return tuple(
        VirtualDevice(id=gpu.id, total_bytes=gpu.total_bytes, rules=gpu.rules)
        for gpu in machine.gpus
    )


def budget_of(machine: Machine, ram_bytes: int = RAM_BYTES) -> Budget:
    """Every stand-in whole, and so much of the host."""
    caps = {gpu.id: gpu.total_bytes for gpu in machine.gpus} | {CPU: Bytes(ram_bytes)}
    return Budget(caps=caps, origin=dict.fromkeys(caps, "benchmark"))


class SizingEngine:
    """A worker that only sizes, on stand-ins larger than anything; it remembers its answers."""

    def __init__(self, build: EngineBuild, n_devices: int) -> None:
        machine = stand_in_machine([256 * GIB] * n_devices)
        self._engine = Engine.start(build, devices=devices_of(machine))
        self._known: dict[tuple[Path, EngineSettings], Sizing | SizingFailure] = {}

    def size(self, path: Path, settings: EngineSettings) -> Sizing | SizingFailure:
        key = (path, settings)
        if key not in self._known:
            self._known[key] = self._engine.size(path, settings)
        return self._known[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()


def plan_with(
    sizing: SizingEngine,
    machine: Machine,
    model: ModelSpec,
    workload: Workload,
    knobs: Knobs,
    *,
    budget: Budget | None = None,
    overheads: Overheads = NO_OVERHEADS,
) -> Plan | DoesNotFit:
    """Plan to the end, every figure from the engine."""
    sizes: dict[EngineSettings, Sizing | SizingFailure] = {}
    steps = planning(
        machine, model, workload, budget or budget_of(machine), knobs, overheads, sizes,
        stamp=model_stamp(model), alternatives=False,
    )  # fmt: skip
    while True:
        try:
            wanted = next(steps).settings
        except StopIteration as done:
            outcome: Plan | DoesNotFit = done.value
            return outcome
        sizes.update({settings: sizing.size(model.path, settings) for settings in wanted})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a real load of a plan took: right after it, and after decoding."""

    loaded: MemoryReport
    decoded: MemoryReport
    n_generated: int


def try_plan(
    build: EngineBuild, plan: Plan, devices: Sequence[VirtualDevice], *, has_words: bool = True
) -> Trial:
    """Load a plan in a worker of its own, prefill a full n_ubatch and decode a few tokens.

    A model without a vocabulary (`has_words`) cannot generate: it commits its peak instead, which
    is one such prefill and a decode of one token.

    Raises:
        EngineError: the engine refused an allocation, or died.
    """
    request = LoadRequest(
        model_path=Path(plan.model_files[0]),
        model_stamp=plan.model_stamp,
        settings=plan.llamacpp,
        ram_cap_bytes=None,
    )
    min_batch = plan.llamacpp.op_offload_min_batch
    with Engine.start(build, devices=devices, min_batch=min_batch) as engine:
        loaded = engine.load(request, files=[Path(path) for path in plan.model_files])
        before = engine.memory()
        if not has_words:
            return Trial(loaded=before, decoded=engine.commit_peak(0.1), n_generated=0)
        n_generated = generate_some(engine, plan, loaded)
        return Trial(loaded=before, decoded=engine.memory(), n_generated=n_generated)


def generate_some(engine: Engine, plan: Plan, loaded: LoadedModel) -> int:
    """Prefill a full n_ubatch and decode a few tokens; the number of these."""
    n_prompt = max(1, min(plan.llamacpp.n_ubatch, loaded.n_ctx_seq - N_DECODED - 1))
    prompt = tuple(3 + i % max(1, min(250, loaded.n_vocab - 8)) for i in range(n_prompt))
    request = GenerateRequest(
        request_id="trial",
        prompt=prompt,
        max_tokens=N_DECODED,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
    )
    *_, last = engine.generate(request)
    assert isinstance(last, DoneEvent)
    return last.n_generated


def buffer_error_bytes(plan: Plan, report: MemoryReport) -> int:
    """Planned less measured over model, context and compute buffers of all devices, unsigned.

    Mapped weights on the host are left out: they are pages of the file, and the engine reports the
    span of the file from the first to the last of them.
    """
    planned = {device.id: device for device in plan.devices}
    mapped = plan.llamacpp.load_mode != "none"
    error = 0
    for row in report.buffers:
        device = planned.get(row.device)
        for kinds, measured in _measured(row):
            if not (mapped and row.device == CPU and "model" in kinds):
                error += abs((device.of(*kinds) if device else 0) - measured)
    return error


def _measured(row: BufferSizes) -> Iterator[tuple[tuple[Kind, ...], Bytes]]:
    yield ("model",), row.model_bytes
    yield ("kv", "recurrent"), row.context_bytes
    yield ("compute",), row.compute_bytes


def counter_error_bytes(report: MemoryReport) -> int:
    """The devices' own counters against the engine's breakdown, unsigned."""
    sums = {
        row.device: row.model_bytes + row.context_bytes + row.compute_bytes
        for row in report.buffers
    }
    used: Mapping[str, Bytes | None] = report.device_used_bytes
    return sum(abs((value or 0) - sums.get(device, 0)) for device, value in used.items())


__all__ = [
    "SizingEngine",
    "Trial",
    "budget_of",
    "buffer_error_bytes",
    "counter_error_bytes",
    "devices_of",
    "generate_some",
    "plan_with",
    "stand_in_machine",
    "try_plan",
]
