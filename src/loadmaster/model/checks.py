"""What a header's values must be before the engine may see the file.

Each rule stands for an abort, a crash or a silent misreading of the engine that was seen or read
in llama.cpp (llama-model.cpp `load_hparams`, llama-vocab.cpp, ggml.c); rules are looser than its
own refusals wherever files in use differ. What the engine refuses in words is left to it.
"""

from math import isfinite

from loadmaster.model import architectures, gguf
from loadmaster.model.damage import quoted, refused
from loadmaster.model.fields import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Fields
from loadmaster.model.gguf import Header
from loadmaster.model.tensor_checks import check_tensors
from loadmaster.model.tokenizer_checks import check_tokenizer
from loadmaster.model.types import TensorSpec

_INT32_MAX = (1 << 31) - 1
MAX_WINDOW = 1 << 30  # the engine adds n_ubatch and rounds in 32 bits


def check_model(header: Header, tensors: tuple[TensorSpec, ...]) -> None:
    """Judge a model by its first shard's header and the tensors of all its shards.

    Raises:
        DamagedFileError: naming the field, where it is, what was found and what is allowed.
    """
    fields = Fields(header)
    _check_architecture(fields)
    _check_sizes(fields)
    _check_heads(fields)
    _check_windows(fields)
    _check_recurrence(fields, tensors)
    _check_experts(fields)
    _check_floats(fields)
    check_tokenizer(fields)
    check_tensors(fields, tensors)


def _check_architecture(fields: Fields) -> None:
    header = fields.header
    kind = header.metadata.get("general.type")
    reason = architectures.NOT_A_MODEL.get(fields.architecture)
    if isinstance(kind, str):
        reason = reason or architectures.NOT_A_MODEL_TYPE.get(kind)
    if reason is not None:
        raise refused(
            "not_a_model", f"{header.label} is {reason}",
            hint="name the file of the language model", file=header.label,
        )  # fmt: skip
    if "general.architecture" not in header.entries:
        raise fields.missing("general.architecture")
    if fields.architecture not in architectures.KNOWN:
        raise refused(
            "unsupported_architecture",
            f"{header.label} has architecture {quoted(fields.architecture)}, which this engine "
            f"does not know; it knows {', '.join(sorted(architectures.KNOWN))}",
            hint="a newer engine may know it; `loadmaster engine list` shows yours",
            file=header.label,
            found=fields.architecture[:64],
        )


def _check_sizes(fields: Fields) -> None:
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    fields.required(fields.key("context_length"), 1, _INT32_MAX)
    fields.required(fields.key("embedding_length"), 1, MAX_WIDTH)
    fields.integer(fields.key("nextn_predict_layers"), 0, n_layer - 1)
    fields.integer(fields.key("vocab_size"), 1, gguf.MAX_TOKENS * 8)
    fields.integer("general.file_type", 0, 1 << 16)
    for name in ("feed_forward_length", "expert_feed_forward_length"):
        fields.per_layer(fields.key(name), n_layer, 0, MAX_WIDTH)
    fields.integer(fields.key("attention.sliding_window"), 0, MAX_WINDOW)


def _check_heads(fields: Fields) -> None:
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    n_embd = fields.required(fields.key("embedding_length"), 1, MAX_WIDTH)
    head_key, kv_key = fields.key("attention.head_count"), fields.key("attention.head_count_kv")
    heads = fields.per_layer(head_key, n_layer, 0, MAX_HEADS) or (0,) * n_layer
    kv_heads = fields.per_layer(kv_key, n_layer, 0, MAX_HEADS) or heads
    for n_head, n_head_kv in zip(heads, kv_heads, strict=True):
        # Attention maps query heads onto KV heads in equal groups (ggml_can_mul_mat asserts).
        if n_head_kv and n_head % n_head_kv:
            raise fields.wrong(kv_key, n_head_kv, f"divisors of {n_head}, the query heads")
    key_length = fields.integer(fields.key("attention.key_length"), 1, MAX_WIDTH)
    value_length = fields.integer(fields.key("attention.value_length"), 1, MAX_WIDTH)
    if heads[0]:
        if key_length is None and n_embd % heads[0]:
            raise fields.wrong(head_key, heads[0], f"divisors of {n_embd}, the embedding length")
        plain = n_embd // heads[0]
        _check_head_widths(fields, key_length or plain, value_length or plain)
    _check_rope_scaling(fields)


def _check_head_widths(fields: Fields, key_width: int, value_width: int) -> None:
    """What the graphs assert of a head's widths; windowed layers with their own are left alone."""
    rope_key = fields.key("rope.dimension_count")
    n_rot = fields.integer(rope_key, 0, MAX_WIDTH)
    if n_rot is not None:
        needs_rope = fields.architecture in architectures.NEEDS_ROPE
        if n_rot > key_width or n_rot % 2 or (needs_rope and n_rot == 0):
            allowed = f"even, up to {key_width}, the width of a head"
            raise fields.wrong(rope_key, n_rot, f"above 0, {allowed}" if needs_rope else allowed)
    swa_key = fields.key("rope.dimension_count_swa")
    if (fields.integer(swa_key, 0, MAX_WIDTH) or 0) % 2:
        raise fields.wrong(swa_key, fields.metadata[swa_key], "even")
    if (
        fields.architecture == "deepseek2"
        and fields.key("attention.key_length_mla") in fields.metadata
    ):
        _check_compressed(fields, key_width, n_rot or 0)
    if any(key.endswith(("_length_swa", "dimension_count_swa")) for key in fields.metadata):
        return
    if fields.architecture in architectures.EQUAL_HEADS and key_width != value_width:
        key = fields.key("attention.value_length")
        raise fields.wrong(key, value_width, f"{key_width}, as wide as a key")
    if n_rot is None or fields.architecture not in architectures.WHOLE_HEAD_ROPE:
        return
    if n_rot != key_width:
        raise fields.wrong(rope_key, n_rot, f"{key_width}, the width of a head")


def _check_compressed(fields: Fields, key_width: int, n_rot: int) -> None:
    """MLA caches one row: the compressed part and the part that RoPE turns."""
    kv_key = fields.key("attention.head_count_kv")
    if fields.metadata.get(kv_key, 1) != 1:
        raise fields.wrong(kv_key, fields.metadata[kv_key], "1, the compressed row")
    rank = fields.integer(fields.key("attention.kv_lora_rank"), 1, MAX_WIDTH)
    if rank is not None and key_width != rank + n_rot:
        key = fields.key("attention.key_length")
        raise fields.wrong(key, key_width, f"{rank + n_rot}, the KV rank and the RoPE width")


def _check_rope_scaling(fields: Fields) -> None:
    key = fields.key("rope.scaling.type")
    scaling = fields.metadata.get(key)
    if isinstance(scaling, str) and scaling not in ("none", "linear", "yarn", "longrope"):
        raise fields.wrong(key, quoted(scaling), "none, linear, yarn, longrope")
    key = fields.key("rope.scaling.original_context_length")
    fields.integer(key, 0, _INT32_MAX)


def _check_windows(fields: Fields) -> None:
    """Windowed layers: some, where a pattern is given; and a cache to share for gemma4's last."""
    key = fields.key("attention.sliding_window_pattern")
    pattern = fields.metadata.get(key)
    if not isinstance(pattern, tuple):
        return
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    windowed = [bool(one) for one in pattern[:n_layer]]
    if not any(windowed) and fields.integer(fields.key("attention.sliding_window"), 0, MAX_WINDOW):
        raise fields.wrong(key, "without a windowed layer", "with one at least")
    if fields.architecture != "gemma4" or len(windowed) < n_layer:
        return
    shared_key = fields.key("attention.shared_kv_layers")
    own = n_layer - (fields.integer(shared_key, 0, n_layer) or 0)
    # A layer from `own` on takes the cache of `own - 2` when windowed, of `own - 1` otherwise.
    for is_windowed in set(windowed[own:]):
        if own < 2 or windowed[own - 2 if is_windowed else own - 1] != is_windowed:
            raise fields.wrong(
                shared_key, n_layer - own, "a number that leaves layers of both kinds to share with"
            )


def _check_recurrence(fields: Fields, tensors: tuple[TensorSpec, ...]) -> None:
    """The inner width that the graphs of recurrent layers assert or divide by."""
    inner_key = fields.key("ssm.inner_size")
    inner = fields.integer(inner_key, 1, MAX_WIDTH)
    if inner is None:
        return
    wanted = inner
    if fields.architecture in architectures.DOUBLE_INNER:
        wanted = 2 * fields.required(fields.key("embedding_length"), 1, MAX_WIDTH)
    if fields.architecture in architectures.DELTA_NET:
        heads = fields.required(fields.key("ssm.time_step_rank"), 1, MAX_WIDTH)
        wanted = heads * fields.required(fields.key("ssm.state_size"), 1, MAX_WIDTH)
        _check_delta_net(fields, {tensor.name for tensor in tensors})
    if inner != wanted and any(".ssm_" in tensor.name for tensor in tensors):
        raise fields.wrong(inner_key, inner, f"{wanted}")


def _check_delta_net(fields: Fields, names: set[str]) -> None:
    """Each layer has its projection whole (older files) or as `attn_qkv` with a gate beside it."""
    for name in names:
        layer = name.removesuffix(".ssm_conv1d.weight")
        if layer == name or f"{layer}.ssm_in.weight" in names:
            continue
        for part in ("attn_qkv", "attn_gate"):
            if f"{layer}.{part}.weight" not in names:
                raise fields.wrong(
                    f"{layer}.{part}.weight", "missing", f"present beside {name}",
                    code="missing_tensor",
                )  # fmt: skip


def _check_experts(fields: Fields) -> None:
    """The assertions of load_hparams on experts and their groups."""
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    used_key, group_key = fields.key("expert_used_count"), fields.key("expert_group_count")
    n_expert = fields.integer(fields.key("expert_count"), 0, MAX_EXPERTS) or 0
    used = fields.per_layer(used_key, n_layer, 0, MAX_EXPERTS)
    n_used = max(used) if used else 0
    groups = fields.integer(group_key, 0, MAX_EXPERTS) or 0
    if fields.architecture in ("hunyuan_vl", "hunyuan-dense") and n_expert <= 1:
        return  # the engine takes these files as dense
    if n_expert == 0:
        if n_used or groups:
            key = used_key if n_used else group_key
            raise fields.wrong(key, n_used or groups, "0, as there are no experts")
        return
    if used and len(set(used)) > 1 and fields.architecture not in architectures.UNEVEN_EXPERTS:
        raise fields.wrong(used_key, "uneven", f"the same in each layer of {fields.architecture}")
    if not 1 <= n_used <= n_expert:
        raise fields.wrong(used_key, n_used, f"1–{n_expert}, the experts")
    if groups >= n_expert or (groups > 1 and n_expert % groups):
        raise fields.wrong(group_key, groups, f"divisors of {n_expert}, the experts")
    if groups > 1:
        key = fields.key("expert_group_used_count")
        fields.required(key, 1, groups - 1)


def _check_floats(fields: Fields) -> None:
    """Every number of the architecture is finite; norms and RoPE bases are positive."""
    prefix = fields.key("")
    for key, value in fields.metadata.items():
        if not key.startswith(prefix):
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if not isinstance(number, float):
                break
            if not isfinite(number):
                raise fields.wrong(key, number, "a finite number")
            if key.endswith(("epsilon", "_eps")) and not 0 <= number < 1:
                raise fields.wrong(key, number, "0 to 1")
            if ".rope.freq_base" in key and number <= 0:
                raise fields.wrong(key, number, "above 0")
            if key.endswith("rope.scaling.factor") and number < 0:
                raise fields.wrong(key, number, "0 or above")
