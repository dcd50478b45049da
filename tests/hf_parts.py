"""Tiny safetensors models with random weights and a tokenizer of their own, and settings to open
them with. The Llama is written by hand: making it takes no torch."""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loadmaster.engine.types import LoadRequest
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.stamp import current_stamp
from loadmaster.plan.types import TransformersSettings
from tests import checkpoint_parts

SETTINGS = replace(
    checkpoint_parts.SETTINGS,
    compute_type="f32",
    type_k="f32",
    type_v="f32",
    n_ctx=512,
    n_seq_max=2,
)
SPECIAL = ("<|bos|>", "<|im_end|>", "<|im_start|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
N_VOCAB, N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV = 259, 64, 128, 3, 4, 2
N_PRINTABLE = ord("~") - ord("!") + 1
_BASE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": N_HEAD,
    "num_key_value_heads": N_HEAD_KV,
    "max_position_embeddings": 4096,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_WINDOWS = {
    "sliding_window": 24, "head_dim": 16, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24, "head_dim": 16},
    "gemma2": _WINDOWS,
    "gemma3_text": _WINDOWS,
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0},
}  # fmt: skip


def settings(**changes: Any) -> TransformersSettings:
    """Small settings of a CPU engine, with some of them changed."""
    return replace(SETTINGS, **changes)


def files_of(folder: Path) -> list[Path]:
    """The files that a plan names."""
    return [stamp.path for stamp in read_checkpoint(folder).files]


def load_request(folder: Path, **changes: Any) -> LoadRequest:
    """A load of a checkpoint as it is now."""
    return LoadRequest(
        model_path=folder,
        model_stamp=current_stamp(files_of(folder)),
        settings=settings(**changes),
        ram_cap_bytes=None,
    )


def write_llama(folder: Path, **changes: Any) -> Path:
    """A random Llama in F32 with a byte-level tokenizer; the seed is fixed."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    tensors = {
        name: (random.standard_normal(shape) * shape[-1] ** -0.5 * 2).astype("<f4")
        if len(shape) > 1 else np.ones(shape, "<f4")
        for name, shape in _llama_shapes()
    }  # fmt: skip
    # Greedy answers are printable: those tokens are the first in the alphabet.
    tensors["lm_head.weight"][N_PRINTABLE:] = 0
    header, at = dict[str, Any](), 0
    for name, values in tensors.items():
        end = at + values.nbytes
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    parts = [struct.pack("<Q", len(raw)), raw, *(values.tobytes() for values in tensors.values())]
    (folder / "model.safetensors").write_bytes(b"".join(parts))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_BASE}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "dtype": "float32"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_base(folder: Path) -> Path:
    """The Llama as `AutoModel` saves it: without its output, and without a prefix."""
    from safetensors.numpy import load_file, save_file

    file = write_llama(folder) / "model.safetensors"
    tensors = {name.removeprefix("model."): values for name, values in load_file(file).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    return folder


def _llama_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    width_kv = N_EMBD // N_HEAD * N_HEAD_KV
    yield "model.embed_tokens.weight", (N_VOCAB, N_EMBD)
    for index in range(N_LAYER):
        layer = f"model.layers.{index}."
        yield layer + "self_attn.q_proj.weight", (N_EMBD, N_EMBD)
        yield layer + "self_attn.k_proj.weight", (width_kv, N_EMBD)
        yield layer + "self_attn.v_proj.weight", (width_kv, N_EMBD)
        yield layer + "self_attn.o_proj.weight", (N_EMBD, N_EMBD)
        yield layer + "mlp.gate_proj.weight", (N_FF, N_EMBD)
        yield layer + "mlp.up_proj.weight", (N_FF, N_EMBD)
        yield layer + "mlp.down_proj.weight", (N_EMBD, N_FF)
        yield layer + "input_layernorm.weight", (N_EMBD,)
        yield layer + "post_attention_layernorm.weight", (N_EMBD,)
    yield "model.norm.weight", (N_EMBD,)
    yield "lm_head.weight", (N_VOCAB, N_EMBD)


def write_model(folder: Path, family: str) -> Path:
    """A random model of a family as transformers saves it, with a byte-level tokenizer."""
    if family == "llama":
        return write_llama(folder)
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**(_BASE | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as given, logits hardly differ from one another
                parameter.mul_(6)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Bytes are tokens, three more are special; the files that a Hub repository has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
