"""The tensors and keys of each model family, as llama.cpp's load_arch_tensors asks for them.

Source: models/*.cpp of llama.cpp 0c1e57098, and for the keys its load_arch_hparams.
"""

from benchmarks.draft import (
    Dims,
    Draft,
    attention_keys,
    ends,
    experts,
    ffn,
    qk_norms,
    qkv,
    shared_experts,
)


def llama(dims: Dims, draft: Draft) -> None:
    """Llama, Mistral, Mixtral."""
    attention_keys(dims, draft)
    ends(dims, draft)
    if dims.rope_freqs:
        draft.vector("rope_freqs.weight", dims.head // 2)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        qkv(dims, draft, b, i)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        (experts if dims.n_expert else ffn)(dims, draft, b, i)


def qwen2(dims: Dims, draft: Draft) -> None:
    attention_keys(dims, draft)
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        qkv(dims, draft, b, i, bias=True)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        ffn(dims, draft, b, i)


def qwen2moe(dims: Dims, draft: Draft) -> None:
    attention_keys(dims, draft)
    draft.keys(expert_feed_forward_length=dims.n_ff_exp,
               expert_shared_feed_forward_length=dims.n_ff_shexp)  # fmt: skip
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        qkv(dims, draft, b, i, bias=True)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        experts(dims, draft, b, i)
        draft.vector(b + "ffn_gate_inp_shexp.weight", dims.n_embd)
        shared_experts(dims, draft, b, dims.n_ff_shexp)


def qwen3(dims: Dims, draft: Draft) -> None:
    """Qwen3, dense and with experts."""
    attention_keys(dims, draft)
    if dims.n_expert:
        draft.keys(expert_feed_forward_length=dims.n_ff_exp)
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        qkv(dims, draft, b, i)
        qk_norms(dims, draft, b)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        (experts if dims.n_expert else ffn)(dims, draft, b, i)


def gemma2(dims: Dims, draft: Draft) -> None:
    attention_keys(dims, draft)
    draft.keys(**{"attention.sliding_window": dims.window, "attn_logit_softcapping": 50.0,
                  "final_logit_softcapping": 30.0})  # fmt: skip
    ends(dims, draft)
    for i in range(dims.n_layer):
        _gemma_layer(dims, draft, i)


def gemma3(dims: Dims, draft: Draft) -> None:
    attention_keys(dims, draft)
    draft.keys(**{"attention.sliding_window": dims.window})
    ends(dims, draft)
    for i in range(dims.n_layer):
        _gemma_layer(dims, draft, i)
        qk_norms(dims, draft, f"blk.{i}.")


def _gemma_layer(dims: Dims, draft: Draft, i: int) -> None:
    b = f"blk.{i}."
    for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        draft.vector(f"{b}{norm}.weight", dims.n_embd)
    qkv(dims, draft, b, i)
    ffn(dims, draft, b, i)


def gemma4(dims: Dims, draft: Draft) -> None:
    """Five window layers with half the head width, then a full one; the last share their KV."""
    attention_keys(dims, draft)
    swa_head = dims.head // 2
    pattern = [(i + 1) % 6 != 0 for i in range(dims.n_layer)]
    draft.keys(**{"attention.sliding_window": dims.window,
                  "attention.sliding_window_pattern": pattern,
                  "attention.shared_kv_layers": dims.shared_kv,
                  "attention.key_length_swa": swa_head, "attention.value_length_swa": swa_head,
                  "rope.dimension_count_swa": swa_head, "rope.freq_base_swa": 10000.0,
                  "embedding_length_per_layer_input": 0})  # fmt: skip
    ends(dims, draft)
    draft.vector("rope_freqs.weight", dims.head // 2)
    for i, windowed in enumerate(pattern):
        b, head = f"blk.{i}.", swa_head if windowed else dims.head
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            draft.vector(f"{b}{norm}.weight", dims.n_embd)
        draft.matrix(b + "attn_q.weight", dims.n_embd, head * dims.n_head)
        for part in ("attn_k", "attn_v"):
            draft.matrix(f"{b}{part}.weight", dims.n_embd, head * dims.n_head_kv)
        draft.matrix(b + "attn_output.weight", head * dims.n_head, dims.n_embd)
        draft.vector(b + "attn_q_norm.weight", head)
        draft.vector(b + "attn_k_norm.weight", head)
        ffn(dims, draft, b, i)


def phi3(dims: Dims, draft: Draft) -> None:
    """Fused QKV and gate; rope factors for long contexts."""
    attention_keys(dims, draft)
    draft.keys(**{"attention.sliding_window": dims.window,
                  "rope.scaling.original_context_length": 4096})  # fmt: skip
    ends(dims, draft)
    for factors in ("rope_factors_long", "rope_factors_short"):
        draft.vector(f"{factors}.weight", dims.head // 2)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.matrix(b + "attn_qkv.weight", dims.n_embd, dims.n_embd + 2 * dims.kv_width)
        draft.matrix(b + "attn_output.weight", dims.n_embd, dims.n_embd)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        draft.matrix(b + "ffn_up.weight", dims.n_embd, 2 * dims.n_ff)
        draft.matrix(b + "ffn_down.weight", dims.n_ff, dims.n_embd, better=draft.more_bits(i))


def gpt_oss(dims: Dims, draft: Draft) -> None:
    """Experts are MXFP4 in every published file."""
    attention_keys(dims, draft)
    draft.keys(**{"attention.sliding_window": dims.window,
                  "expert_feed_forward_length": dims.n_ff_exp})  # fmt: skip
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.vector(b + "post_attention_norm.weight", dims.n_embd)
        draft.vector(b + "attn_sinks.weight", dims.n_head)
        qkv(dims, draft, b, i, bias=True)
        draft.vector(b + "attn_output.bias", dims.n_embd)
        experts(dims, draft, b, i, "mxfp4")
        draft.vector(b + "ffn_gate_inp.bias", dims.n_expert)
        for part, width in (("gate", dims.n_ff_exp), ("up", dims.n_ff_exp), ("down", dims.n_embd)):
            draft.vector(f"{b}ffn_{part}_exps.bias", width, dims.n_expert)


def command_r(dims: Dims, draft: Draft) -> None:
    attention_keys(dims, draft)
    draft.keys(logit_scale=0.0625, **{"attention.layer_norm_epsilon": 1e-5})
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        qkv(dims, draft, b, i)
        ffn(dims, draft, b, i)


def starcoder2(dims: Dims, draft: Draft) -> None:
    attention_keys(dims, draft)
    draft.keys(**{"attention.layer_norm_epsilon": 1e-5})
    ends(dims, draft)
    draft.vector("output_norm.bias", dims.n_embd)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            draft.vector(f"{b}{norm}.weight", dims.n_embd)
            draft.vector(f"{b}{norm}.bias", dims.n_embd)
        qkv(dims, draft, b, i, bias=True)
        draft.vector(b + "attn_output.bias", dims.n_embd)
        draft.matrix(b + "ffn_up.weight", dims.n_embd, dims.n_ff)
        draft.vector(b + "ffn_up.bias", dims.n_ff)
        draft.matrix(b + "ffn_down.weight", dims.n_ff, dims.n_embd, better=draft.more_bits(i))
        draft.vector(b + "ffn_down.bias", dims.n_embd)


def glm4moe(dims: Dims, draft: Draft) -> None:
    """GLM-4.5: dense first layers, and an MTP layer at the end that is not loaded."""
    attention_keys(dims, draft)
    draft.keys(expert_feed_forward_length=dims.n_ff_exp, expert_shared_count=dims.n_expert_shared,
               leading_dense_block_count=dims.n_dense_lead,
               nextn_predict_layers=dims.n_nextn)  # fmt: skip
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.vector(b + "post_attention_norm.weight", dims.n_embd)
        qkv(dims, draft, b, i, bias=True)
        if i < dims.n_dense_lead:
            ffn(dims, draft, b, i)
        else:
            experts(dims, draft, b, i)
            draft.vector(b + "exp_probs_b.bias", dims.n_expert)
            shared_experts(dims, draft, b, dims.n_ff_exp * dims.n_expert_shared)
        if i >= dims.n_layer - dims.n_nextn:
            draft.matrix(b + "nextn.eh_proj.weight", 2 * dims.n_embd, dims.n_embd)
            for norm in ("enorm", "hnorm", "shared_head_norm"):
                draft.vector(f"{b}nextn.{norm}.weight", dims.n_embd)


def deepseek2(dims: Dims, draft: Draft) -> None:
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
    if dims.q_lora:
        draft.keys(**{"attention.q_lora_rank": dims.q_lora})
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        _mla(dims, draft, b)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        if i < dims.n_dense_lead:
            ffn(dims, draft, b, i)
        else:
            experts(dims, draft, b, i)
            shared_experts(dims, draft, b, dims.n_ff_exp * dims.n_expert_shared)


def _mla(dims: Dims, draft: Draft, b: str) -> None:
    q_width = dims.n_head * (dims.head + dims.n_rot)
    if dims.q_lora:
        draft.matrix(b + "attn_q_a.weight", dims.n_embd, dims.q_lora)
        draft.vector(b + "attn_q_a_norm.weight", dims.q_lora)
        draft.matrix(b + "attn_q_b.weight", dims.q_lora, q_width)
    else:
        draft.matrix(b + "attn_q.weight", dims.n_embd, q_width)
    draft.matrix(b + "attn_kv_a_mqa.weight", dims.n_embd, dims.kv_lora + dims.n_rot)
    draft.vector(b + "attn_kv_a_norm.weight", dims.kv_lora)
    draft.matrix(b + "attn_k_b.weight", dims.head, dims.kv_lora, dims.n_head)
    draft.matrix(b + "attn_v_b.weight", dims.kv_lora, dims.head, dims.n_head)
    draft.matrix(b + "attn_output.weight", dims.n_head * dims.head, dims.n_embd)
