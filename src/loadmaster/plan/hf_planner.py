"""Planning a checkpoint for the transformers engine: machine, model, workload and budget in, a plan
or a refusal out. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.choices import DEFAULT_N_CTX, DEFAULT_N_UBATCH, MIN_N_CTX
from loadmaster.plan.hf_caches import SMALLER_CACHE
from loadmaster.plan.hf_checks import check_request, too_old, undivided_rows
from loadmaster.plan.hf_ledger import HfBooks
from loadmaster.plan.hf_notes import notes_of
from loadmaster.plan.hf_placement import Placed, place, usable_gpus
from loadmaster.plan.hf_several import stage_shares
from loadmaster.plan.hf_speed import predict
from loadmaster.plan.hf_weights import ComputeType
from loadmaster.plan.types import (
    CPU,
    Alternative,
    Budget,
    DoesNotFit,
    Knobs,
    Overheads,
    Plan,
    Quantize,
    Shortfall,
    TransformersSettings,
    Workload,
)
from loadmaster.units import MIB, Bytes, align, to_flag

_N_ALTERNATIVES = 3
_MOST_FREED = 3  # devices whose freed bytes are worth a line
_BF16_FROM = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True, slots=True, kw_only=True)
class HfProblem:
    """Everything that one planning call knows."""

    machine: Machine
    books: HfBooks
    workload: Workload
    knobs: Knobs

    @property
    def model(self) -> CheckpointSpec:
        return self.books.model


def plan_checkpoint(
    machine: Machine,
    model: CheckpointSpec,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
    *,
    stamp: str = "",
    alternatives: bool = True,
) -> Plan | DoesNotFit:
    """The placement for a checkpoint, or why there is none. Equal arguments give equal plans.

    Raises:
        UsageError: the request contradicts the model, the machine or the engine.
    """
    problem = checkpoint_problem(machine, model, workload, budget, knobs, overheads)
    placed = placed_best(problem)
    nearby = tuple(_alternatives(problem, placed)) if alternatives else ()
    if placed.fits:
        return plan_of(problem, placed, stamp, nearby)
    return refusal_of(problem, placed, nearby)


def checkpoint_problem(
    machine: Machine,
    model: CheckpointSpec,
    workload: Workload,
    budget: Budget,
    knobs: Knobs,
    overheads: Overheads,
) -> HfProblem:
    """Gather a problem.

    Raises:
        UsageError: the request contradicts the model, the machine or the engine.
    """
    books = HfBooks(
        model=model, gpus=machine.gpus, budget=budget, overheads=overheads, cpu_isa=machine.cpu.isa
    )
    check_request(machine, model, workload, knobs, usable_gpus(books))
    return HfProblem(machine=machine, books=books, workload=workload, knobs=knobs)


def placed_best(problem: HfProblem) -> Placed:
    """The longest automatic n_ctx that fits; what the user asked for is tried as it is."""
    placed = None
    for n_ctx in _lengths(problem):
        placed = place(problem.books, settings_of(problem, n_ctx), problem.knobs)
        if placed.fits:
            break
    assert placed is not None
    return placed


def _lengths(problem: HfProblem) -> Iterator[int]:
    workload, trained = problem.workload, problem.model.n_ctx_train
    if workload.n_ctx is not None:
        yield workload.n_ctx
        return
    n_ctx = min(trained or DEFAULT_N_CTX, DEFAULT_N_CTX)
    yield n_ctx
    while n_ctx // 2 >= MIN_N_CTX:
        n_ctx //= 2
        yield n_ctx


def settings_of(problem: HfProblem, n_ctx: int) -> TransformersSettings:
    """Everything but the device map."""
    machine, model, knobs = problem.machine, problem.model, problem.knobs
    compute = compute_type(model, usable_gpus(problem.books))
    n = max(1, problem.workload.n_seq_max)
    cells = problem.workload.n_cells
    quantize = quantize_of(model, knobs)
    return TransformersSettings(
        quantize=quantize,
        double_quant=quantize in ("nf4", "fp4") and knobs.double_quant is not False,
        compute_type=compute,
        device_map=(),
        attention="eager" if knobs.flash_attn is False else "sdpa",
        n_ctx=cells - cells % n if cells else n_ctx * n,
        n_seq_max=n,
        n_ubatch=knobs.n_ubatch or DEFAULT_N_UBATCH,
        type_k=knobs.type_k or compute,
        type_v=knobs.type_v or compute,
        n_threads=knobs.n_threads or machine.cpu.physical_cores or machine.cpu.logical_cores,
        pooling=knobs.pooling,
        n_draft=0 if knobs.pooling is not None else knobs.n_draft or 0,
    )  # fmt: skip


def quantize_of(model: CheckpointSpec, knobs: Knobs) -> Quantize:
    """What is made of the weights; a checkpoint that is quantized already stays as it is."""
    if model.stored is not None:
        return "none"
    return knobs.quantize or "none"


def compute_type(model: CheckpointSpec, gpus: tuple[Gpu, ...]) -> ComputeType:
    """As stored, in 16 bits on a GPU; BF16 where the GPUs have it."""
    older = any(gpu.compute_capability and gpu.compute_capability < _BF16_FROM for gpu in gpus)
    if not gpus:
        return "f32" if model.dtype in ("f32", "f64") else "bf16"
    return "f16" if older or model.dtype == "f16" else "bf16"


def plan_of(
    problem: HfProblem, placed: Placed, stamp: str, alternatives: tuple[Alternative, ...] = ()
) -> Plan:
    """The plan of a placement that fits."""
    model, settings, workload = problem.model, placed.settings, problem.workload
    if workload.n_cells is None:
        workload = replace(workload, n_ctx=settings.n_ctx // settings.n_seq_max)
    return Plan(
        model_name=model.name,
        architecture=model.architecture,
        quantization=label_of(model, settings),
        model_files=tuple(str(file.path) for file in model.files),
        model_stamp=stamp,
        file_bytes=model.file_bytes,
        n_layer=model.n_layer,
        machine_name=problem.machine.name,
        workload=workload,
        engine=settings,
        devices=placed.devices,
        predicted=replace(
            predict(problem.machine, model, settings, workload),
            stages=stage_shares(problem.machine, model, settings, workload),
        ),
        notes=tuple(notes_of(problem.machine, model, placed, problem.workload)),
        alternatives=alternatives,
    )


def label_of(model: CheckpointSpec, settings: TransformersSettings) -> str:
    """The quantization as people call it: `NF4`, `BF16`."""
    if model.stored is not None:
        return model.stored.label
    return (settings.compute_type if settings.quantize == "none" else settings.quantize).upper()


def refusal_of(
    problem: HfProblem, placed: Placed, nearest: tuple[Alternative, ...] = ()
) -> DoesNotFit:
    """The refusal of a placement that does not fit."""
    return DoesNotFit(
        model_name=problem.model.name,
        workload=problem.workload,
        engine=placed.settings,
        devices=placed.devices,
        shortfalls=tuple(
            Shortfall(
                device=device.id, budget_bytes=device.budget_bytes, need_bytes=device.planned_bytes
            )
            for device in placed.devices
            if device.left_bytes < 0
        ),
        nearest=nearest,
    )


# ---- neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variation:
    flags: tuple[str, ...]
    what: str
    problem: HfProblem


def _alternatives(problem: HfProblem, placed: Placed) -> Iterator[Alternative]:
    """The first variations that fit, each placed like a plan of its own."""
    count = 0
    for variation in _variations(problem, placed):
        found = placed_best(variation.problem)
        if not found.fits:
            continue
        speed = predict(problem.machine, problem.model, found.settings, variation.problem.workload)
        freed = {
            device.id: Bytes(device.planned_bytes - _on(found, device.id))
            for device in placed.devices
            if device.planned_bytes > _on(found, device.id)
        }
        if len(freed) > _MOST_FREED:
            freed = {}
        yield Alternative(
            flags=variation.flags,
            what=variation.what,
            decode_tok_s=speed.decode_tok_s,
            frees_bytes=freed,
        )
        count += 1
        if count == _N_ALTERNATIVES:
            return


def _on(placed: Placed, device_id: str) -> int:
    return sum(device.planned_bytes for device in placed.devices if device.id == device_id)


def _variations(problem: HfProblem, placed: Placed) -> Iterator[_Variation]:
    settings = placed.settings
    for quantize, what in _fewer_bits(problem, settings):
        knobs = replace(problem.knobs, quantize=quantize)
        yield _Variation(
            flags=("--quantize", quantize), what=what, problem=replace(problem, knobs=knobs)
        )
    if not (problem.knobs.type_k or problem.knobs.type_v or settings.pooling):
        knobs = replace(problem.knobs, type_k=SMALLER_CACHE, type_v=SMALLER_CACHE)
        yield _Variation(
            flags=("--kv", SMALLER_CACHE), what="keys and values in 8 bits",
            problem=replace(problem, knobs=knobs),
        )  # fmt: skip
    n_ctx = settings.n_ctx // settings.n_seq_max
    smaller = n_ctx // 2
    while smaller >= 256:
        workload = replace(problem.workload, n_ctx=smaller, n_cells=None)
        yield _Variation(
            flags=("-c", str(smaller)), what="a shorter context",
            problem=replace(problem, workload=workload),
        )  # fmt: skip
        if placed.fits:
            break
        smaller //= 2
    if not placed.fits:
        yield from _with_host_layers(problem)
        yield from _larger_budget(problem, placed)


def _fewer_bits(
    problem: HfProblem, settings: TransformersSettings
) -> Iterator[tuple[Quantize, str]]:
    """Quantizations below this one, the finest first; of experts there is one."""
    if problem.model.stored is not None:
        return
    if problem.model.n_expert and settings.quantize != "fp8":
        yield "fp8", "8 bits a weight, of experts too"
    gpus = usable_gpus(problem.books)
    if settings.quantize in ("nf4", "fp4") or (too_old(gpus) and problem.knobs.n_gpu_layers != 0):
        return
    if settings.quantize == "none":
        yield "int8", "8 bits a weight"
    nf4 = replace(problem.knobs, quantize="nf4")
    if undivided_rows(problem.model, nf4, gpus) is None:
        yield "nf4", "4 bits a weight"


def _with_host_layers(problem: HfProblem) -> Iterator[_Variation]:
    """The most layers on the GPUs that leave room for the rest in RAM."""
    if not usable_gpus(problem.books) or problem.knobs.n_gpu_layers is not None:
        return
    if problem.model.stored is not None:
        return
    low, high = 1, problem.model.n_layer
    found: _Variation | None = None
    while low < high:
        middle = (low + high) // 2
        tried = replace(problem, knobs=replace(problem.knobs, n_gpu_layers=middle))
        if placed_best(tried).fits:
            what = "the other layers on the CPU"
            found = _Variation(flags=("-ngl", str(middle)), what=what, problem=tried)
            low = middle + 1
        else:
            high = middle
    if found is not None:
        yield found


def _larger_budget(problem: HfProblem, placed: Placed) -> Iterator[_Variation]:
    """What the closest miss needs on each device, rounded up to what its flag can say; nothing
    where a device has not so much."""
    books, flags = problem.books, list[str]()
    need = {device.id: align(device.planned_bytes, MIB) for device in placed.devices}
    caps = dict(books.budget.caps)
    short = {device.id for device in placed.devices if device.left_bytes < 0}
    if short - {CPU}:
        for gpu in books.gpus:
            caps[gpu.id] = Bytes(max(caps.get(gpu.id, 0), need.get(gpu.id, 0)))
        sizes = [f"{gpu.id.removeprefix('gpu:')}={to_flag(caps[gpu.id])}" for gpu in books.gpus]
        only = to_flag(caps[books.gpus[0].id])
        flags += ["--vram", ",".join(sizes) if len(sizes) > 1 else only]
    if CPU in short:
        caps[CPU] = Bytes(need[CPU])
        flags += ["--ram", to_flag(caps[CPU])]
    has: dict[str, int] = {gpu.id: gpu.total_bytes for gpu in books.gpus}
    has[CPU] = problem.machine.ram.total_bytes
    if any(caps[device] > has[device] for device in short):
        return
    larger = replace(books, budget=Budget(caps=caps, origin=books.budget.origin))
    yield _Variation(
        flags=tuple(flags), what="a larger budget", problem=replace(problem, books=larger)
    )
