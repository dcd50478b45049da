"""Tiny models that embed or rank: random weights, real architectures."""

from pathlib import Path
from typing import Any

from benchmarks.gguf_writer import TensorLine, bpe_tokenizer, write_random
from benchmarks.shapes import build_tiny

N_EMBD, N_FF, N_VOCAB, N_LAYER, N_CTX = 64, 128, 512, 2, 512


def write_bert(path: Path) -> Path:
    """An encoder, as bge-small is one."""
    metadata: dict[str, Any] = {
        "general.architecture": "bert",
        "bert.block_count": N_LAYER,
        "bert.context_length": N_CTX,
        "bert.embedding_length": N_EMBD,
        "bert.feed_forward_length": N_FF,
        "bert.attention.head_count": 4,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.token_type_count": 2,
        **bpe_tokenizer(N_VOCAB),
    }
    shapes = {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "token_types.weight": (N_EMBD, 2),
        "position_embd.weight": (N_EMBD, N_CTX),
        **_norm("token_embd_norm"),
        **{name: shape for layer in range(N_LAYER) for name, shape in _layer(layer).items()},
    }
    lines = [TensorLine(name, "f32", shape) for name, shape in shapes.items()]
    return write_random(path, metadata, lines)


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (N_EMBD,), f"{name}.bias": (N_EMBD,)}


def _layer(index: int) -> dict[str, tuple[int, ...]]:
    square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (N_EMBD, N_EMBD))
    matrices = square | {"ffn_up": (N_EMBD, N_FF), "ffn_down": (N_FF, N_EMBD)}
    return {
        f"blk.{index}.{name}": shape
        for name, shape in (
            *((f"{matrix}.weight", shape) for matrix, shape in matrices.items()),
            *((f"{matrix}.bias", shape[1:]) for matrix, shape in matrices.items()),
            *_norm("attn_output_norm").items(),
            *_norm("layer_output_norm").items(),
        )
    }


def write_reranker(path: Path) -> Path:
    """A generative model with a classifier, as Qwen3-Reranker is one."""
    metadata, tensors = build_tiny("qwen3-8b", "f16")
    metadata |= {
        "qwen3.pooling_type": 4,
        "qwen3.classifier.output_labels": ["yes", "no"],
        "tokenizer.chat_template.rerank": "{query} <|end|> {document} <|end|>",
    }
    n_embd = metadata["qwen3.embedding_length"]
    return write_random(
        path, metadata, [*tensors, TensorLine("cls.output.weight", "f32", (n_embd, 2))]
    )
