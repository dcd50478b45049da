"""The tensors' types and shapes, as the graphs of the engine assert them."""

from loadmaster.errors import DamagedFileError
from loadmaster.model import architectures, quants
from loadmaster.model.damage import damaged, quoted, refused
from loadmaster.model.fields import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Fields
from loadmaster.model.types import TensorSpec

# Types no weights may have: the engine has no product with them and aborts. Integers are for the
# few tensors that are tables of indices.
_NOT_WEIGHTS = frozenset({"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_K"})
_INTEGERS = frozenset({"i32", "i64"})
_INDEX_TABLES = ("tid2eid", "d2t", "t2d", "ple")
# Tensors that only F32 operations read: an element-wise add, multiply, RoPE factors, sinks.
_ALWAYS_F32 = (
    "norm.weight", ".bias", ".scale", "attn_sinks.weight", "rope_freqs.weight",
    "rope_factors_long.weight", "rope_factors_short.weight", "ssm_conv1d.weight", "ssm_a", "ssm_d",
)  # fmt: skip


def check_tensors(fields: Fields, tensors: tuple[TensorSpec, ...]) -> None:
    if not tensors:
        raise refused(
            "missing_tensor", f"{fields.header.label} has no tensors: it is a vocabulary or a stub",
            hint="name the file with the weights", file=fields.header.label,
        )  # fmt: skip
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    for tensor in tensors:
        _check_tensor_type(fields, tensor)
        if tensor.layer is not None and tensor.layer >= n_layer:
            raise _wrong_tensor(fields, tensor, f"in layer {tensor.layer}", f"0–{n_layer - 1}")
    if fields.architecture in architectures.EMBEDS_VOCABULARY:
        _check_embedding(fields, tensors)
        if fields.architecture in architectures.EQUAL_HEADS:
            _check_projections(fields, tensors)
            _check_attention_whole(fields, tensors)


def _wrong_tensor(
    fields: Fields, tensor: TensorSpec, found: object, allowed: str, code: str = "shape_mismatch"
) -> DamagedFileError:
    offset = fields.header.tensor_offsets.get(tensor.name) if tensor.shard == 0 else None
    return damaged(
        code, fields.header.label, f"tensor {quoted(tensor.name)}", found, allowed, offset=offset
    )


def _check_tensor_type(fields: Fields, tensor: TensorSpec) -> None:
    if tensor.name.endswith(_ALWAYS_F32) and tensor.type is not quants.F32:
        raise _wrong_tensor(fields, tensor, tensor.type.name, "f32", "unsupported_quant")
    is_table = tensor.type.name in _INTEGERS and any(one in tensor.name for one in _INDEX_TABLES)
    if tensor.type.name in _NOT_WEIGHTS and not is_table:
        raise _wrong_tensor(
            fields, tensor, tensor.type.name, "a floating-point or quantized type",
            "unsupported_quant",
        )  # fmt: skip


def _check_embedding(fields: Fields, tensors: tuple[TensorSpec, ...]) -> None:
    by_name = {tensor.name: tensor for tensor in tensors}
    n_embd = fields.required(fields.key("embedding_length"), 1, MAX_WIDTH)
    embedding = by_name.get("token_embd.weight")
    if embedding is None:
        raise fields.wrong("token_embd.weight", "missing", "present", code="missing_tensor")
    tokens = fields.header.tokens
    n_vocab = tokens.count if tokens else embedding.shape[-1]
    for tensor in (embedding, by_name.get("output.weight")):
        if tensor is not None and tensor.shape[:2] != (n_embd, n_vocab):
            raise _wrong_tensor(
                fields, tensor, f"of shape {list(tensor.shape)}",
                f"[{n_embd}, {n_vocab}]: the embedding length, the tokens",
            )  # fmt: skip


def _check_projections(fields: Fields, tensors: tuple[TensorSpec, ...]) -> None:
    """Queries and keys come out as wide as their heads: the graph reshapes them and asserts it."""
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    n_embd = fields.required(fields.key("embedding_length"), 1, MAX_WIDTH)
    heads_key, kv_key = fields.key("attention.head_count"), fields.key("attention.head_count_kv")
    heads = fields.per_layer(heads_key, n_layer, 0, MAX_HEADS)
    kv_heads = fields.per_layer(kv_key, n_layer, 0, MAX_HEADS) or heads
    if not heads or not kv_heads or not heads[0]:
        return
    if any(key.endswith("_length_swa") for key in fields.metadata):
        return
    width = fields.integer(fields.key("attention.key_length"), 1, MAX_WIDTH) or n_embd // heads[0]
    for tensor in tensors:
        layer = tensor.layer
        if layer is None or len(tensor.shape) != 2:
            continue
        role = tensor.name.removeprefix(f"blk.{layer}.").removesuffix(".weight")
        counts = {"attn_q": heads[layer], "attn_k": kv_heads[layer]}
        if fields.architecture not in architectures.DELTA_NET:
            counts["attn_qkv"] = heads[layer] + 2 * kv_heads[layer]
        wanted = counts.get(role, 0) * width
        # A query may have a gate as wide as itself beside it (qwen3next).
        if wanted and (tensor.shape[0] != n_embd or tensor.shape[1] % wanted):
            raise _wrong_tensor(
                fields, tensor, f"of shape {list(tensor.shape)}",
                f"[{n_embd}, {wanted}]: the embedding length, {counts[role]} heads of {width}",
            )  # fmt: skip


def _check_attention_whole(fields: Fields, tensors: tuple[TensorSpec, ...]) -> None:
    """A layer with an attention output has what feeds it; phi3's loader does not insist."""
    if fields.architecture == "deci":  # its linear layers have an output alone
        return
    names = {tensor.name for tensor in tensors}
    for name in names:
        layer = name.removesuffix(".attn_output.weight")
        fed = (f"{layer}.attn_qkv.weight", f"{layer}.attn_q.weight", f"{layer}.attn_q_b.weight")
        if layer != name and layer.startswith("blk.") and not any(one in names for one in fed):
            raise fields.wrong(fed[0], "missing", f"present beside {name}", code="missing_tensor")
