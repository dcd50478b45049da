"""The speed of a checkpoint under the transformers engine, from bytes moved and `hf_rates`.

Layers are launched one operation at a time by Python, so on a GPU a step takes what launching takes
or what the GPU takes, whichever is longer; on the CPU it takes both. Over several GPUs layers run
one GPU after another: their times add up. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.hf_ledger import tensors_by_device
from loadmaster.plan.hf_rates import (
    TorchRates,
    basis_of,
    gpu_rates,
    host_rates,
    measured_by_torch,
)
from loadmaster.plan.hf_stages import Group, Stage, Widths, stage_on
from loadmaster.plan.rates import Basis
from loadmaster.plan.steps import Pass, Step
from loadmaster.plan.types import CPU, Lever, Prediction, TransformersSettings, Workload

# Copies from pageable memory pass through a bounce buffer (llama.cpp: 139 against 304 tok/s
# pinned).
PAGEABLE_SHARE = 0.45
# A copy from one GPU to the next, however small: it waits for the one and is launched on the other.
HANDOVER_S = 20e-6
_ATTENTION_FLOP = 4.0  # a multiplication and an addition for the score, the same for the value
_N_SEQUENCES = 8
_LEAST_GAIN = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class HfSpeed:
    """A placement at work."""

    model: CheckpointSpec
    settings: TransformersSettings
    stages: tuple[Stage, ...]
    link_bytes_s: float  # from one GPU to the next, the slowest of those in use
    step_s: float  # outside the layers
    sequence_s: float  # sampling, for each sequence
    basis: Basis
    _products: dict[tuple[int, int], list[float]] = field(default_factory=dict, compare=False)

    def of(self, step: Step, passes: Sequence[Pass] = ()) -> dict[str, float]:
        """Seconds of a step by what bounds them. All its tokens pass the weights together."""
        del passes
        costs = {"overhead": self.step_s + step.n_outputs * self.sequence_s, "attention": 0.0}
        for stage, work in zip(self.stages, self._products_of(step), strict=True):
            for cause, seconds in self._stage(stage, work, step).items():
                costs[cause] = costs.get(cause, 0.0) + seconds
        if self.n_handovers:
            costs["handover"] = self.handover_s(step.n_tokens)
        return costs

    def seconds(self, step: Step) -> float:
        return sum(self.of(step).values())

    def stage_seconds(self, step: Step) -> list[float]:
        """The same device by device, without what is outside them."""
        parts = zip(self.stages, self._products_of(step), strict=True)
        return [sum(self._stage(stage, work, step).values()) for stage, work in parts]

    @property
    def n_handovers(self) -> int:
        return len(self.stages) - 1

    @property
    def handover_bytes(self) -> int:
        """Of one token: a row of the residual stream."""
        return 2 * self.model.n_embd

    def handover_s(self, tokens: int) -> float:
        """Copies from GPU to GPU of one step."""
        each = HANDOVER_S + tokens * self.handover_bytes / self.link_bytes_s
        return self.n_handovers * each

    def decode_s(self, depth: float, n_sequences: int = 1) -> float:
        """Seconds of a decode step of so many sequences, each with `depth` cells."""
        return self.seconds(decoding(n_sequences, depth))

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prompt, in passes of n_ubatch."""
        size = max(1, min(tokens, self.settings.n_ubatch))
        whole, rest = divmod(tokens, size)
        seconds = whole * self.seconds(_prompt(size, tokens / 2))
        return seconds + (self.seconds(_prompt(rest, tokens / 2)) if rest else 0.0)

    def _stage(self, stage: Stage, work: float, step: Step) -> dict[str, float]:
        rates, widths = stage.rates, stage.widths
        attention = _attention_s(rates, widths, self.model.n_swa, step)
        bound = stage.bound(work, step.n_tokens)
        work += step.n_tokens * (
            widths.norm * rates.norm_s + widths.gate * rates.gate_s + widths.rope * rates.rope_s
        )
        launch = stage.n_layers * (rates.launch_s + step.n_chunks * rates.part_s)
        if stage.device == CPU:
            costs = {"attention": attention, bound: work, "overhead": launch}
        elif launch > work + attention:  # the GPU waits for Python
            costs = {"overhead": launch}
        else:  # launched ahead of what the GPU does
            costs = {"attention": attention, bound: work}
        if stage.streamed_bytes:
            costs["link"] = stage.streamed_bytes / stage.link_bytes_s
        return costs

    def _products_of(self, step: Step) -> list[float]:
        key = step.n_tokens, step.n_outputs
        if key not in self._products:
            self._products[key] = [self._products_s(stage, *key) for stage in self.stages]
        return self._products[key]

    def _products_s(self, stage: Stage, tokens: int, n_outputs: int) -> float:
        seconds = 0.0
        for group in stage.groups:
            share = _expert_share(self.model, tokens) if group.use == "expert" else 1.0
            n = n_outputs if group.use == "output" else tokens
            seconds += share * _product_s(stage.rates, group, n) if n else 0.0
        return seconds


def _prompt(tokens: int, depth: float) -> Step:
    """A step that feeds one prompt."""
    return Step(n_decode=0, n_prefill=tokens, n_outputs=1, prefill_cells=depth, n_chunks=1)


def decoding(n: int, depth: float) -> Step:
    """A step of so many answers."""
    return Step(n_decode=n, n_outputs=n, decode_cells=depth)


def _product_s(rates: TorchRates, group: Group, tokens: int) -> float:
    """So many tokens with the matrices of a group: as timed, or their bytes or their arithmetic.

    With more than one token a four-bit matrix is written out in 16 bits and read again (42.5 ms for
    8 sequences of Llama 3.1 8B on an RTX 4090, the same benchmark). What is written out in parts
    (`scaled`) always is, and is read and written once more for its scales."""
    curve = rates.curves.get(group.kind)
    if curve is not None:
        return group.size_bytes * curve.at(tokens)
    moved = float(group.size_bytes)
    if group.kind in ("nf4", "fp4") and tokens > 1:
        moved += 4.0 * group.n_elements
    elif group.in_parts:
        moved += 8.0 * group.n_elements
    return max(moved / rates.bytes_s, 2.0 * group.n_elements * tokens / rates.flops)


def _expert_share(model: CheckpointSpec, tokens: int) -> float:
    """Of all experts, those that so many tokens use, if routing is even."""
    if not model.n_expert:
        return 1.0
    return 1 - (1 - min(1.0, model.n_expert_used / model.n_expert)) ** max(1, tokens)


def _attention_s(rates: TorchRates, widths: Widths, window: int, step: Step) -> float:
    """In decode each sequence reads its own cells; a prompt reads them once for the pass, or
    computes."""
    decode = _seen_s(rates, widths, window, step.decode_cells, 1, prompt=False)
    seconds = step.n_decode * decode
    if step.n_prefill:
        each = step.n_prefill / max(1, step.n_chunks)
        seconds += max(1, step.n_chunks) * _seen_s(
            rates, widths, window, step.prefill_cells, each, prompt=True
        )
    return seconds


def _seen_s(
    rates: TorchRates, widths: Widths, window: int, cells: float, tokens: float, *, prompt: bool
) -> float:
    """So many tokens of one sequence that each see so many cells."""
    curve = rates.prefill if prompt else rates.decode
    slid = min(cells, window) if window else cells
    query = widths.query * cells + widths.window_query * slid
    if curve is not None:
        return tokens * query * curve.at(cells)
    read = widths.cell_bytes * cells + widths.window_cell_bytes * slid
    return max(read / rates.bytes_s, tokens * _ATTENTION_FLOP * query / rates.flops)


# ---- from a placement


def speed_of(machine: Machine, model: CheckpointSpec, settings: TransformersSettings) -> HfSpeed:
    """Look at where the settings put everything."""
    by_device = tensors_by_device(model, settings)
    gpus = tuple(gpu for gpu in machine.gpus if by_device.get(gpu.id))
    streamed = by_device.get(CPU, []) if gpus else []
    rates = {gpu.id: gpu_rates(machine, gpu, model, settings) for gpu in gpus}
    if not gpus:
        rates[CPU] = host_rates(machine, model, settings)
    first = gpus[0].id if gpus else CPU
    stages = [
        stage_on(device, found, model, settings,
                  [*by_device.get(device, []), *(streamed if device == first else [])])
        for device, found in rates.items()
    ]  # fmt: skip
    if streamed:
        stages[0] = replace(
            stages[0],
            streamed_bytes=sum(tensor.size_bytes for tensor in streamed),
            link_bytes_s=(gpus[0].link_bytes_s or 0) * PAGEABLE_SHARE or 1.0,
        )
    measured = measured_by_torch(machine)
    sample_s = (measured.sample_s if measured else None) or 0.0
    return HfSpeed(
        model=model,
        settings=settings,
        stages=tuple(stages),
        link_bytes_s=_slowest_link(gpus),
        step_s=(measured.step_s if measured else None) or 0.0,
        sequence_s=sample_s * model.n_vocab,
        basis=basis_of(machine, gpus, model, settings, streams=bool(streamed)),
    )


def _slowest_link(gpus: Sequence[Gpu]) -> float:
    """GPUs without a bridge hand over through their links to the host."""
    return float(min((gpu.link_bytes_s or 1 for gpu in gpus), default=1))


# ---- what is asked of it


def predict(
    machine: Machine, model: CheckpointSpec, settings: TransformersSettings, workload: Workload
) -> Prediction:
    """Speed of a first prompt and of the answer to it; where vectors are made, of prompts alone."""
    speed = speed_of(machine, model, settings)
    if settings.pooling is not None:
        return _of_vectors(machine, speed, workload.prompt_tokens)
    prompt, n = workload.prompt_tokens, settings.n_seq_max
    costs: Mapping[str, float] = speed.of(decoding(1, prompt))
    bound_by = max(costs, key=lambda cause: costs[cause])
    if speed.basis == "unknown":
        return Prediction(
            decode_tok_s=None, prefill_tok_s=None, ttft_s=None, bound_by=bound_by, basis="unknown"
        )
    step, prefill = sum(costs.values()), speed.prefill_s(prompt)
    fed = speed.prefill_s(max(1, prompt - workload.shared_tokens))
    many = speed.seconds(decoding(n, prompt + workload.output_tokens / 2))
    return Prediction(
        decode_tok_s=1 / step,
        prefill_tok_s=prompt / prefill,
        ttft_s=prefill + step,
        bound_by=bound_by,
        basis=speed.basis,
        jobs_per_hour=3600 * n / (n * fed + workload.output_tokens * many),
        load_s=_load_s(machine, model),
        levers=_levers(speed, step, prompt),
    )


def _of_vectors(machine: Machine, speed: HfSpeed, prompt: int) -> Prediction:
    """Of one prompt in a step."""
    costs = speed.of(_prompt(min(prompt, speed.settings.n_ubatch), prompt / 2))
    known, seconds = speed.basis != "unknown", speed.prefill_s(prompt)
    return Prediction(
        decode_tok_s=None,
        prefill_tok_s=prompt / seconds if known else None,
        ttft_s=seconds if known else None,
        bound_by=max(costs, key=lambda cause: costs[cause]),
        basis=speed.basis,
        load_s=_load_s(machine, speed.model) if known else None,
    )


def _load_s(machine: Machine, model: CheckpointSpec) -> float | None:
    disk = machine.measured.disk_read_bytes_s if machine.measured else None
    return model.file_bytes / disk if disk else None


def without_launching(speed: HfSpeed) -> HfSpeed:
    """The same where operations were launched in no time."""
    quick = tuple(
        replace(stage, rates=replace(stage.rates, launch_s=0.0, part_s=0.0))
        for stage in speed.stages
    )
    return replace(speed, stages=quick, _products={})


def twice_as_fast(speed: HfSpeed) -> HfSpeed:
    """The same on devices whose memory and kernels were twice as fast."""
    quick = tuple(replace(stage, rates=stage.rates.faster(2)) for stage in speed.stages)
    return replace(speed, stages=quick, _products={})


def _levers(speed: HfSpeed, step_s: float, depth: float) -> tuple[Lever, ...]:
    """What would make decode faster, each alone."""
    no_launch = without_launching(speed).seconds(decoding(1, depth))
    many = speed.seconds(decoding(_N_SEQUENCES, depth))
    found = [
        Lever(what="without the time to launch operations", decode_tok_s=1 / no_launch),
        Lever(
            what=f"{_N_SEQUENCES} sequences at once, together",
            decode_tok_s=_N_SEQUENCES / many,
        ),
    ]
    kept = [lever for lever in found if lever.decode_tok_s * step_s >= _LEAST_GAIN]
    return tuple(sorted(kept, key=lambda lever: -lever.decode_tok_s))
