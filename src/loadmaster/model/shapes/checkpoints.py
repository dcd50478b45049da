"""A shape as a safetensors checkpoint: the tensors that transformers would save for it."""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

from loadmaster.errors import NotFoundError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_config import parse_config
from loadmaster.model.hf_source import Origin, spec_of
from loadmaster.model.safetensors import ShardHeader, StoredTensor
from loadmaster.model.shapes.types import Dims, Shape

# What `@` of a shape and `--quantize` take alike.
QUANTIZATIONS = ("NONE", "INT8", "FP8", "NF4", "FP4")
_BF16_BYTES = 2
Row = tuple[str, tuple[int, ...]]


def shape_checkpoint(shape: Shape) -> CheckpointSpec:
    """The published checkpoint of a shape, in BF16.

    Raises:
        NotFoundError: transformers' engine does not plan this family.
    """
    model_type = _model_type(shape)
    config = _config(shape.dims, model_type)
    dims = parse_config(json.dumps(config).encode(), shape.name)
    header = _header(shape.name, list(_rows(shape.dims, model_type)))
    return spec_of(dims, [header], Origin(folder=Path(shape.name), name=shape.name))


def _model_type(shape: Shape) -> str:
    key = (shape.family, bool(shape.dims.n_expert))
    if key not in _MODEL_TYPES:
        raise NotFoundError(
            f"`{shape.name}` is planned as a GGUF alone: its family is not one of those that the "
            "transformers engine is planned for",
            hint=f"`loadmaster plan shape:{shape.name}`",
        )
    return _MODEL_TYPES[key]


_MODEL_TYPES: Mapping[tuple[str, bool], str] = {
    ("llama", False): "llama", ("llama", True): "mixtral", ("qwen2", False): "qwen2",
    ("qwen3", False): "qwen3", ("qwen3", True): "qwen3_moe", ("gemma2", False): "gemma2",
    ("gemma3", False): "gemma3_text",
}  # fmt: skip


def _config(dims: Dims, model_type: str) -> dict[str, object]:
    return {
        "model_type": model_type,
        "num_hidden_layers": dims.n_layer,
        "hidden_size": dims.n_embd,
        "num_attention_heads": dims.n_head,
        "num_key_value_heads": dims.n_head_kv,
        "head_dim": dims.head,
        "intermediate_size": dims.n_ff,
        "moe_intermediate_size": dims.n_ff_exp or dims.n_ff,
        "num_local_experts": dims.n_expert,
        "num_experts_per_tok": dims.n_expert_used,
        "vocab_size": dims.n_vocab,
        "max_position_embeddings": dims.n_ctx_train,
        "tie_word_embeddings": dims.tied,
        "sliding_window": dims.window or None,
    }


def _header(label: str, rows: list[Row]) -> ShardHeader:
    tensors, at = [], 0
    for name, shape in rows:
        end = at + prod(shape) * _BF16_BYTES
        tensors.append(StoredTensor(name=name, dtype="BF16", shape=shape, begin=at, end=end))
        at = end
    return ShardHeader(label=label, tensors=tuple(tensors), header_bytes=0)


def _rows(dims: Dims, model_type: str) -> Iterator[Row]:
    yield "model.embed_tokens.weight", (dims.n_vocab, dims.n_embd)
    for index in range(dims.n_layer):
        prefix = f"model.layers.{index}."
        for name, shape in _LAYERS[model_type](dims):
            yield prefix + name, shape
    yield "model.norm.weight", (dims.n_embd,)
    if not dims.tied:
        yield "lm_head.weight", (dims.n_vocab, dims.n_embd)


def _attention(dims: Dims) -> Iterator[Row]:
    yield "self_attn.q_proj.weight", (dims.q_width, dims.n_embd)
    yield "self_attn.k_proj.weight", (dims.kv_width, dims.n_embd)
    yield "self_attn.v_proj.weight", (dims.kv_width, dims.n_embd)
    yield "self_attn.o_proj.weight", (dims.n_embd, dims.q_width)
    yield "input_layernorm.weight", (dims.n_embd,)
    yield "post_attention_layernorm.weight", (dims.n_embd,)


def _feed_forward(dims: Dims) -> Iterator[Row]:
    yield "mlp.gate_proj.weight", (dims.n_ff, dims.n_embd)
    yield "mlp.up_proj.weight", (dims.n_ff, dims.n_embd)
    yield "mlp.down_proj.weight", (dims.n_embd, dims.n_ff)


def _experts(dims: Dims, prefix: str, names: tuple[str, str, str]) -> Iterator[Row]:
    n_ff = dims.n_ff_exp or dims.n_ff
    gate, up, down = names
    yield f"{prefix}.gate.weight", (dims.n_expert, dims.n_embd)
    for index in range(dims.n_expert):
        yield f"{prefix}.experts.{index}.{gate}.weight", (n_ff, dims.n_embd)
        yield f"{prefix}.experts.{index}.{up}.weight", (n_ff, dims.n_embd)
        yield f"{prefix}.experts.{index}.{down}.weight", (dims.n_embd, n_ff)


def _llama(dims: Dims) -> Iterator[Row]:
    yield from _attention(dims)
    yield from _feed_forward(dims)


def _qwen2(dims: Dims) -> Iterator[Row]:
    yield from _llama(dims)
    for name, width in (("q", dims.q_width), ("k", dims.kv_width), ("v", dims.kv_width)):
        yield f"self_attn.{name}_proj.bias", (width,)


def _head_norms(dims: Dims) -> Iterator[Row]:
    yield "self_attn.q_norm.weight", (dims.head,)
    yield "self_attn.k_norm.weight", (dims.head,)


def _qwen3(dims: Dims) -> Iterator[Row]:
    yield from _llama(dims)
    yield from _head_norms(dims)


def _qwen3_moe(dims: Dims) -> Iterator[Row]:
    yield from _attention(dims)
    yield from _head_norms(dims)
    yield from _experts(dims, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _mixtral(dims: Dims) -> Iterator[Row]:
    yield from _attention(dims)
    yield from _experts(dims, "block_sparse_moe", ("w1", "w3", "w2"))


def _gemma2(dims: Dims) -> Iterator[Row]:
    yield from _llama(dims)
    yield "pre_feedforward_layernorm.weight", (dims.n_embd,)
    yield "post_feedforward_layernorm.weight", (dims.n_embd,)


def _gemma3(dims: Dims) -> Iterator[Row]:
    yield from _gemma2(dims)
    yield from _head_norms(dims)


_LAYERS: Mapping[str, Callable[[Dims], Iterator[Row]]] = {
    "llama": _llama, "mixtral": _mixtral, "qwen2": _qwen2, "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe, "gemma2": _gemma2, "gemma3_text": _gemma3,
}  # fmt: skip
