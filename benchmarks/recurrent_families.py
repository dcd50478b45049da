"""Families with recurrent layers: gated delta nets, Mamba, short convolutions, and hybrids.

Source: models/*.cpp of llama.cpp 0c1e57098, as in `families`.
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


def qwen3next(dims: Dims, draft: Draft) -> None:
    """Three gated delta nets, then one gated attention layer; experts everywhere."""
    attention_keys(dims, draft)
    _ssm_keys(dims, draft, dims.d_state * dims.dt_rank)
    draft.keys(expert_feed_forward_length=dims.n_ff_exp,
               expert_shared_feed_forward_length=dims.n_ff_exp)  # fmt: skip
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.vector(b + "post_attention_norm.weight", dims.n_embd)
        if (i + 1) % 4 == 0:
            qkv(dims, draft, b, i, gate=2)
            qk_norms(dims, draft, b)
        else:
            _delta_net(dims, draft, b)
        experts(dims, draft, b, i)
        draft.vector(b + "ffn_gate_inp_shexp.weight", dims.n_embd)
        shared_experts(dims, draft, b, dims.n_ff_exp)


def _ssm_keys(dims: Dims, draft: Draft, d_inner: int) -> None:
    draft.keys(**{"ssm.conv_kernel": dims.d_conv, "ssm.inner_size": d_inner,
                  "ssm.state_size": dims.d_state, "ssm.time_step_rank": dims.dt_rank})  # fmt: skip
    if dims.n_group:
        draft.keys(**{"ssm.group_count": dims.n_group})


def _delta_net(dims: Dims, draft: Draft, b: str) -> None:
    key, value = dims.d_state * dims.n_group, dims.d_state * dims.dt_rank
    draft.matrix(b + "attn_qkv.weight", dims.n_embd, 2 * key + value)
    draft.matrix(b + "attn_gate.weight", dims.n_embd, value)
    draft.vector(b + "ssm_conv1d.weight", dims.d_conv, 2 * key + value)
    draft.vector(b + "ssm_dt.bias", dims.dt_rank)
    draft.vector(b + "ssm_a", dims.dt_rank)
    draft.matrix(b + "ssm_ba.weight", dims.n_embd, 2 * dims.dt_rank)
    draft.vector(b + "ssm_norm.weight", dims.d_state)
    draft.matrix(b + "ssm_out.weight", value, dims.n_embd)


def granitehybrid(dims: Dims, draft: Draft) -> None:
    """Mamba-2 layers with attention here and there; a dense feed-forward in every layer."""
    d_inner = 2 * dims.n_embd
    conv = d_inner + 2 * dims.n_group * dims.d_state
    attention_keys(dims, draft)
    _hybrid_heads(dims, draft)
    _ssm_keys(dims, draft, d_inner)
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        if i in dims.attention:
            qkv(dims, draft, b, i)
        else:
            draft.matrix(b + "ssm_in.weight", dims.n_embd, d_inner + conv + dims.dt_rank)
            draft.vector(b + "ssm_conv1d.weight", dims.d_conv, conv)
            draft.vector(b + "ssm_conv1d.bias", conv)
            draft.vector(b + "ssm_dt.bias", dims.dt_rank)
            draft.vector(b + "ssm_a", 1, dims.dt_rank)
            draft.vector(b + "ssm_d", 1, dims.dt_rank)
            draft.vector(b + "ssm_norm.weight", d_inner // dims.n_group, dims.n_group)
            draft.matrix(b + "ssm_out.weight", d_inner, dims.n_embd)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        ffn(dims, draft, b, i)


def _hybrid_heads(dims: Dims, draft: Draft) -> None:
    """A layer with 0 KV heads is recurrent."""
    heads = [dims.n_head_kv if i in dims.attention else 0 for i in range(dims.n_layer)]
    draft.keys(**{"attention.head_count_kv": heads})


def lfm2(dims: Dims, draft: Draft) -> None:
    """Short convolutions with attention here and there; the output norm has an old name."""
    attention_keys(dims, draft)
    _hybrid_heads(dims, draft)
    draft.keys(**{"shortconv.l_cache": dims.d_conv})
    ends(dims, draft, norm="token_embd_norm.weight")
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        if i in dims.attention:
            qkv(dims, draft, b, i)
            qk_norms(dims, draft, b)
        else:
            draft.vector(b + "shortconv.conv.weight", dims.d_conv, dims.n_embd)
            draft.matrix(b + "shortconv.in_proj.weight", dims.n_embd, 3 * dims.n_embd)
            draft.matrix(b + "shortconv.out_proj.weight", dims.n_embd, dims.n_embd)
        draft.vector(b + "ffn_norm.weight", dims.n_embd)
        ffn(dims, draft, b, i)


def mamba(dims: Dims, draft: Draft) -> None:
    d_inner = 2 * dims.n_embd
    _ssm_keys(dims, draft, d_inner)
    ends(dims, draft)
    for i in range(dims.n_layer):
        b = f"blk.{i}."
        draft.vector(b + "attn_norm.weight", dims.n_embd)
        draft.matrix(b + "ssm_in.weight", dims.n_embd, 2 * d_inner)
        draft.vector(b + "ssm_conv1d.weight", dims.d_conv, d_inner)
        draft.vector(b + "ssm_conv1d.bias", d_inner)
        draft.matrix(b + "ssm_x.weight", d_inner, dims.dt_rank + 2 * dims.d_state)
        draft.vector(b + "ssm_dt.weight", dims.dt_rank, d_inner)
        draft.vector(b + "ssm_dt.bias", d_inner)
        draft.vector(b + "ssm_a", dims.d_state, d_inner)
        draft.vector(b + "ssm_d", d_inner)
        draft.matrix(b + "ssm_out.weight", d_inner, dims.n_embd)
