"""A tiny safetensors Llama of zeros, to time what a layer costs however little there is to do.

The file's data is a hole; its tokenizer has one token for each byte.
"""

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

N_EMBD = 64
N_HEAD, N_HEAD_KV = 4, 2
N_VOCAB = 256
N_CTX = 256
_DTYPE, _DTYPE_BYTES = "BF16", 2


def write(folder: Path, n_layer: int) -> Path:
    """Write the checkpoint into a folder that is there; gives the folder."""
    header, at = dict[str, object](), 0
    for name, shape in _shapes(n_layer):
        end = at + prod(shape) * _DTYPE_BYTES
        header[name] = {"dtype": _DTYPE, "shape": shape, "data_offsets": (at, end)}
        at = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text(json.dumps(_config(n_layer)))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _config(n_layer: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": N_VOCAB,
        "hidden_size": N_EMBD,
        "intermediate_size": N_EMBD,
        "num_hidden_layers": n_layer,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "max_position_embeddings": N_CTX,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def _shapes(n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    square, narrow = (N_EMBD, N_EMBD), (N_EMBD // N_HEAD * N_HEAD_KV, N_EMBD)
    yield "model.embed_tokens.weight", (N_VOCAB, N_EMBD)
    for index in range(n_layer):
        layer = f"model.layers.{index}."
        for name in ("q", "o"):
            yield f"{layer}self_attn.{name}_proj.weight", square
        for name in ("k", "v"):
            yield f"{layer}self_attn.{name}_proj.weight", narrow
        for name in ("gate", "up", "down"):
            yield f"{layer}mlp.{name}_proj.weight", square
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", (N_EMBD,)
    yield "model.norm.weight", (N_EMBD,)
    yield "lm_head.weight", (N_VOCAB, N_EMBD)


def _tokenizer() -> dict[str, object]:
    """Characters of Latin-1 stand for bytes; nobody reads what they say."""
    vocabulary = {chr(0x100 + byte): byte for byte in range(N_VOCAB)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
