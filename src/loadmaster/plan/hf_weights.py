"""What every tensor of a checkpoint takes in memory once the transformers engine has loaded it.

Pure and exact: the sums are those of the tensors that torch 2.13, transformers 5.23 and
bitsandbytes 0.50.2 hold (`benchmarks/hf_accuracy.py` compares them). What is quantized is what the
engine replaces: every `nn.Linear` but the output (`get_keys_to_not_convert`). Experts are stacked
in one parameter of three dimensions, which is no `nn.Linear`: bitsandbytes leaves them as computed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from loadmaster.model.checkpoint import CheckpointSpec, CheckpointTensor
from loadmaster.plan.types import Quantize, TransformersSettings
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
_GATE_AND_UP = (".gate_proj.weight", ".w1.weight", ".up_proj.weight", ".w3.weight")


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


def four_bit_allocations(n_elements: int, double_quant: bool) -> tuple[int, ...]:
    """A matrix in NF4 or FP4: packed values, scales, tables (`quantize_4bit`)."""
    packed, n_scales = -(-n_elements // 2), -(-n_elements // BLOCK)
    if not double_quant:
        return (packed, n_scales * _F32, CODE_BYTES)
    nested = -(-n_scales // NESTED_BLOCK) * _F32
    return (packed, n_scales, CODE_BYTES, nested, NESTED_CODE_BYTES, OFFSET_BYTES)


def int8_allocations(rows: int, columns: int) -> tuple[int, ...]:
    """A matrix in LLM.int8: its values (CB) and a scale for each row (SCB)."""
    return (rows * columns, rows * _F32)


def fp8_allocations(rows: int, columns: int, tile: tuple[int, int] = FP8_TILE) -> tuple[int, ...]:
    """A matrix in FP8 with a scale for each tile; one that tiles do not divide stays in 16 bits,
    beside the scales that were made for it (`Fp8Quantize._quantize_one`)."""
    scales = -(-rows // tile[0]) * -(-columns // tile[1]) * _F32
    whole = rows % tile[0] == 0 and columns % tile[1] == 0
    return (rows * columns * (1 if whole else 2), scales)


def _weights(model: CheckpointSpec, settings: TransformersSettings) -> Iterator[LoadedTensor]:
    nested = model.stored is not None and model.stored.double_quant
    for tensor in model.tensors:
        quantize = _quantize(model, tensor, settings)
        if quantize != "none":
            yield _made(tensor, quantize, settings)
        elif tensor.is_float and not _keeps_type(model, tensor):
            kind = _float_type(model, tensor, settings)
            yield _loaded(tensor, kind, (tensor.n_elements * COMPUTE_BYTES[kind],))
        else:
            yield from _as_stored(tensor, nested)


def _quantize(
    model: CheckpointSpec, tensor: CheckpointTensor, settings: TransformersSettings
) -> Quantize:
    """What loading makes of a tensor."""
    if model.stored is not None or not tensor.is_float:
        return "none"
    if tensor.role == "linear" and tensor.name.endswith(".weight"):
        on_cpu = settings.quantize != "none" and _kept_on_cpu(tensor.name, settings)
        return "none" if on_cpu else settings.quantize
    if tensor.role == "expert" and settings.quantize == "fp8":
        return "fp8"
    return "none"


def _kept_on_cpu(name: str, settings: TransformersSettings) -> bool:
    """Beside a GPU the engine leaves modules of the CPU unquantized."""
    devices = {device for _, device in settings.device_map}
    return len(devices) > 1 and device_of(name, settings.device_map) == "cpu"


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
    return by_module.get("", "cpu")


def _float_type(
    model: CheckpointSpec, tensor: CheckpointTensor, settings: TransformersSettings
) -> ComputeType:
    """As computed; biases beside FP8 matrices are F32 (`FP8Linear`)."""
    fp8 = settings.quantize == "fp8" or (model.stored is not None and model.stored.method == "fp8")
    beside = (
        tensor.name.endswith(".bias") and tensor.layer is not None and "norm" not in tensor.name
    )
    return "f32" if fp8 and beside else settings.compute_type


def _keeps_type(model: CheckpointSpec, tensor: CheckpointTensor) -> bool:
    """Scales of a checkpoint that is quantized already are not cast."""
    return model.stored is not None and tensor.role == "statistic"


def _made(
    tensor: CheckpointTensor, quantize: Quantize, settings: TransformersSettings
) -> LoadedTensor:
    if quantize in ("nf4", "fp4"):
        parts = four_bit_allocations(tensor.n_elements, settings.double_quant)
        return _loaded(tensor, quantize, parts)
    rows, columns = tensor.shape[-2], tensor.shape[-1]
    if quantize == "int8":
        return _loaded(tensor, "int8", int8_allocations(rows, columns))
    if tensor.role == "expert":
        return _loaded(tensor, "fp8", _fp8_expert(tensor.name, rows, columns))
    return _loaded(tensor, "fp8", fp8_allocations(rows, columns))


def _fp8_expert(name: str, rows: int, columns: int) -> tuple[int, ...]:
    """One expert's matrix. Gate and up are quantized as one, with two rows of scales at least
    (`FP8Experts`); here the gate has the scales of both."""
    if not name.endswith(_GATE_AND_UP):
        return fp8_allocations(rows, columns)
    weights, _ = fp8_allocations(2 * rows, columns)
    scales = max(2, -(-2 * rows // FP8_TILE[0])) * -(-columns // FP8_TILE[1]) * _F32
    return (weights // 2, scales) if name.endswith(_GATE_AND_UP[:2]) else (weights // 2,)


def _as_stored(tensor: CheckpointTensor, nested: bool) -> Iterator[LoadedTensor]:
    """A tensor of a quantized checkpoint: bytes as in the file, its description unpacked."""
    if ".quant_state." in tensor.name:
        if nested:
            yield _loaded(tensor, "statistic", (OFFSET_BYTES,))
        return
    if tensor.name.endswith(".weight_format"):
        return
    yield _loaded(tensor, tensor.dtype.lower(), (tensor.size_bytes,))


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
