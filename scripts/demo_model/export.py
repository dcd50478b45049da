"""Writes a checkpoint as GGUF files for llama.cpp and as a Hugging Face folder.

All files hold the same weights, rounded to float16 first.
"""

import json
import platform
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from scripts.demo_model.model import Shape
from scripts.demo_model.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    SPECIAL_TOKENS,
    load_tokenizer,
)
from scripts.demo_model.train import load

Weights = dict[str, npt.NDArray[np.float16]]

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DESCRIPTION = (
    "A small model trained on the Python standard library, to try loadmaster without a download. "
    "Its answers are often wrong."
)


def export(checkpoint: Path, root: Path) -> None:
    """Writes the shipped Q8_0 file and the files of the tests below `root`."""
    model, _ = load(checkpoint / "checkpoint.pt")
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    weights = {
        f"model.{name}": tensor.half().numpy() for name, tensor in model.state_dict().items()
    }
    shipped = root / "src" / "loadmaster" / "data" / "demo.gguf"
    tests = root / "tests" / "data" / "demo"
    for folder in (shipped.parent, tests):
        folder.mkdir(parents=True, exist_ok=True)
    q8_0, f16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
    write_gguf(shipped, weights, model.shape, tokenizer, q8_0)
    write_gguf(tests / "demo-f16.gguf", weights, model.shape, tokenizer, f16)
    write_hf(tests, weights, model.shape, tokenizer)


def write_gguf(
    path: Path,
    weights: Weights,
    shape: Shape,
    tokenizer: Tokenizer,
    matrix_type: gguf.GGMLQuantizationType,
) -> None:
    """Matrices in `matrix_type`, norms in F32."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, shape)
    is_f16 = matrix_type == gguf.GGMLQuantizationType.F16
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_F16 if is_f16 else gguf.LlamaFileType.MOSTLY_Q8_0
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer)
    for hf_name, weight in weights.items():
        name = gguf_name(hf_name)
        if weight.ndim == 1:
            writer.add_tensor(name, weight.astype(np.float32))
            continue
        if "attn_q" in name or "attn_k" in name:
            weight = interleave_rope(weight, shape.head_dim)
        data = gguf.quants.quantize(weight.astype(np.float32), matrix_type)
        writer.add_tensor(name, data, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight` in a GGUF file."""
    match hf_name.removeprefix("model.").removesuffix(".weight").split(".", maxsplit=2):
        case ["layers", index, part]:
            return f"blk.{index}.{GGUF_NAMES[part]}.weight"
        case ["embed_tokens"]:
            return "token_embd.weight"
        case ["norm"]:
            return "output_norm.weight"
    raise ValueError(hf_name)


def interleave_rope(weight: npt.NDArray[np.float16], head_dim: int) -> npt.NDArray[np.float16]:
    """Rows of `q` and `k` in the order of llama.cpp, which rotates neighbours, not halves.

    The same as `permute` in llama.cpp's `conversion/llama.py`.
    """
    n_row, n_col = weight.shape
    halves = weight.reshape(n_row // head_dim, 2, head_dim // 2, n_col)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(n_row, n_col)


def write_hf(folder: Path, weights: Weights, shape: Shape, tokenizer: Tokenizer) -> None:
    """A folder that `transformers` opens as `LlamaForCausalLM`."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", _hf_config(shape))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(index): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for index, token in enumerate(SPECIAL_TOKENS)
            },
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "model_max_length": shape.n_ctx_train,
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [tokenizer.token_to_id(t) for t in (IM_END, END_OF_TEXT)],
            "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        },
    )


def _hf_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "float16",
        "eos_token_id": SPECIAL_TOKENS.index(IM_END),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.n_embd,
        "initializer_range": 0.02,
        "intermediate_size": shape.n_ff,
        "max_position_embeddings": shape.n_ctx_train,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.n_head,
        "num_hidden_layers": shape.n_layer,
        "num_key_value_heads": shape.n_head_kv,
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_theta": shape.rope_theta,  # where transformers before 5 reads it
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": shape.n_vocab,
    }


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("loadmaster demo")
    writer.add_description(DESCRIPTION)
    writer.add_license("PSF-2.0")
    writer.add_size_label("5.8M")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation"])
    writer.add_string(
        "general.dataset.source", f"the standard library of CPython {platform.python_version()}"
    )
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.n_vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIAL_TOKENS else normal for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    # Without an id of its own, llama.cpp takes token 11 of this kind of vocabulary.
    writer.add_bos_token_id(ids[END_OF_TEXT])
    writer.add_eos_token_id(ids[IM_END])
    writer.add_eot_token_id(ids[IM_END])
    writer.add_pad_token_id(ids[END_OF_TEXT])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
