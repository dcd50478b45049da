"""What a header's values must be before the engine may see the file.

Each rule stands for an abort, a crash or a silent misreading of the engine that was seen or read
in llama.cpp (llama-model.cpp `load_hparams`, llama-vocab.cpp, ggml.c); rules are looser than its
own refusals wherever files in use differ. What the engine refuses in words is left to it.
"""

from array import array
from collections.abc import Mapping
from math import isfinite

from loadmaster.errors import DamagedFileError
from loadmaster.model import architectures, gguf, quants
from loadmaster.model.damage import damaged, quoted, refused
from loadmaster.model.gguf import Entry, Header
from loadmaster.model.types import MetadataValue, TensorSpec

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_HEADS = 4096
MAX_WIDTH = 1 << 24
_INT32_MAX = (1 << 31) - 1
_NO_TOKEN = 0xFFFFFFFF  # -1 as u32: converters write it for "none"


def check_model(header: Header, tensors: tuple[TensorSpec, ...]) -> None:
    """Judge a model by its first shard's header and the tensors of all its shards.

    Raises:
        DamagedFileError: naming the field, where it is, what was found and what is allowed.
    """
    fields = _Fields(header)
    _check_architecture(fields)
    _check_sizes(fields)
    _check_heads(fields)
    _check_windows(fields)
    _check_experts(fields)
    _check_floats(fields)
    _check_tokenizer(fields)
    _check_tensors(fields, tensors)


class _Fields:
    """A header's values by name, with what it takes to say where one is wrong."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.metadata: Mapping[str, MetadataValue] = header.metadata
        value = header.metadata.get("general.architecture")
        self.architecture = value if isinstance(value, str) else ""

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def entry(self, key: str) -> Entry | None:
        return self.header.entries.get(key)

    def wrong(
        self, key: str, found: object, allowed: str, *, code: str = "gguf_field_out_of_range"
    ) -> DamagedFileError:
        entry = self.entry(key)
        offset = entry.offset if entry else None
        return damaged(code, self.header.label, key, found, allowed, offset=offset)

    def missing(self, key: str) -> DamagedFileError:
        return self.wrong(key, "missing", "present", code="missing_key")

    def integer(self, key: str, low: int, high: int) -> int | None:
        """The scalar integer under `key`, None when there is none; outside low–high is damage."""
        value = self.metadata.get(key)
        if key not in self.header.entries:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            entry = self.header.entries[key]
            raise self.wrong(key, f"{_article(entry.type_name)}", "an integer", code="bad_type")
        if not low <= value <= high:
            raise self.wrong(key, value, f"{low}–{high}")
        return value

    def required(self, key: str, low: int, high: int) -> int:
        value = self.integer(key, low, high)
        if value is None:
            raise self.missing(key)
        return value

    def per_layer(self, key: str, n_layer: int, low: int, high: int) -> tuple[int, ...] | None:
        """One integer for each layer, from a scalar or an array of at least that length."""
        value = self.metadata.get(key)
        if not isinstance(value, tuple):
            number = self.integer(key, low, high)
            return None if number is None else (number,) * n_layer
        if len(value) < n_layer:
            raise self.wrong(key, f"{len(value)} numbers", f"one for each of {n_layer} layers")
        numbers = tuple(int(one) for one in value[:n_layer] if isinstance(one, int))
        if len(numbers) < n_layer or not all(low <= one <= high for one in numbers):
            worst = next((one for one in value if not _within(one, low, high)), value[0])
            raise self.wrong(key, worst, f"{low}–{high} in each layer")
        return numbers


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _within(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and low <= value <= high


def _check_architecture(fields: _Fields) -> None:
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


def _check_sizes(fields: _Fields) -> None:
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    fields.required(fields.key("context_length"), 1, _INT32_MAX)
    fields.required(fields.key("embedding_length"), 1, MAX_WIDTH)
    fields.integer(fields.key("nextn_predict_layers"), 0, n_layer - 1)
    fields.integer(fields.key("vocab_size"), 1, gguf.MAX_TOKENS * 8)
    fields.integer("general.file_type", 0, 1 << 16)
    for name in ("feed_forward_length", "expert_feed_forward_length"):
        fields.per_layer(fields.key(name), n_layer, 0, MAX_WIDTH)
    fields.integer(fields.key("attention.sliding_window"), 0, _INT32_MAX)


def _check_heads(fields: _Fields) -> None:
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


def _check_head_widths(fields: _Fields, key_width: int, value_width: int) -> None:
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


def _check_compressed(fields: _Fields, key_width: int, n_rot: int) -> None:
    """MLA caches one row: the compressed part and the part that RoPE turns."""
    rank = fields.integer(fields.key("attention.kv_lora_rank"), 1, MAX_WIDTH)
    if rank is not None and key_width != rank + n_rot:
        key = fields.key("attention.key_length")
        raise fields.wrong(key, key_width, f"{rank + n_rot}, the KV rank and the RoPE width")


def _check_rope_scaling(fields: _Fields) -> None:
    key = fields.key("rope.scaling.type")
    scaling = fields.metadata.get(key)
    if isinstance(scaling, str) and scaling not in ("none", "linear", "yarn", "longrope"):
        raise fields.wrong(key, quoted(scaling), "none, linear, yarn, longrope")
    key = fields.key("rope.scaling.original_context_length")
    fields.integer(key, 0, _INT32_MAX)


def _check_windows(fields: _Fields) -> None:
    """Windowed layers: some, where a pattern is given; and a cache to share for gemma4's last."""
    key = fields.key("attention.sliding_window_pattern")
    pattern = fields.metadata.get(key)
    if not isinstance(pattern, tuple):
        return
    n_layer = fields.required(fields.key("block_count"), 1, MAX_LAYERS)
    windowed = [bool(one) for one in pattern[:n_layer]]
    if not any(windowed) and fields.integer(fields.key("attention.sliding_window"), 0, _INT32_MAX):
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


def _check_experts(fields: _Fields) -> None:
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
    if not 1 <= n_used <= n_expert:
        raise fields.wrong(used_key, n_used, f"1–{n_expert}, the experts")
    if groups >= n_expert or (groups > 1 and n_expert % groups):
        raise fields.wrong(group_key, groups, f"divisors of {n_expert}, the experts")
    if groups > 1:
        key = fields.key("expert_group_used_count")
        fields.required(key, 1, groups - 1)


def _check_floats(fields: _Fields) -> None:
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


# The ids that the engine uses when the file names none (llama_vocab::impl::load).
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2},
    "gpt2": {"bos": 11, "eos": 11},
    "bert": {"bos": 101},
    "t5": {"eos": 1},
    "plamo2": {"bos": 1, "eos": 2},
}
_NO_DEFAULT_BOS = frozenset({"chatglm-bpe", "glm4", "glm5"})


def _check_tokenizer(fields: _Fields) -> None:
    header = fields.header
    model = header.metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return
    tokens_entry = fields.entry(gguf.TOKENS)
    if tokens_entry is None or header.tokens is None:
        found = "missing" if tokens_entry is None else _article(tokens_entry.type_name)
        raise fields.wrong(gguf.TOKENS, found, "an array of string", code="bad_tokenizer")
    if header.tokens.count == 0 or header.tokens.all_empty:
        raise fields.wrong(gguf.TOKENS, "empty", "at least one token", code="bad_tokenizer")
    if model == "llama" and header.tokens.unspelled_bytes:
        raise fields.wrong(
            gguf.TOKENS, f"without {header.tokens.unspelled_bytes} of the 256 byte tokens",
            "with `<0x00>` to `<0xFF>`", code="bad_tokenizer",
        )  # fmt: skip
    if header.n_bad_merges:
        raise fields.wrong(
            gguf.MERGES, f"with {header.n_bad_merges} entries that are not pairs", "two words each",
            code="bad_tokenizer",
        )  # fmt: skip
    _check_tables(fields, header.tokens.count)
    _check_special_tokens(fields, str(model), header.tokens.count)


def _check_tables(fields: _Fields, n_vocab: int) -> None:
    """Scores and token types: one for each token, of the type that the engine casts to."""
    for name, types, letters in (
        ("scores", (gguf.F32, gguf.I32), "fi"),
        ("token_type", (gguf.I32,), "i"),
    ):
        key = f"tokenizer.ggml.{name}"
        entry = fields.entry(key)
        if entry is None:
            continue
        if not entry.is_array or entry.type not in types:
            allowed = " or ".join(f"array of {gguf.TYPE_NAMES[one]}" for one in types)
            raise fields.wrong(key, _article(entry.type_name), allowed, code="bad_tokenizer")
        if entry.count < n_vocab:
            raise fields.wrong(
                key, f"{entry.count} numbers", f"one for each of {n_vocab} tokens",
                code="bad_tokenizer",
            )  # fmt: skip
        numbers = array(letters[types.index(entry.type)], fields.header.tables.get(key, b""))
        if entry.type == gguf.F32:
            if not all(map(isfinite, numbers)):
                raise fields.wrong(key, "not finite", "finite numbers", code="bad_tokenizer")
        elif (
            name == "token_type"
            and not 0 <= min(numbers, default=0) <= max(numbers, default=0) <= 6
        ):
            worst = min(numbers) if min(numbers) < 0 else max(numbers)
            raise fields.wrong(key, worst, "0–6", code="bad_tokenizer")
    charsmap = fields.entry("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None and charsmap.count < 4:
        raise fields.wrong(
            "tokenizer.ggml.precompiled_charsmap", f"{charsmap.count} bytes", "at least 4 bytes",
            code="bad_tokenizer",
        )  # fmt: skip


def _check_special_tokens(fields: _Fields, model: str, n_vocab: int) -> None:
    """Ids beyond the vocabulary are damage, except those that converters write for "none".

    A padding or mask id past the end is common in files in use, and the engine drops it.
    """
    valid: dict[str, bool] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        key = f"tokenizer.ggml.{name}_token_id"
        number = fields.integer(key, 0, _NO_TOKEN)
        if number is not None and number != _NO_TOKEN and number >= n_vocab:
            raise fields.wrong(key, number, f"0–{n_vocab - 1}", code="bad_tokenizer")
        default = _DEFAULT_IDS.get(model, {}).get(name, n_vocab)
        if name == "bos" and fields.metadata.get("tokenizer.ggml.pre") in _NO_DEFAULT_BOS:
            default = n_vocab
        valid[name] = (n_vocab if number is None or number == _NO_TOKEN else number) < n_vocab or (
            default < n_vocab
        )
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{name}_token"
        if fields.metadata.get(key) is True and not valid[name]:  # an assertion of tokenize()
            raise fields.wrong(key, "true", f"false, as there is no {name} token")


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


def _check_tensors(fields: _Fields, tensors: tuple[TensorSpec, ...]) -> None:
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


def _wrong_tensor(
    fields: _Fields, tensor: TensorSpec, found: object, allowed: str, code: str = "shape_mismatch"
) -> DamagedFileError:
    offset = fields.header.tensor_offsets.get(tensor.name) if tensor.shard == 0 else None
    return damaged(
        code, fields.header.label, f"tensor {quoted(tensor.name)}", found, allowed, offset=offset
    )


def _check_tensor_type(fields: _Fields, tensor: TensorSpec) -> None:
    if tensor.name.endswith(_ALWAYS_F32) and tensor.type is not quants.F32:
        raise _wrong_tensor(fields, tensor, tensor.type.name, "f32", "unsupported_quant")
    is_table = tensor.type.name in _INTEGERS and any(one in tensor.name for one in _INDEX_TABLES)
    if tensor.type.name in _NOT_WEIGHTS and not is_table:
        raise _wrong_tensor(
            fields, tensor, tensor.type.name, "a floating-point or quantized type",
            "unsupported_quant",
        )  # fmt: skip


def _check_embedding(fields: _Fields, tensors: tuple[TensorSpec, ...]) -> None:
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


def _check_projections(fields: _Fields, tensors: tuple[TensorSpec, ...]) -> None:
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
        if tensor.layer is None or len(tensor.shape) != 2:
            continue
        role = tensor.name.partition(f"blk.{tensor.layer}.")[2]
        if role not in ("attn_q.weight", "attn_k.weight"):
            continue
        count = (heads if role == "attn_q.weight" else kv_heads)[tensor.layer]
        wanted = count * width
        # A query may have a gate as wide as itself beside it (qwen3next).
        if wanted and (tensor.shape[0] != n_embd or tensor.shape[1] % wanted):
            raise _wrong_tensor(
                fields, tensor, f"of shape {list(tensor.shape)}",
                f"[{n_embd}, {wanted}]: the embedding length, {count} heads of {width}",
            )  # fmt: skip
