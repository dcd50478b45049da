"""The speed of a checkpoint under the transformers engine, from bytes moved and published figures.

Layers are launched one operation at a time by Python, so a step takes what launching takes or what
the GPU takes, whichever is longer. Over several GPUs layers run one GPU after another: at batch 1
their times add up. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loadmaster.machine.types import Gpu, Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import LayerKind
from loadmaster.plan.hf_ledger import compute_device, tensors_by_device
from loadmaster.plan.hf_weights import COMPUTE_BYTES, LoadedTensor, device_of
from loadmaster.plan.rates import GPU_FLOP_PER_BYTE, RAM_SHARE, VRAM_SHARE
from loadmaster.plan.types import CPU, Lever, Prediction, TransformersSettings, Workload

# Seconds to launch one layer's operations, by what its matrices are: from the decode latencies of
# bitsandbytes' own benchmark (benchmarking/README.md at 1b7b9bb4: Llama 3.1 8B and Qwen 2.5 14B on
# an RTX 4090, 0.45.0; NF4 14.8 ms and 21.4 ms, double-quantized 17.5 and 25.6, LLM.int8 44.9 and
# 64.8), divided by 32 and 48 layers. BF16 waits for memory there; its figure is the H100's, 24.4 ms
# for 32 layers, by the ratio of NF4 on both.
LAUNCH_S: Mapping[str, float] = {
    "plain": 0.34e-3, "nf4": 0.45e-3, "nf4-double": 0.54e-3, "int8": 1.38e-3, "fp8": 0.45e-3,
}  # fmt: skip
# The same on the benchmark's H100 host takes 2.3 times as long (NF4: 33.1 ms against 14.8): server
# CPUs have slower single cores.
SERVER_SLOWDOWN = 2.3
_SERVER_CPUS = ("xeon", "epyc", "neoverse", "altra")
# Copies from pageable memory pass through a bounce buffer (llama.cpp: 139 against 304 tok/s
# pinned).
PAGEABLE_SHARE = 0.45
_N_SEQUENCES = 8
_LEAST_GAIN = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One device's part of a step."""

    device: str
    bytes_s: float  # what its memory gives to products
    flops: float
    tensors: tuple[LoadedTensor, ...]
    n_layers: int
    streamed_bytes: int = 0  # weights of the CPU that come over the link for each step
    link_bytes_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HfSpeed:
    """A placement at work."""

    model: CheckpointSpec
    settings: TransformersSettings
    stages: tuple[_Stage, ...]
    launch_s: float  # of one layer
    known: bool  # every bandwidth is in a table

    def step_costs(self, tokens: int, n_outputs: int, depth: float) -> Mapping[str, float]:
        """Seconds of a step by what bounds them: `tokens` fed, each with `depth` cells to see."""
        costs = {"vram-bandwidth": 0.0, "ram-bandwidth": 0.0, "overhead": 0.0, "link": 0.0,
                 "attention": 0.0}  # fmt: skip
        for stage in self.stages:
            work = self._products_s(stage, tokens, n_outputs)
            attention = self._attention_s(stage, tokens, depth)
            launch = 0.0 if stage.device == CPU else self.launch_s * stage.n_layers
            costs["attention"] += attention
            costs["ram-bandwidth" if stage.device == CPU else "vram-bandwidth"] += work
            costs["overhead"] += max(0.0, launch - work - attention)
            if stage.streamed_bytes:
                costs["link"] += stage.streamed_bytes / stage.link_bytes_s
        return costs

    def step_s(self, tokens: int, n_outputs: int, depth: float) -> float:
        return sum(self.step_costs(tokens, n_outputs, depth).values())

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prompt, in passes of n_ubatch."""
        size = max(1, min(tokens, self.settings.n_ubatch))
        whole, rest = divmod(tokens, size)
        seconds = whole * self.step_s(size, 1, tokens / 2)
        return seconds + (self.step_s(rest, 1, tokens / 2) if rest else 0.0)

    def _products_s(self, stage: _Stage, tokens: int, n_outputs: int) -> float:
        seconds = 0.0
        for tensor in stage.tensors:
            if tensor.role == "output" or (self.model.tied_output and tensor.role == "embedding"):
                seconds += _product_s(stage, tensor, n_outputs)
            elif tensor.role == "expert":
                share = _expert_share(self.model, tokens)
                seconds += _product_s(stage, tensor, tokens) * share
            elif tensor.role not in ("embedding", "buffer"):
                seconds += _product_s(stage, tensor, tokens)
        return seconds

    def _attention_s(self, stage: _Stage, tokens: int, depth: float) -> float:
        """Reading the caches: in decode each sequence its own, in a prompt once for the pass."""
        c = COMPUTE_BYTES[self.settings.type_k]
        reads = min(tokens, self.settings.n_seq_max)
        cells = 0.0
        for layer in self.model.layers:
            if compute_device(f"model.layers.{layer.index}", self.settings) == stage.device:
                slides = layer.kind is LayerKind.SWA and self.model.n_swa
                seen = min(depth, self.model.n_swa) if slides else depth
                cells += seen * (layer.k_width + layer.v_width) * c
        return reads * cells / stage.bytes_s


def _product_s(stage: _Stage, tensor: LoadedTensor, tokens: int) -> float:
    """One matrix and so many tokens: its bytes, or its arithmetic.

    With more than one token a four-bit matrix is written out in 16 bits and read again (42.5 ms for
    8 sequences of Llama 3.1 8B on an RTX 4090, the same benchmark)."""
    moved = float(tensor.size_bytes)
    if tensor.kind in ("nf4", "fp4") and tokens > 1:
        moved += 4.0 * tensor.n_elements
    return max(moved / stage.bytes_s, 2.0 * tensor.n_elements * tokens / stage.flops)


def _expert_share(model: CheckpointSpec, tokens: int) -> float:
    """Of all experts, those that so many tokens use, if routing is even."""
    if not model.n_expert:
        return 1.0
    return 1 - (1 - min(1.0, model.n_expert_used / model.n_expert)) ** max(1, tokens)


def speed_of(machine: Machine, model: CheckpointSpec, settings: TransformersSettings) -> HfSpeed:
    """Look at where the settings put everything."""
    by_device = tensors_by_device(model, settings)
    gpus = [gpu for gpu in machine.gpus if by_device.get(gpu.id)]
    streamed = by_device.get(CPU, []) if gpus else []
    stages = [_gpu_stage(gpu, model, settings, by_device[gpu.id]) for gpu in gpus]
    if gpus and streamed:
        stages[0] = replace(
            stages[0],
            tensors=(*stages[0].tensors, *streamed),
            n_layers=stages[0].n_layers + len({t.layer for t in streamed} - {None}),
            streamed_bytes=sum(tensor.size_bytes for tensor in streamed),
            link_bytes_s=(gpus[0].link_bytes_s or 0) * PAGEABLE_SHARE or 1.0,
        )
    if not gpus:
        stages = [_host_stage(machine, model, by_device.get(CPU, []))]
    return HfSpeed(
        model=model,
        settings=settings,
        stages=tuple(stages),
        launch_s=launch_of(machine, model, settings),
        known=_known(machine, gpus, settings, bool(streamed)),
    )


def launch_of(machine: Machine, model: CheckpointSpec, settings: TransformersSettings) -> float:
    """Seconds to launch one layer on this host."""
    kind: str = settings.quantize
    if model.stored is not None:
        kind = {"bnb4": "nf4", "bnb8": "int8"}.get(model.stored.method, "fp8")
    if kind in ("nf4", "fp4"):
        kind = "nf4-double" if settings.double_quant else "nf4"
    name = (machine.cpu.name or "").lower()
    slow = SERVER_SLOWDOWN if any(word in name for word in _SERVER_CPUS) else 1.0
    return slow * LAUNCH_S.get(kind, LAUNCH_S["plain"])


def _gpu_stage(
    gpu: Gpu, model: CheckpointSpec, settings: TransformersSettings, tensors: Sequence[LoadedTensor]
) -> _Stage:
    bytes_s = (gpu.bandwidth_bytes_s or 1) * VRAM_SHARE
    layers = sum(
        device_of(f"model.layers.{index}", settings.device_map) == gpu.id
        for index in range(model.n_layer)
    )
    return _Stage(
        device=gpu.id,
        bytes_s=bytes_s,
        flops=bytes_s * GPU_FLOP_PER_BYTE,
        tensors=tuple(tensors),
        n_layers=layers,
    )


def _host_stage(machine: Machine, model: CheckpointSpec, tensors: Sequence[LoadedTensor]) -> _Stage:
    bytes_s = (machine.ram.bandwidth_bytes_s or 1) * RAM_SHARE
    cores = machine.cpu.physical_cores or machine.cpu.logical_cores
    return _Stage(
        device=CPU,
        bytes_s=bytes_s,
        flops=cores * 40e9,
        tensors=tuple(tensors),
        n_layers=model.n_layer,
    )


def _known(
    machine: Machine, gpus: Sequence[Gpu], settings: TransformersSettings, streams: bool
) -> bool:
    """Whether the figures rest on anything: nothing is published of quantized weights on a CPU."""
    if not gpus:
        return machine.ram.bandwidth_bytes_s is not None and settings.quantize == "none"
    if streams and gpus[0].link_bytes_s is None:
        return False
    return all(gpu.bandwidth_bytes_s is not None for gpu in gpus)


def predict(
    machine: Machine, model: CheckpointSpec, settings: TransformersSettings, workload: Workload
) -> Prediction:
    """Speed of a first prompt and of the answer to it."""
    speed = speed_of(machine, model, settings)
    prompt, n = workload.prompt_tokens, settings.n_seq_max
    costs = speed.step_costs(1, 1, prompt)
    bound_by = max(costs, key=lambda cause: costs[cause])
    if not speed.known:
        return Prediction(
            decode_tok_s=None, prefill_tok_s=None, ttft_s=None, bound_by=bound_by, basis="unknown"
        )
    step, prefill = sum(costs.values()), speed.prefill_s(prompt)
    many = speed.step_s(n, n, prompt + workload.output_tokens / 2)
    disk = machine.measured.disk_read_bytes_s if machine.measured else None
    return Prediction(
        decode_tok_s=1 / step,
        prefill_tok_s=prompt / prefill,
        ttft_s=prefill + step,
        bound_by=bound_by,
        basis="table",
        jobs_per_hour=3600 * n / (n * prefill + workload.output_tokens * many),
        load_s=model.file_bytes / disk if disk else None,
        levers=_levers(speed, step, prompt),
    )


def _levers(speed: HfSpeed, step_s: float, depth: float) -> tuple[Lever, ...]:
    """What would make decode faster, each alone."""
    no_launch = sum(replace(speed, launch_s=0.0).step_costs(1, 1, depth).values())
    many = replace(speed, settings=replace(speed.settings, n_seq_max=_N_SEQUENCES)).step_s(
        _N_SEQUENCES, _N_SEQUENCES, depth
    )
    found = [
        Lever(what="without the time to launch operations", decode_tok_s=1 / no_launch),
        Lever(
            what=f"{_N_SEQUENCES} sequences at once, together",
            decode_tok_s=_N_SEQUENCES / many,
        ),
    ]
    kept = [lever for lever in found if lever.decode_tok_s * step_s >= _LEAST_GAIN]
    return tuple(sorted(kept, key=lambda lever: -lever.decode_tok_s))
