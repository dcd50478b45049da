"""The values of planning. All of them are frozen, hashable where keys are needed, and exact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loadmaster.model.types import Pooling
from loadmaster.units import Bytes

CPU = "cpu"

Kind = Literal[
    "model", "kv", "recurrent", "compute", "output", "overhead", "adapter", "draft", "cache",
    "headroom",
]  # fmt: skip
Source = Literal["header", "engine", "calibrated", "bound", "user"]
LoadMode = Literal["none", "mmap", "mlock"]
WorkloadKind = Literal["chat", "serve", "batch"]
# What a safetensors checkpoint's linear weights are made while they load; none: as computed.
Quantize = Literal["none", "int8", "nf4", "fp4", "fp8"]

# Tokens of a step with drafts: the kernels of a CPU take 16 at once, and then 4.
DRAFT_STEP_TOKENS = 16
# With more sequences a step is full enough: of four sessions with drafts Tanguille/cluster#3258 had
# 10.8 tok/s in all, where one had 33.
DRAFT_SEQUENCES = 4

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model will be used for."""

    kind: WorkloadKind = "chat"
    n_ctx: int | None = None  # tokens per sequence; None: the model's own, as far as it fits
    n_seq_max: int = 1
    prompt_tokens: int = 512  # expected of one request; they weigh prefill against decode
    output_tokens: int = 256
    shared_tokens: int = 0  # leading prompt tokens that the requests have in common
    n_cells: int | None = None  # of all sequences together; None: n_ctx for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Hard caps on the process total per device; `cpu` is the host's RAM."""

    caps: Mapping[str, Bytes]
    origin: Mapping[str, str]  # device → why this figure: `--vram 8GiB`, `free 11.2 GiB less …`

    def cap(self, device: str) -> Bytes:
        return self.caps.get(device, Bytes(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Tensors whose name the regex `pattern` finds live on `device`; the first match wins."""

    pattern: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA file and its size in memory."""

    path: str
    scale: float
    size_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What the user fixed; None leaves the choice to the planner."""

    n_gpu_layers: int | None = None
    layers_per_device: tuple[int, ...] | None = None  # `--tensor-split`, in layers
    overrides: tuple[Override, ...] = ()
    n_cpu_moe: int | None = None  # experts of the first N layers stay on the CPU
    n_cpu_ffn: int | None = None  # dense feed-forwards of the first N layers stay on the CPU
    type_k: str | None = None
    type_v: str | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_outputs_max: int | None = None
    flash_attn: bool | None = None
    offload_kqv: bool | None = None
    op_offload: bool | None = None
    op_offload_min_batch: int | None = None
    swa_full: bool | None = None
    load_mode: LoadMode | None = None
    n_threads: int | None = None
    n_seq_max: int | None = None  # sequences of a job
    kv_unified: bool | None = None  # one cache for all sequences, or one for each
    pooling: Pooling | None = None  # open it for embeddings or ranks instead of text
    adapters: tuple[Adapter, ...] = ()
    n_draft: int | None = None  # tokens that a sequence may bring into a step as a draft
    quantize: Quantize | None = None  # of a safetensors checkpoint, while it loads
    double_quant: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Everything the engine is told; equal settings mean equal buffers. Hashable."""

    n_gpu_layers: int  # 0 … n_layer + 1, the output layer counts as one
    layers_per_device: tuple[int, ...]  # one entry per GPU, summing to n_gpu_layers
    overrides: tuple[Override, ...]
    n_ctx: int  # total cells; a multiple of 256
    n_seq_max: int
    n_batch: int
    n_ubatch: int
    n_outputs_max: int
    type_k: str
    type_v: str
    flash_attn: bool
    offload_kqv: bool
    op_offload: bool
    op_offload_min_batch: int
    swa_full: bool
    kv_unified: bool
    load_mode: LoadMode
    use_extra_bufts: bool  # repack CPU weights for the CPU's own kernels
    n_threads: int
    n_threads_batch: int
    adapters: tuple[Adapter, ...] = ()
    # One vector for a prompt, instead of text: the mean of its tokens' vectors, that of the first
    # or the last, or a rank. Every token of a step is an output then.
    pooling: Pooling | None = None
    n_draft: int = 0  # tokens that a sequence may bring into a step as a draft


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersSettings:
    """Everything the transformers engine is told; equal settings mean equal tensors. Hashable."""

    quantize: Quantize  # what linear weights are, or are made while they load; none: as computed
    double_quant: bool  # of nf4 and fp4: the scales are quantized once more
    compute_type: Literal["bf16", "f16", "f32"]
    # Module name → device: the longest name that is a prefix of a tensor's wins. Never `auto`.
    device_map: tuple[tuple[str, str], ...]
    attention: Literal["sdpa", "flash_attention_2", "eager"]
    n_ctx: int  # cells of all sequences; each has n_ctx // n_seq_max of its own
    n_seq_max: int
    n_ubatch: int  # tokens of prompts in one forward pass
    type_k: str
    type_v: str
    n_threads: int
    pooling: Pooling | None = None  # one vector for a prompt, instead of text; it keeps no cells
    n_draft: int = 0  # tokens that a sequence may bring into a step as a draft

    @property
    def kv_unified(self) -> bool:
        """Each sequence has cells of its own."""
        return False

    @property
    def n_batch(self) -> int:
        """Tokens of a step: there is none larger than a forward pass."""
        return self.n_ubatch


AnySettings = EngineSettings | TransformersSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSizes:
    """The engine's buffers on one device (host buffer types are summed under `cpu`)."""

    device: str
    model_bytes: Bytes
    context_bytes: Bytes  # KV cache and recurrent state together
    compute_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What the engine itself says a load with some settings takes."""

    buffers: tuple[BufferSizes, ...]
    n_ctx: int  # as the engine rounded it

    def on(self, device: str) -> BufferSizes:
        """The buffers on `device`, zeros when it has none."""
        for row in self.buffers:
            if row.device == device:
                return row
        zero = Bytes(0)
        return BufferSizes(device=device, model_bytes=zero, context_bytes=zero, compute_bytes=zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingFailure:
    """The engine refused to size these settings, with its last words."""

    reason: str


Sizes = Mapping[EngineSettings, Sizing | SizingFailure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Memory outside the engine's buffers, calibrated or bounded."""

    device_bytes: Mapping[str, Bytes]  # GPU context, workspaces; device → bytes
    device_source: Source
    process_bytes: Bytes  # parent and worker before a model is open, their private memory
    process_source: Source
    schemas: bool = False  # requests may bring JSON schemas: the vocabulary is kept once more
    draft_items: tuple["MemoryItem", ...] = ()  # a draft model's lines, as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """One line of the ledger."""

    device: str
    kind: Kind
    bytes: Bytes
    source: Source
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """The model that guesses beside a planned one; all of it is on one device."""

    model_name: str
    quantization: str
    model_files: tuple[str, ...]
    model_stamp: str
    device: str
    engine: AnySettings
    # Where the machine's rates are known: the speed with drafts of the length that is best if each
    # guessed token is right with this chance. An assumption; only use can tell.
    decode_tok_s: float | None = None
    n_guessed: int | None = None
    assumed_share: float | None = None
    reference: str = ""  # as it was typed; unknown where nobody did


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One device's share of the ledger under its cap."""

    id: str
    name: str
    budget_bytes: Bytes
    budget_origin: str
    items: tuple[MemoryItem, ...]
    mapped_bytes: Bytes  # file pages the kernel can drop: shown apart, outside the cap

    @property
    def planned_bytes(self) -> Bytes:
        return Bytes(sum(item.bytes for item in self.items))

    @property
    def needed_bytes(self) -> Bytes:
        """Without what would be of use and is not needed: room for the states of the preempted."""
        return Bytes(self.planned_bytes - self.of("cache"))

    @property
    def left_bytes(self) -> Bytes:
        return Bytes(self.budget_bytes - self.planned_bytes)

    def of(self, *kinds: Kind) -> Bytes:
        """The sum of the items of these kinds."""
        return Bytes(sum(item.bytes for item in self.items if item.kind in kinds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """Something that would make decode faster, and how fast it would then be."""

    what: str
    decode_tok_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShare:
    """One GPU's part of a token, where layers run one GPU after another."""

    device: str
    n_layers: int
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Speed, from bytes moved and bandwidths; `basis` says what the bandwidths rest on."""

    decode_tok_s: float | None
    prefill_tok_s: float | None
    ttft_s: float | None
    # `ram-bandwidth`, `cpu-compute`, `vram-bandwidth`, `attention`, `disk`, `handover`, `overhead`;
    # of many sequences also `gpu-compute` and `link`
    bound_by: str
    basis: Literal["measured", "table", "unknown"]
    jobs_per_hour: float | None = None  # prompts and answers of the workload's lengths
    load_s: float | None = None  # from the disk, where its rate was measured
    levers: tuple[Lever, ...] = ()
    stages: tuple[StageShare, ...] = ()  # of the transformers engine over several GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A neighbouring plan: what to type, and what it gives."""

    flags: tuple[str, ...]
    what: str
    decode_tok_s: float | None
    frees_bytes: Mapping[str, Bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A placement that fits, with its proof."""

    model_name: str
    architecture: str
    quantization: str
    model_files: tuple[str, ...]
    model_stamp: str  # digest of the files' sizes, inodes and times; a changed file is refused
    file_bytes: Bytes
    n_layer: int
    machine_name: str
    workload: Workload
    engine: AnySettings
    devices: tuple[DevicePlan, ...]  # GPUs in order, then the host
    predicted: Prediction
    notes: tuple[str, ...] = ()  # what a person should know: a KV type chosen, a share on the CPU
    alternatives: tuple[Alternative, ...] = ()
    draft: DraftModel | None = None

    @property
    def llamacpp(self) -> EngineSettings:
        """The settings of a plan for llama.cpp; TypeError for another engine's."""
        return _llamacpp(self.engine)

    def device(self, device_id: str) -> DevicePlan:
        """The share of `device_id`; KeyError when the plan does not use it."""
        for device in self.devices:
            if device.id == device_id:
                return device
        raise KeyError(device_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """Bytes missing on one device, beside the smallest need that was found."""

    device: str
    budget_bytes: Bytes
    need_bytes: Bytes

    @property
    def bytes(self) -> Bytes:
        return Bytes(self.need_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoesNotFit:
    """No placement fits; the ledger of the smallest one, what is missing, and what would fit."""

    model_name: str
    workload: Workload
    engine: AnySettings
    devices: tuple[DevicePlan, ...]
    shortfalls: tuple[Shortfall, ...]
    nearest: tuple[Alternative, ...]
    reason: str | None = None  # the engine's own words, when it refused to size every placement

    @property
    def llamacpp(self) -> EngineSettings:
        """The settings of a refusal for llama.cpp; TypeError for another engine's."""
        return _llamacpp(self.engine)


def _llamacpp(settings: AnySettings) -> EngineSettings:
    if not isinstance(settings, EngineSettings):
        raise TypeError(f"{type(settings).__name__} are not llama.cpp's settings")
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedSizes:
    """Sizes that the planner must know before it can go on; ask the engine and call again."""

    settings: tuple[EngineSettings, ...]
