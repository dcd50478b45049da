"""What every tensor of a checkpoint takes in memory once the transformers engine has loaded it.

Pure and exact: the sums are those of the tensors that torch 2.13, transformers 5.23 and
bitsandbytes 0.50.2 hold (`benchmarks/hf_accuracy.py` compares them). What is quantized is what the
engine replaces: every `nn.Linear` but the output (`get_keys_to_not_convert`). Experts are stacked
in one parameter of three dimensions, which is no `nn.Linear`: bitsandbytes leaves them as computed,
FP8 does not. A checkpoint that is quantized already has each matrix as its file has it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from loadmaster.model.checkpoint import CheckpointSpec, CheckpointTensor, Stored
from loadmaster.plan.types import CPU, Quantize, TransformersSettings
from loadmaster.units import Bytes

ComputeType = Literal["bf16", "f16", "f32"]
COMPUTE_BYTES: Mapping[str, int] = {"bf16": 2, "f16": 2, "f32": 4}

# bitsandbytes: elements that share a scale, and scales that share one when they are quantized too
# (Params4bit's default; quantize_4bit in functional.py).
BLOCK = 64
NESTED_BLOCK = 256
CODE_BYTES = 16 * 4  # the sixteen values, kept by each matrix
NESTED_CODE_BYTES = 256 * 4  # a copy of the dynamic map, kept by each matrix
OFFSET_BYTES = 4  # the mean of the scales, taken off before they are quantized
# fine-grained FP8: elements of a tile that share a scale (FineGrainedFP8Config's default).
FP8_TILE = (128, 128)
_F32 = 4
# Checkpoints whose matrices are written out by modules of our own, a part at a time.
_WRITTEN_OUT = ("fp8", "fbgemm-fp8", "compressed-tensors", "gptq", "awq")
# Weights of such a part: on the CPU what stays in its caches, on a GPU enough to keep it busy.
PART_ON_CPU = 1 << 20
PART_ON_GPU = 1 << 24
# Weights that are quantized at a time, on the CPU.
QUANTIZED_PART = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTensor:
    """One tensor after loading: its allocations, the weights themselves first."""

    name: str
    module: str
    layer: int | None
    role: str  # of `CheckpointTensor.role`; `buffer` for what no file holds
    kind: str  # `nf4`, `fp4`, `int8`, `fp8`, `bf16`, `f16`, `f32`, or as stored
    n_elements: int
    allocations: tuple[int, ...]
    source: CheckpointTensor | None = None

    @property
    def size_bytes(self) -> Bytes:
        return Bytes(sum(self.allocations))

    @property
    def is_quantized(self) -> bool:
        """Whether products are made with fewer bits than are computed with."""
        return self.kind not in COMPUTE_BYTES


def loaded_tensors(model: CheckpointSpec, settings: TransformersSettings) -> list[LoadedTensor]:
    """Every tensor of a load, in the order of the files; buffers last."""
    return list(_weights(model, settings)) + list(_buffers(model, settings.compute_type))


def four_bit_allocations(
    n_elements: int, double_quant: bool, block: int = BLOCK
) -> tuple[int, ...]:
    """A matrix in NF4 or FP4: packed values, scales, tables (`quantize_4bit`)."""
    packed, n_scales = -(-n_elements // 2), -(-n_elements // block)
    if not double_quant:
        return (packed, n_scales * _F32, CODE_BYTES)
    nested = -(-n_scales // NESTED_BLOCK) * _F32
    return (packed, n_scales, CODE_BYTES, nested, NESTED_CODE_BYTES, OFFSET_BYTES)


def int8_allocations(rows: int, columns: int) -> tuple[int, ...]:
    """A matrix in LLM.int8: its values (CB) and a scale for each row (SCB)."""
    return (rows * columns, rows * _F32)


def fp8_allocations(rows: int, columns: int) -> tuple[int, ...]:
    """A matrix in FP8 with a scale for each tile, those at the edges too."""
    scales = -(-rows // FP8_TILE[0]) * -(-columns // FP8_TILE[1]) * _F32
    return (rows * columns, scales)


def written_out_in_parts(model: CheckpointSpec, settings: TransformersSettings) -> bool:
    """Whether quantized matrices are ours to multiply with: a part of one is there at a time."""
    if model.stored is not None:
        return model.stored.method in _WRITTEN_OUT
    return settings.quantize == "fp8"


def part_elements(settings: TransformersSettings) -> int:
    """Weights that are written out at a time."""
    on_gpu = any(device != CPU for _, device in settings.device_map)
    return PART_ON_GPU if on_gpu else PART_ON_CPU


def _weights(model: CheckpointSpec, settings: TransformersSettings) -> Iterator[LoadedTensor]:
    if model.stored is not None:
        yield from _as_stored(model.tensors, model.stored, settings)
        return
    for tensor in model.tensors:
        quantize = _quantize(tensor, settings)
        yield _plain(tensor, settings) if quantize == "none" else _made(tensor, quantize, settings)


def _plain(tensor: CheckpointTensor, settings: TransformersSettings) -> LoadedTensor:
    """Numbers are cast to what is computed in, all else is as in the file."""
    if not tensor.is_float:
        return _loaded(tensor, tensor.dtype.lower(), (tensor.size_bytes,))
    kind = settings.compute_type
    return _loaded(tensor, kind, (tensor.n_elements * COMPUTE_BYTES[kind],))


def _quantize(tensor: CheckpointTensor, settings: TransformersSettings) -> Quantize:
    """What loading makes of a tensor of a checkpoint that is not quantized."""
    if not tensor.is_float or not tensor.name.endswith(".weight"):
        return "none"
    if settings.quantize == "fp8":
        return "fp8" if tensor.role in ("linear", "expert") else "none"
    if tensor.role != "linear" or _kept_on_cpu(tensor.name, settings):
        return "none"
    return settings.quantize


def _kept_on_cpu(name: str, settings: TransformersSettings) -> bool:
    """Beside a GPU bitsandbytes leaves modules of the CPU unquantized."""
    devices = {device for _, device in settings.device_map}
    return len(devices) > 1 and device_of(name, settings.device_map) == CPU


@lru_cache(maxsize=16)
def _by_module(device_map: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    return dict(device_map)


def device_of(name: str, device_map: tuple[tuple[str, str], ...]) -> str:
    """The device of the longest entry that is a prefix of a name."""
    by_module = _by_module(device_map)
    while name:
        if name in by_module:
            return by_module[name]
        name = name.rpartition(".")[0]
    return by_module.get("", CPU)


def _made(
    tensor: CheckpointTensor, quantize: Quantize, settings: TransformersSettings
) -> LoadedTensor:
    if quantize in ("nf4", "fp4"):
        parts = four_bit_allocations(tensor.n_elements, settings.double_quant)
        return _loaded(tensor, quantize, parts)
    rows, columns = tensor.shape[-2], tensor.shape[-1]
    if quantize == "int8":
        return _loaded(tensor, "int8", int8_allocations(rows, columns))
    return _loaded(tensor, "fp8", fp8_allocations(rows, columns))


# ---- checkpoints that are quantized already


def _as_stored(
    tensors: tuple[CheckpointTensor, ...], stored: Stored, settings: TransformersSettings
) -> Iterator[LoadedTensor]:
    """Matrices with what belongs to them, bytes as in the file; the rest as computed."""
    belongings: dict[str, list[CheckpointTensor]] = {}
    for tensor in tensors:
        if tensor.role == "statistic":
            belongings.setdefault(owner_of(tensor.name), []).append(tensor)
    for tensor in tensors:
        if tensor.role == "statistic":
            continue
        if tensor.module in belongings and not tensor.name.endswith(".bias"):
            yield _kept(tensor, belongings[tensor.module], stored)
        else:
            yield _plain(tensor, settings)


def owner_of(name: str) -> str:
    """The module of a scale: bitsandbytes names its four-bit ones below `.weight`."""
    module, found, _ = name.partition(".weight.")
    return module if found else name.rpartition(".")[0]


def _kept(
    tensor: CheckpointTensor, belongings: list[CheckpointTensor], stored: Stored
) -> LoadedTensor:
    n_elements = tensor.size_bytes * 8 // stored.bits
    parts = [_unpacked_bytes(one, stored) for one in belongings]
    kept = (tensor.size_bytes, *(size for size in parts if size))
    return replace(_loaded(tensor, _kind(tensor, stored), kept), n_elements=n_elements)


def _unpacked_bytes(tensor: CheckpointTensor, stored: Stored) -> int:
    """bitsandbytes' description of a matrix becomes the mean of its scales, if it has one."""
    if ".quant_state." in tensor.name:
        return OFFSET_BYTES if stored.double_quant else 0
    return tensor.size_bytes


def _kind(tensor: CheckpointTensor, stored: Stored) -> str:
    if stored.method == "bnb4":
        return "fp4" if stored.fp4 else "nf4"
    return "fp8" if tensor.dtype.startswith("F8") else f"int{stored.bits}"


def _loaded(tensor: CheckpointTensor, kind: str, allocations: tuple[int, ...]) -> LoadedTensor:
    return LoadedTensor(
        name=tensor.name,
        module=tensor.module,
        layer=tensor.layer,
        role=tensor.role,
        kind=kind,
        n_elements=tensor.n_elements,
        allocations=allocations,
        source=tensor,
    )


def _buffers(model: CheckpointSpec, compute_type: ComputeType) -> Iterator[LoadedTensor]:
    """What no file holds: inverse frequencies, twice (`inv_freq`, `original_inv_freq`)."""
    for index in range(model.n_rope):
        yield _buffer("model.rotary_emb", f"inv_freq.{index}", (model.rope_width * _F32,) * 2)
    if model.embed_scale:
        yield _buffer("model.embed_tokens", "embed_scale", (COMPUTE_BYTES[compute_type],))


def _buffer(module: str, name: str, allocations: tuple[int, ...]) -> LoadedTensor:
    return LoadedTensor(
        name=f"{module}.{name}",
        module=module,
        layer=None,
        role="buffer",
        kind="f32",
        n_elements=sum(allocations) // _F32,
        allocations=allocations,
    )
