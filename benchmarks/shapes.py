"""Model descriptions at real shapes, and small ones of the same architectures that really run.

`ARCHITECTURES["llama-70b"]("q4_K_M")` gives the metadata and the tensor list of a file that the
engine accepts; `benchmarks.gguf_writer` writes it (header alone or with random weights). `TINY` has
the same architectures with a few narrow layers and a real tokenizer. `build` changes any number:

    build("llama-8b", "q8_0", n_layer=8, n_embd=1024)

Names are of the published checkpoint the numbers are from (its config.json). A quantization is a
tensor type (`q8_0`: every matrix, with llama-quantize's fallback where a row does not divide) or
one of the mixes `q4_K_M` and `q5_K_M`, roughly as llama-quantize spreads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from benchmarks import families, recurrent_families
from benchmarks.draft import Dims, Draft
from benchmarks.gguf_writer import TensorLine, bpe_tokenizer, spm_tokenizer


class ModelShape(NamedTuple):
    """What `gguf_writer` needs: `write_sparse(path, *shape)`."""

    metadata: dict[str, Any]
    tensors: list[TensorLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    family: Callable[[Dims, Draft], None]
    dims: Dims
    tiny: Mapping[str, Any]


def _entry(
    family: Callable[[Dims, Draft], None], tiny: Mapping[str, Any] | None = None, **dims: Any
) -> _Entry:
    return _Entry(family=family, dims=Dims(**dims), tiny={**_TINY, **(tiny or {})})


_TINY: Mapping[str, Any] = {
    "n_layer": 4, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "head_dim": 64, "n_ff": 512,
    "n_vocab": 512, "n_ctx_train": 4096, "tokenizer": "bpe",
}  # fmt: skip
_TINY_MOE: Mapping[str, Any] = {"n_expert": 8, "n_expert_used": 2, "n_ff_exp": 256}

_TABLE: Mapping[str, _Entry] = {
    "llama-3b": _entry(
        families.llama, {"n_head_kv": 1, "tied": True}, architecture="llama", n_layer=28,
        n_embd=3072, n_head=24, n_head_kv=8, n_ff=8192, n_vocab=128256, n_ctx_train=131072,
        rope_freqs=True, tied=True),
    "llama-8b": _entry(
        families.llama, architecture="llama", n_layer=32, n_embd=4096, n_head=32, n_head_kv=8,
        n_ff=14336, n_vocab=128256, n_ctx_train=131072, rope_freqs=True),
    "llama-70b": _entry(
        families.llama, {"n_layer": 8}, architecture="llama", n_layer=80, n_embd=8192, n_head=64,
        n_head_kv=8, n_ff=28672, n_vocab=128256, n_ctx_train=131072, rope_freqs=True),
    "llama-405b": _entry(
        families.llama, {"n_layer": 12}, architecture="llama", n_layer=126, n_embd=16384,
        n_head=128, n_head_kv=8, n_ff=53248, n_vocab=128256, n_ctx_train=131072, rope_freqs=True),
    "mistral-7b": _entry(
        families.llama, {"tokenizer": "spm"}, architecture="llama", n_layer=32, n_embd=4096,
        n_head=32, n_head_kv=8, n_ff=14336, n_vocab=32768, n_ctx_train=32768),
    "mistral3-24b": _entry(
        families.llama, architecture="mistral3", n_layer=40, n_embd=5120, n_head=32, n_head_kv=8,
        head_dim=128, n_ff=32768, n_vocab=131072, n_ctx_train=131072),
    "mixtral-8x7b": _entry(
        families.llama, {**_TINY_MOE, "n_ff_exp": 0, "tokenizer": "spm"}, architecture="llama",
        n_layer=32, n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, n_vocab=32000,
        n_ctx_train=32768, n_expert=8, n_expert_used=2),
    "qwen2-7b": _entry(
        families.qwen2, architecture="qwen2", n_layer=28, n_embd=3584, n_head=28, n_head_kv=4,
        n_ff=18944, n_vocab=152064, n_ctx_train=32768),
    "qwen3-8b": _entry(
        families.qwen3, architecture="qwen3", n_layer=36, n_embd=4096, n_head=32, n_head_kv=8,
        head_dim=128, n_ff=12288, n_vocab=151936, n_ctx_train=40960),
    "qwen3moe-30b-a3b": _entry(
        families.qwen3, _TINY_MOE, architecture="qwen3moe", n_layer=48, n_embd=2048, n_head=32,
        n_head_kv=4, head_dim=128, n_ff=6144, n_vocab=151936, n_ctx_train=40960, n_expert=128,
        n_expert_used=8, n_ff_exp=768),
    "gemma2-9b": _entry(
        families.gemma2, {"window": 256, "tokenizer": "spm"}, architecture="gemma2", n_layer=42,
        n_embd=3584, n_head=16, n_head_kv=8, head_dim=256, n_ff=14336, n_vocab=256000,
        n_ctx_train=8192, window=4096, tied=True),
    "gemma3-12b": _entry(
        families.gemma3, {"n_layer": 8, "window": 256, "tokenizer": "spm"}, architecture="gemma3",
        n_layer=48, n_embd=3840, n_head=16, n_head_kv=8, head_dim=256, n_ff=15360, n_vocab=262208,
        n_ctx_train=131072, window=1024, tied=True),
    "phi3-mini": _entry(
        families.phi3, {"n_head_kv": 4, "tokenizer": "spm"}, architecture="phi3", n_layer=32,
        n_embd=3072, n_head=32, n_head_kv=32, head_dim=96, n_ff=8192, n_vocab=32064,
        n_ctx_train=131072, window=262144),
    "gpt-oss-20b": _entry(
        families.gpt_oss, {**_TINY_MOE, "window": 128}, architecture="gpt-oss", n_layer=24,
        n_embd=2880, n_head=64, n_head_kv=8, head_dim=64, n_ff=2880, n_vocab=201088,
        n_ctx_train=131072, n_expert=32, n_expert_used=4, n_ff_exp=2880, window=128),
    "deepseek2-lite": _entry(
        families.deepseek2, {**_TINY_MOE, "q_lora": 256, "kv_lora": 256, "head_dim": 64},
        architecture="deepseek2", n_layer=27, n_embd=2048, n_head=16, n_head_kv=1, head_dim=128,
        n_ff=10944, n_vocab=102400, n_ctx_train=163840, n_expert=64, n_expert_used=6, n_ff_exp=1408,
        n_dense_lead=1, n_expert_shared=2, kv_lora=512, n_rot=64),
    "qwen3next-80b-a3b": _entry(
        recurrent_families.qwen3next, {**_TINY_MOE, "n_head_kv": 2, "d_state": 64, "n_group": 2,
        "dt_rank": 4}, architecture="qwen3next", n_layer=48, n_embd=2048, n_head=16, n_head_kv=2,
        head_dim=256, n_ff=5120, n_vocab=151936, n_ctx_train=262144, n_expert=512,
        n_expert_used=10, n_ff_exp=512, d_conv=4, d_state=128, n_group=16, dt_rank=32, n_rot=64),
    "granitehybrid-3b": _entry(
        recurrent_families.granitehybrid, {"d_state": 32, "dt_rank": 8, "attention": (1, 3)},
        architecture="granitehybrid", n_layer=40, n_embd=2048, n_head=32, n_head_kv=8, n_ff=8192,
        n_vocab=100352, n_ctx_train=131072, d_conv=4, d_state=128, n_group=1, dt_rank=64,
        attention=(5, 15, 25, 35), tied=True),
    "lfm2-1.2b": _entry(
        recurrent_families.lfm2, {"attention": (1, 3)}, architecture="lfm2", n_layer=16,
        n_embd=2048, n_head=32, n_head_kv=8, n_ff=8192, n_vocab=65536, n_ctx_train=128000, d_conv=3,
        attention=(2, 5, 8, 10, 12, 14), tied=True),
    "mamba-2.8b": _entry(
        recurrent_families.mamba, {"d_state": 16, "dt_rank": 32}, architecture="mamba", n_layer=64,
        n_embd=2560, n_head=0, n_head_kv=0, n_ff=0, n_vocab=50280, n_ctx_train=1 << 20, d_conv=4,
        d_state=16, dt_rank=160, tied=True),
    "qwen2moe-a2.7b": _entry(
        families.qwen2moe, {**_TINY_MOE, "n_ff_shexp": 512}, architecture="qwen2moe", n_layer=24,
        n_embd=2048, n_head=16, n_head_kv=16, n_ff=5632, n_vocab=151936, n_ctx_train=8192,
        n_expert=60, n_expert_used=4, n_ff_exp=1408, n_ff_shexp=5632),
    "command-r-35b": _entry(
        families.command_r, architecture="command-r", n_layer=40, n_embd=8192, n_head=64,
        n_head_kv=64, n_ff=22528, n_vocab=256000, n_ctx_train=131072, tied=True),
    "starcoder2-7b": _entry(
        families.starcoder2, architecture="starcoder2", n_layer=32, n_embd=4608, n_head=36,
        n_head_kv=4, n_ff=18432, n_vocab=49152, n_ctx_train=16384),
    "glm4moe-air": _entry(
        families.glm4moe, {**_TINY_MOE, "n_layer": 5}, architecture="glm4moe", n_layer=47,
        n_embd=4096, n_head=96, n_head_kv=8, head_dim=128, n_ff=10944, n_vocab=151552,
        n_ctx_train=131072, n_expert=128, n_expert_used=8, n_ff_exp=1408, n_dense_lead=1,
        n_expert_shared=1, n_nextn=1, n_rot=64),
    "gemma4-31b": _entry(
        families.gemma4, {"n_layer": 12, "window": 256, "tokenizer": "spm", "shared_kv": 6},
        architecture="gemma4", n_layer=60, n_embd=5376, n_head=32, n_head_kv=16, head_dim=512,
        n_ff=21504, n_vocab=262144, n_ctx_train=262144, window=1024, shared_kv=0, tied=True),
}  # fmt: skip


def build(name: str, quant: str, **changes: Any) -> ModelShape:
    """The shape of a published checkpoint, with some of its numbers changed."""
    return _draw(_TABLE[name].family, replace(_TABLE[name].dims, **changes), quant)


def build_tiny(name: str, quant: str, **changes: Any) -> ModelShape:
    """A few narrow layers of the same architecture, with a tokenizer; it loads and decodes."""
    entry = _TABLE[name]
    return _draw(entry.family, replace(entry.dims, **{**entry.tiny, **changes}), quant)


def _draw(family: Callable[[Dims, Draft], None], dims: Dims, quant: str) -> ModelShape:
    draft = Draft(dims, quant)
    family(dims, draft)
    return ModelShape({**draft.metadata, **_tokenizer(dims)}, draft.tensors)


def _tokenizer(dims: Dims) -> dict[str, Any]:
    """Sizing needs no words: a real shape gets `no_vocab`, with the true number of tokens."""
    if dims.tokenizer == "spm":
        return spm_tokenizer(dims.n_vocab)
    if dims.tokenizer == "bpe":
        return bpe_tokenizer(dims.n_vocab)
    return {"tokenizer.ggml.model": "no_vocab"}


ARCHITECTURES: Mapping[str, Callable[[str], ModelShape]] = {
    name: partial(build, name) for name in _TABLE
}
TINY: Mapping[str, Callable[[str], ModelShape]] = {
    name: partial(build_tiny, name) for name in _TABLE
}
