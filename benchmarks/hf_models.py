"""Random safetensors models of several families, to measure what the engine takes of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# About 90 million weights each: large beside what the libraries themselves take.
_BASE: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 512},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 64, "sliding_window": 256, "query_pre_attn_scalar": 64},
    "phi3": {},
    "qwen2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3},
    "qwen3_moe": {
        "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        "num_hidden_layers": 4,
    },
}  # fmt: skip


def write_model(folder: Path, family: str, seed: int = 1, **changes: Any) -> Path:
    """A random BF16 model of a family, with a tokenizer of bytes; `changes` are to its config."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**_BASE, **FAMILIES[family], **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
