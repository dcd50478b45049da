"""The tensors and keys of each model family, as llama.cpp's load_arch_tensors asks for them.

Source: models/*.cpp of llama.cpp 0c1e57098, and for the keys its load_arch_hparams.
"""

from collections.abc import Callable, Mapping

from loadmaster.model.shapes.outline import (
    Draft,
    attention_keys,
    ends,
    experts,
    ffn,
    qk_norms,
    qkv,
    shared_experts,
)
from loadmaster.model.shapes.types import Dims, Outline, Shape


def outline_of(shape: Shape) -> Outline:
    """The metadata and the tensors of a shape, before it is quantized."""
    draft = Draft(shape)
    attention_keys(draft, shape.dims)
    FAMILIES[shape.family](draft, shape.dims)
    return draft.done()


def _llama(draft: Draft, dims: Dims) -> None:
    """Llama, Mistral, Mixtral."""
    ends(draft, dims)
    for b in _blocks(dims):
        _plain_layer(draft, dims, b)


def _qwen2(draft: Draft, dims: Dims) -> None:
    ends(draft, dims)
    for b in _blocks(dims):
        _plain_layer(draft, dims, b, bias=True)


def _qwen3(draft: Draft, dims: Dims) -> None:
    """Qwen3, dense and with experts."""
    if dims.n_expert:
        draft.keys(expert_feed_forward_length=dims.n_ff_exp)
    ends(draft, dims)
    for b in _blocks(dims):
        _plain_layer(draft, dims, b)
        qk_norms(draft, dims, b)


def _blocks(dims: Dims) -> list[str]:
    return [f"blk.{index}." for index in range(dims.n_layer)]


def _plain_layer(draft: Draft, dims: Dims, b: str, *, bias: bool = False) -> None:
    draft.vector(b + "attn_norm.weight", dims.n_embd)
    qkv(draft, dims, b, bias=bias)
    draft.vector(b + "ffn_norm.weight", dims.n_embd)
    (experts if dims.n_expert else ffn)(draft, dims, b)


def _gemma2(draft: Draft, dims: Dims) -> None:
    draft.keys(**{"attention.sliding_window": dims.window, "attn_logit_softcapping": 50.0,
                  "final_logit_softcapping": 30.0})  # fmt: skip
    ends(draft, dims)
    for b in _blocks(dims):
        _gemma_layer(draft, dims, b)


def _gemma3(draft: Draft, dims: Dims) -> None:
    draft.keys(**{"attention.sliding_window": dims.window})
    ends(draft, dims)
    for b in _blocks(dims):
        _gemma_layer(draft, dims, b)
        qk_norms(draft, dims, b)


def _gemma_layer(draft: Draft, dims: Dims, b: str) -> None:
    for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        draft.vector(f"{b}{norm}.weight", dims.n_embd)
    qkv(draft, dims, b)
    ffn(draft, dims, b)


def _gpt_oss(draft: Draft, dims: Dims) -> None:
    """Experts are MXFP4 in every published file."""
    draft.keys(**{"attention.sliding_window": dims.window,
                  "expert_feed_forward_length": dims.n_ff_exp})  # fmt: skip
    ends(draft, dims)
    for b in _blocks(dims):
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.vector(b + "post_attention_norm.weight", dims.n_embd)
        draft.vector(b + "attn_sinks.weight", dims.n_head)
        qkv(draft, dims, b, bias=True)
        draft.vector(b + "attn_output.bias", dims.n_embd)
        experts(draft, dims, b, fixed="mxfp4")
        draft.vector(b + "ffn_gate_inp.bias", dims.n_expert)
        for part, width in (("gate", dims.n_ff_exp), ("up", dims.n_ff_exp), ("down", dims.n_embd)):
            draft.vector(f"{b}ffn_{part}_exps.bias", width, dims.n_expert)


def _glm4moe(draft: Draft, dims: Dims) -> None:
    """GLM-4.5: dense first layers, and an MTP layer at the end that is not loaded."""
    draft.keys(expert_feed_forward_length=dims.n_ff_exp, expert_shared_count=dims.n_expert_shared,
               leading_dense_block_count=dims.n_dense_lead,
               nextn_predict_layers=dims.n_nextn)  # fmt: skip
    ends(draft, dims)
    for index, b in enumerate(_blocks(dims)):
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.vector(b + "post_attention_norm.weight", dims.n_embd)
        qkv(draft, dims, b, bias=True)
        _lead_or_experts(draft, dims, b, index)
        if index >= dims.n_dense_lead:
            draft.vector(b + "exp_probs_b.bias", dims.n_expert)
        if index >= dims.n_layer - dims.n_nextn:
            draft.matrix(b + "nextn.eh_proj.weight", 2 * dims.n_embd, dims.n_embd)
            for norm in ("enorm", "hnorm", "shared_head_norm"):
                draft.vector(f"{b}nextn.{norm}.weight", dims.n_embd)


def _lead_or_experts(draft: Draft, dims: Dims, b: str, index: int) -> None:
    if index < dims.n_dense_lead:
        ffn(draft, dims, b)
        return
    experts(draft, dims, b)
    shared_experts(draft, dims, b)


def _deepseek2(draft: Draft, dims: Dims) -> None:
    """MLA as the converter writes it today: one compressed K head, split k_b and v_b."""
    nope, width = dims.head, dims.kv_lora + dims.n_rot
    draft.keys(expert_feed_forward_length=dims.n_ff_exp, expert_shared_count=dims.n_expert_shared,
               leading_dense_block_count=dims.n_dense_lead, expert_weights_scale=1.0)  # fmt: skip
    draft.keys(**{
        "attention.head_count_kv": 1, "attention.key_length": width,
        "attention.value_length": dims.kv_lora, "attention.key_length_mla": nope + dims.n_rot,
        "attention.value_length_mla": dims.head, "attention.kv_lora_rank": dims.kv_lora,
        "rope.dimension_count": dims.n_rot,
    })  # fmt: skip
    ends(draft, dims)
    for index, b in enumerate(_blocks(dims)):
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        _mla(draft, dims, b)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        _lead_or_experts(draft, dims, b, index)


def _mla(draft: Draft, dims: Dims, b: str) -> None:
    draft.matrix(b + "attn_q.weight", dims.n_embd, dims.n_head * (dims.head + dims.n_rot))
    draft.matrix(b + "attn_kv_a_mqa.weight", dims.n_embd, dims.kv_lora + dims.n_rot)
    draft.vector(b + "attn_kv_a_norm.weight", dims.kv_lora)
    draft.matrix(b + "attn_k_b.weight", dims.head, dims.kv_lora, dims.n_head)
    draft.matrix(b + "attn_v_b.weight", dims.kv_lora, dims.head, dims.n_head)
    draft.matrix(b + "attn_output.weight", dims.n_head * dims.head, dims.n_embd)


FAMILIES: Mapping[str, Callable[[Draft, Dims], None]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma2": _gemma2, "gemma3": _gemma3,
    "gpt_oss": _gpt_oss, "glm4moe": _glm4moe, "deepseek2": _deepseek2,
}  # fmt: skip
