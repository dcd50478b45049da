"""The tensors of a checkpoint: what each is to the engine, and whether the config agrees. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence

from loadmaster.errors import DamagedFileError
from loadmaster.model.checkpoint import CheckpointTensor, Role
from loadmaster.model.damage import damaged, refused
from loadmaster.model.hf_config import Dimensions
from loadmaster.model.hf_packed import check_packed
from loadmaster.model.safetensors import ShardHeader, StoredTensor
from loadmaster.units import Bytes

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.")
# Tables that older checkpoints carry and that the engine makes anew; what products of quantized
# activations or caches would take, and shapes that are known.
_NOT_LOADED = re.compile(
    r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$"
    r"|\.(input_scale|input_scale_ub|input_zero_point|input_global_scale|output_scale"
    r"|output_zero_point|activation_scale|k_scale|v_scale|q_scale|weight_shape|weight_format)$"
)
# Endings of what belongs to a quantized matrix (bitsandbytes, fp8, gptq, awq, compressed-tensors).
_STATISTICS = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB",
    ".weight_scale_inv", ".weight_scale", ".scales", ".qzeros", ".g_idx",
    ".weight_zero_point", ".weight_g_idx", ".weight_global_scale",
)  # fmt: skip
_MATRICES = (".weight", ".qweight", ".weight_packed")
_WIDE = ("F64", "F32", "F16", "BF16")
_ROWS = (".weight_scale", ".weight_scale_inv")
_SCALES_OF = {"weight": (*_ROWS, ".weight.absmax", ".SCB"), "weight_packed": _ROWS}


def checkpoint_tensors(
    shards: Sequence[ShardHeader], dims: Dimensions, label: str
) -> tuple[tuple[CheckpointTensor, ...], Mapping[str, Bytes]]:
    """Every tensor that is loaded, and the bytes of those that are not, by name.

    Raises:
        DamagedFileError: the headers contradict the config.
    """
    found: dict[str, tuple[StoredTensor, int]] = {}
    for number, shard in enumerate(shards):
        for tensor in shard.tensors:
            if tensor.name in found:
                raise damaged(
                    "duplicate_tensor", shard.label, "a tensor's name", tensor.name, "one of each"
                )
            found[tensor.name] = (tensor, number)
    # Saved without its output, as `AutoModel` has it: without the prefix, too.
    is_base = EMBEDDING not in found and "embed_tokens.weight" in found
    prefix = "model." if is_base else ""
    skipped: dict[str, Bytes] = {}
    tensors = []
    for name, (tensor, number) in found.items():
        full = name if name == OUTPUT else prefix + name
        if _NOT_LOADED.search(full):
            skipped[full] = tensor.size_bytes
        else:
            tensors.append(_tensor(full, tensor, number, dims))
    _check(tensors, dims, label, is_base=is_base)
    return tuple(tensors), skipped


def _tensor(name: str, tensor: StoredTensor, shard: int, dims: Dimensions) -> CheckpointTensor:
    match = _LAYER.match(name)
    return CheckpointTensor(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        size_bytes=tensor.size_bytes,
        role=role_of(name, len(tensor.shape), dims.family.routers),
        layer=int(match[1]) if match and len(match[1]) < 7 else None,
        shard=shard,
    )


def role_of(name: str, n_dimensions: int, routers: Iterable[str] = ()) -> Role:
    """What a tensor is to the engine, by its name."""
    if name == EMBEDDING:
        return "embedding"
    if name == OUTPUT:
        return "output"
    if is_statistic(name):
        return "statistic"
    if _EXPERT.search(name):
        return "expert"
    module = name.rpartition(".")[0]
    is_matrix = name.endswith(_MATRICES) and n_dimensions == 2
    if not is_matrix or module.endswith(tuple(routers)):
        return "other"
    return "linear"


def is_statistic(name: str) -> bool:
    """Whether a tensor belongs to a quantized matrix."""
    return name.endswith(_STATISTICS)


# ---- does the config agree


def _check(
    tensors: Sequence[CheckpointTensor], dims: Dimensions, label: str, *, is_base: bool
) -> None:
    by_name = {tensor.name: tensor for tensor in tensors}
    needed = [EMBEDDING, *([] if dims.tied or is_base else [OUTPUT])]
    for name in needed:
        if name not in by_name:
            raise _missing(name, label)
    _check_shape(by_name, EMBEDDING, (dims.n_vocab, dims.n_embd), label)
    _check_shape(by_name, OUTPUT, (dims.n_vocab, dims.n_embd), label)
    seen = {tensor.layer for tensor in tensors if tensor.layer is not None}
    for index in range(dims.n_layer):
        if index not in seen:
            raise _missing(f"model.layers.{index}", label)
    if max(seen, default=0) >= dims.n_layer:
        raise _contradiction("num_hidden_layers", dims.n_layer, f"{max(seen) + 1} layers", label)
    _check_layers(by_name, dims, label)
    _check_quantized(tensors, dims, label)
    if dims.stored is not None:
        check_packed(tensors, dims.stored, label)


def _check_quantized(tensors: Sequence[CheckpointTensor], dims: Dimensions, label: str) -> None:
    """Quantized matrices have scales, and others have none."""
    scales = next((tensor.name for tensor in tensors if tensor.role == "statistic"), None)
    if (dims.stored is None) == (scales is None):
        if dims.stored is not None and dims.stored.runs:
            _check_scaled(tensors)
        return
    said = "knows nothing of quantization" if dims.stored is None else f"says {dims.stored.label}"
    held = f"have `{scales}`" if scales else "have no scales"
    raise refused(
        "config_mismatch",
        f"{label} {said}, and the shards {held}",
        hint="config.json is of another model: download the checkpoint again",
    )


def _check_scaled(tensors: Sequence[CheckpointTensor]) -> None:
    """Each matrix in few bits has its own: without them its numbers are others."""
    names = {tensor.name for tensor in tensors}
    for tensor in tensors:
        if tensor.role not in ("linear", "expert", "output") or tensor.dtype in _WIDE:
            continue
        scales = _SCALES_OF.get(tensor.name.rpartition(".")[2], ())
        if scales and not any(tensor.module + ending in names for ending in scales):
            raise refused(
                "missing_tensor",
                f"the shards have no scales of `{tensor.name}`, which is in {tensor.dtype}",
                hint="a shard is missing or of another model: download the checkpoint again",
            )


def _check_layers(by_name: Mapping[str, CheckpointTensor], dims: Dimensions, label: str) -> None:
    """Matrices whose sizes the config tells."""
    width, kv_width = dims.n_head * dims.head_dim, dims.n_head_kv * dims.head_dim
    expected = {
        "self_attn.q_proj": (width, dims.n_embd),
        "self_attn.k_proj": (kv_width, dims.n_embd),
        "self_attn.v_proj": (kv_width, dims.n_embd),
        "self_attn.o_proj": (dims.n_embd, width),
        "self_attn.qkv_proj": (width + 2 * kv_width, dims.n_embd),
    }
    if not dims.n_expert:
        expected |= {
            "mlp.gate_proj": (dims.n_ff, dims.n_embd),
            "mlp.up_proj": (dims.n_ff, dims.n_embd),
            "mlp.down_proj": (dims.n_embd, dims.n_ff),
            "mlp.gate_up_proj": (2 * dims.n_ff, dims.n_embd),
        }
    for index in range(dims.n_layer):
        for part, shape in expected.items():
            _check_shape(by_name, f"model.layers.{index}.{part}.weight", shape, label)
    modules = {tensor.module for tensor in by_name.values() if tensor.name.endswith(_MATRICES)}
    for part in expected:
        without = [i for i in range(dims.n_layer) if f"model.layers.{i}.{part}" not in modules]
        if 0 < len(without) < dims.n_layer:
            raise _missing(f"model.layers.{without[0]}.{part}.weight", label)


def _check_shape(
    by_name: Mapping[str, CheckpointTensor], name: str, shape: tuple[int, int], label: str
) -> None:
    tensor = by_name.get(name)
    if tensor is None or tensor.shape == shape:
        return
    if f"{name}.absmax" in by_name and 2 * tensor.size_bytes == shape[0] * shape[1]:
        return  # four-bit values, two in a byte, in whatever type they were saved as
    raise _contradiction(name, f"{shape[0]}×{shape[1]}", _shown(tensor.shape), label)


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _missing(name: str, label: str) -> DamagedFileError:
    return refused(
        "missing_tensor",
        f"the shards have no `{name}`, which {label} asks for",
        hint="a shard is missing or of another model: download the checkpoint again",
    )


def _contradiction(what: str, config: object, headers: object, label: str) -> DamagedFileError:
    return refused(
        "config_mismatch",
        f"{label} and the shards contradict each other: {what} is {config} by the config and "
        f"{headers} by the headers",
        hint="config.json is of another model: download the checkpoint again",
    )
