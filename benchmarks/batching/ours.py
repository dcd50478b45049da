"""Our side: the worker with its scheduler, under a plan's ledger, given every request at once."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.accuracy.stand_in import SizingEngine, devices_of, plan_with, stand_in_machine
from benchmarks.batching import solo
from benchmarks.batching.jobs import Item, Job
from benchmarks.batching.outcome import Outcome
from benchmarks.quiet import Beside
from loadmaster.engine.process import Engine
from loadmaster.engine.sizing import Sizer
from loadmaster.engine.types import (
    DoneEvent,
    EngineBuild,
    GenerateEvent,
    GenerateRequest,
    LoadRequest,
    MemoryReport,
    SamplingParams,
    TextEvent,
    VirtualDevice,
)
from loadmaster.machine.types import Machine
from loadmaster.model.source import read_model
from loadmaster.model.stamp import model_stamp
from loadmaster.model.types import ModelSpec
from loadmaster.plan.batch import JobOutline as Outline
from loadmaster.plan.batch import outline_of
from loadmaster.plan.budget import make_budget
from loadmaster.plan.choices import base_settings, first_choice
from loadmaster.plan.ledger import Books, device_plans, with_states
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.simulate import job_prediction
from loadmaster.plan.types import CPU, DevicePlan, EngineSettings, Knobs, Plan, Sizing, Workload
from loadmaster.units import GIB, Bytes

SEQUENCES = (4, 8, 16, 32, 64)
MOST_SEQUENCES = 64
GPU = "gpu:0"
CELL_STEP = 256  # the engine rounds a sequence's cells up to a multiple of this


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model under settings, the ledger its processes must keep to, and the time a job takes."""

    build: EngineBuild
    model: ModelSpec
    settings: EngineSettings
    devices: tuple[DevicePlan, ...]
    virtual: tuple[VirtualDevice, ...] = ()  # stand-ins for the GPUs of the settings
    predicted_s: float | None = None

    @property
    def ram_bytes(self) -> Bytes:
        """The plan's total for the host: the worker's hard cap. A stand-in's memory is there."""
        return Bytes(sum(it.planned_bytes for it in self.devices))

    @property
    def state_bytes(self) -> Bytes:
        """The plan's line for the states of preempted requests."""
        return next(it.of("cache") for it in self.devices if it.id == CPU)

    def command(self) -> str:
        """The settings that matter beside a peer's command line."""
        s = self.settings
        cache = "one cache" if s.kv_unified else f"caches of {s.n_ctx // s.n_seq_max}"
        predicted = "" if self.predicted_s is None else f", predicted {self.predicted_s:.1f} s"
        return (
            f"loadmaster, {self.model.path.name}: n_ctx {s.n_ctx}, {s.n_seq_max} sequences, "
            f"{cache}, {s.n_threads} threads, n_ubatch {s.n_ubatch}, "
            f"RAM cap {self.ram_bytes / 2**20:.0f} MiB{predicted}"
        )


def plan_for(
    build: EngineBuild, machine: Machine, path: Path, job: Job, n_threads: int
) -> tuple[Setup, list[str]]:
    """The sequences, and one cache or one for each, that are predicted to end the job first."""
    model = read_model(path)
    considered = [
        (job_prediction(machine, model, settings, outline(job)).seconds, settings)
        for settings in _candidates(model, job, n_threads)
    ]
    seconds, settings = min(considered, key=lambda pair: pair[0])
    devices = _ledger(build, machine, model, settings)
    lines = [f"    {_words(each)}: predicted {took:.1f} s" for took, each in considered]
    setup = Setup(build=build, model=model, settings=settings, devices=devices, predicted_s=seconds)
    return setup, lines


def fixed(
    build: EngineBuild, machine: Machine, path: Path, job: Job, n_threads: int, n_seq_max: int
) -> Setup:
    """So many sequences in one cache, whatever would be faster."""
    model = read_model(path)
    settings = _many(_alone(model, job, n_threads), n_seq_max)
    return Setup(
        build=build,
        model=model,
        settings=settings,
        devices=_ledger(build, machine, model, settings),
        predicted_s=job_prediction(machine, model, settings, outline(job)).seconds,
    )


def on_stand_in(build: EngineBuild, path: Path, job: Job, n_threads: int, n_seq_max: int) -> Setup:
    """The same on a stand-in GPU that is exactly as large as the plan."""
    model = read_model(path)
    workload = Workload(n_ctx=job.longest + 1, n_seq_max=n_seq_max, n_cells=job.n_ctx)
    knobs = Knobs(n_threads=n_threads)
    with SizingEngine(build, 1) as sizing:
        machine = stand_in_machine([GIB], n_threads)
        overheads = default_overheads(machine.gpus)
        plan = plan_with(sizing, machine, model, workload, knobs, overheads=overheads)
    assert isinstance(plan, Plan), plan
    machine = stand_in_machine([plan.device(GPU).planned_bytes], n_threads)
    return Setup(
        build=build,
        model=model,
        settings=plan.llamacpp,
        devices=plan.devices,
        virtual=devices_of(machine),
    )


def outline(job: Job) -> Outline:
    """The job as the planner knows it."""
    items = sorted(job.items, key=lambda item: -item.n_cells)
    return outline_of([(item.prompt, item.n_out) for item in items])


def _words(settings: EngineSettings) -> str:
    cache = "one cache" if settings.kv_unified else "a cache each"
    return f"{settings.n_seq_max} sequences, {cache}"


def _candidates(model: ModelSpec, job: Job, n_threads: int) -> Iterator[EngineSettings]:
    """Numbers of sequences in the cells that are given."""
    alone = _alone(model, job, n_threads)
    most = min(MOST_SEQUENCES, len(job.items))
    for n in sorted({n for n in SEQUENCES if n < most} | {most}):
        many = _many(alone, n)
        yield many
        each = job.n_ctx // n // CELL_STEP * CELL_STEP
        if n > 1 and job.longest <= each:
            yield replace(many, n_ctx=n * each, kv_unified=False)


def _alone(model: ModelSpec, job: Job, n_threads: int) -> EngineSettings:
    """One sequence in the job's cells, on the CPU."""
    workload, knobs = Workload(n_ctx=job.n_ctx), Knobs(op_offload=False)
    choice = first_choice(model, workload, knobs)
    return base_settings(choice, workload, knobs, n_gpus=0, n_threads=n_threads)


def _many(settings: EngineSettings, n: int) -> EngineSettings:
    return replace(settings, n_seq_max=n, n_outputs_max=n, kv_unified=True)


def _ledger(
    build: EngineBuild, machine: Machine, model: ModelSpec, settings: EngineSettings
) -> tuple[DevicePlan, ...]:
    """With the engine's own sizes."""
    with Sizer(build, ()) as sizer:
        sizing = sizer.sizes(model, [settings])[settings]
    assert isinstance(sizing, Sizing), sizing
    books = Books(
        model=model,
        gpus=(),
        budget=make_budget(machine),
        overheads=default_overheads(()),
        cpu_isa=machine.cpu.isa,
    )
    return with_states(device_plans(books, settings, sizing), settings)


@contextmanager
def opened(setup: Setup) -> Iterator[Engine]:
    """The model, loaded under the plan's own RAM total as a hard cap, its peak committed."""
    with Engine.start(setup.build, devices=setup.virtual, ram_cap_bytes=setup.ram_bytes) as engine:
        engine.load(
            LoadRequest(
                model_path=setup.model.path,
                model_stamp=model_stamp(setup.model),
                settings=setup.settings,
                ram_cap_bytes=setup.ram_bytes,
                state_bytes=setup.state_bytes,
            )
        )
        engine.commit_peak()
        yield engine


def run_ours(engine: Engine, setup: Setup, job: Job, *, keep_tokens: bool = False) -> Outcome:
    """The whole job, all requests submitted before the first event is read."""
    requests = [_request(index, item, keep_tokens) for index, item in enumerate(job.items)]
    # As `batch` runs the items of a job: long ones first, so that no few are left at the end.
    order = sorted(range(len(requests)), key=lambda i: -job.items[i].n_cells)
    before, beside = engine.stats(), Beside(engine.pid)
    start = time.perf_counter()
    streams = {index: engine.generate(requests[index]) for index in order}
    results = [_result(streams[index]) for index in range(len(requests))]
    seconds = time.perf_counter() - start
    others, after = beside.share(), engine.stats()
    done = [result.done for result in results if result.done.finish_reason == "length"]
    failures = Counter(
        r.done.error or r.done.finish_reason for r in results if r.done.finish_reason != "length"
    )
    return Outcome(
        name="ours",
        command=setup.command(),
        n_requests=len(requests),
        seconds=seconds,
        completed=len(done),
        prefilled=after.n_prefilled_tokens - before.n_prefilled_tokens,
        generated=sum(it.n_generated for it in done),
        failures=failures,
        notes=f"{after.n_steps - before.n_steps} steps, {after.n_preempted} preempted",
        others=others,
        prefill_s=sum(it.prefill_s for it in done),
        decode_s=sum(it.decode_s for it in done),
        tokens=[result.tokens for result in results] if keep_tokens else (),
    )


def _request(index: int, item: Item, keep_tokens: bool) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"r{index}",
        prompt=item.prompt,
        max_tokens=item.n_out,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
        priority=1,
        top_logprobs=0 if keep_tokens else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    done: DoneEvent
    tokens: tuple[int, ...]


def _result(events: Iterator[GenerateEvent]) -> _Result:
    tokens: list[int] = []
    for event in events:
        if isinstance(event, TextEvent):
            tokens += [each.token for each in event.logprobs]
        elif isinstance(event, DoneEvent):
            return _Result(done=event, tokens=tuple(tokens))
    raise RuntimeError("a request without an end")


def over_budget(setup: Setup, report: MemoryReport) -> int:
    """Readings above the plan, of the host and of stand-ins, and allocations that were denied."""
    gpus = [device for device in setup.devices if device.id != CPU]
    above = sum((report.device_peak_bytes.get(it.id) or 0) > it.planned_bytes for it in gpus)
    above += report.process_peak_bytes > setup.ram_bytes
    return above + sum(report.device_denied.values())


def token_gaps(setup: Setup, job: Job, outputs: Sequence[Sequence[int]]) -> list[list[float]]:
    """How far below the best each chosen token is, each request alone and fed the same tokens."""
    requests = [
        {"prompt": item.prompt, "output": list(output)}
        for item, output in zip(job.items, outputs, strict=True)
    ]
    return solo.token_gaps(setup.build, setup.model.path, job.longest + 1, requests)
