"""A model description in the making: numbers, metadata and tensors, and parts families share."""

from dataclasses import dataclass
from typing import Any

from benchmarks.gguf_writer import TensorLine
from loadmaster.model.quants import BY_NAME
from loadmaster.model.shapes import types as shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims(shapes.Dims):
    """The numbers of a checkpoint; a family uses those that it has."""

    architecture: str
    shared_kv: int = 0
    n_ff_shexp: int = 0
    q_lora: int = 0
    d_conv: int = 0
    d_state: int = 0
    n_group: int = 0
    dt_rank: int = 0
    attention: tuple[int, ...] = ()  # the layers with attention, in a hybrid
    tokenizer: str = ""  # `bpe`, `spm`; empty: none


# Where a row is no multiple of the block: the next type (tensor_type_fallback, llama-quant.cpp).
_FALLBACK = {"q2_K": "iq4_nl", "q3_K": "iq4_nl", "iq4_xs": "iq4_nl", "q4_K": "q5_0",
             "q5_K": "q5_1", "q6_K": "q8_0"}  # fmt: skip
_MIXES = {"q4_K_M": ("q4_K", "q6_K"), "q5_K_M": ("q5_K", "q6_K")}


class Draft:
    """Collects metadata and tensors of one model."""

    def __init__(self, dims: Dims, quant: str) -> None:
        self._dims = dims
        self._base, self._better = _MIXES.get(quant, (quant, quant))
        self.metadata: dict[str, Any] = {
            "general.architecture": dims.architecture,
            # Not the architecture: llama.cpp looks for special tokens in models named after Phi-3.
            "general.name": "shape",
        }
        self.tensors: list[TensorLine] = []
        self.keys(
            block_count=dims.n_layer,
            context_length=dims.n_ctx_train,
            embedding_length=dims.n_embd,
            feed_forward_length=dims.n_ff,
            vocab_size=dims.n_vocab,
        )
        self.keys(**{"attention.head_count": dims.n_head,
                     "attention.layer_norm_rms_epsilon": 1e-6})  # fmt: skip
        if dims.n_expert:
            self.keys(expert_count=dims.n_expert, expert_used_count=dims.n_expert_used)

    def keys(self, **values: Any) -> None:
        """Metadata under the architecture's prefix."""
        self.metadata.update({f"{self._dims.architecture}.{k}": v for k, v in values.items()})

    def vector(self, name: str, *shape: int) -> None:
        """A tensor that stays F32: norms, biases, routers, states."""
        self.tensors.append(TensorLine(name, "f32", shape))

    def matrix(self, name: str, *shape: int, better: bool = False, type_name: str = "") -> None:
        """A quantized tensor; `better` is for those that a mix keeps at more bits."""
        wanted = type_name or (self._better if better else self._base)
        while shape[0] % BY_NAME[wanted].block_size:
            wanted = _FALLBACK.get(wanted, "f16")
        self.tensors.append(TensorLine(name, wanted, shape))

    def more_bits(self, layer: int) -> bool:
        """use_more_bits of llama-quant.cpp: the first and last eighth and every third layer."""
        n = self._dims.n_layer
        return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def attention_keys(dims: Dims, draft: Draft) -> None:
    draft.keys(**{"attention.head_count_kv": dims.n_head_kv,
                  "rope.dimension_count": dims.n_rot or dims.head})  # fmt: skip
    if dims.head_dim:
        draft.keys(**{"attention.key_length": dims.head, "attention.value_length": dims.head})


def ends(dims: Dims, draft: Draft, norm: str = "output_norm.weight") -> None:
    """Embedding and output; a tied model has no output of its own."""
    draft.matrix("token_embd.weight", dims.n_embd, dims.n_vocab)
    draft.vector(norm, dims.n_embd)
    if not dims.tied:
        draft.matrix("output.weight", dims.n_embd, dims.n_vocab, better=True)


def qkv(dims: Dims, draft: Draft, b: str, i: int, *, gate: int = 1, bias: bool = False) -> None:
    """Separate Q, K, V and the projection back; `gate` 2 when Q carries a gate beside it."""
    draft.matrix(b + "attn_q.weight", dims.n_embd, dims.q_width * gate)
    draft.matrix(b + "attn_k.weight", dims.n_embd, dims.kv_width)
    draft.matrix(b + "attn_v.weight", dims.n_embd, dims.kv_width, better=draft.more_bits(i))
    draft.matrix(b + "attn_output.weight", dims.q_width, dims.n_embd)
    if bias:
        draft.vector(b + "attn_q.bias", dims.q_width)
        draft.vector(b + "attn_k.bias", dims.kv_width)
        draft.vector(b + "attn_v.bias", dims.kv_width)


def qk_norms(dims: Dims, draft: Draft, b: str) -> None:
    draft.vector(b + "attn_q_norm.weight", dims.head)
    draft.vector(b + "attn_k_norm.weight", dims.head)


def ffn(dims: Dims, draft: Draft, b: str, i: int) -> None:
    draft.matrix(b + "ffn_gate.weight", dims.n_embd, dims.n_ff)
    draft.matrix(b + "ffn_up.weight", dims.n_embd, dims.n_ff)
    draft.matrix(b + "ffn_down.weight", dims.n_ff, dims.n_embd, better=draft.more_bits(i))


def experts(dims: Dims, draft: Draft, b: str, i: int, type_name: str = "") -> None:
    n_ff, n = dims.n_ff_exp or dims.n_ff, dims.n_expert
    draft.vector(b + "ffn_gate_inp.weight", dims.n_embd, n)
    draft.matrix(b + "ffn_gate_exps.weight", dims.n_embd, n_ff, n, type_name=type_name)
    draft.matrix(b + "ffn_up_exps.weight", dims.n_embd, n_ff, n, type_name=type_name)
    better = draft.more_bits(i)
    draft.matrix(b + "ffn_down_exps.weight", n_ff, dims.n_embd, n, better=better,
                 type_name=type_name)  # fmt: skip


def shared_experts(dims: Dims, draft: Draft, b: str, n_ff: int) -> None:
    draft.matrix(b + "ffn_gate_shexp.weight", dims.n_embd, n_ff)
    draft.matrix(b + "ffn_up_shexp.weight", dims.n_embd, n_ff)
    draft.matrix(b + "ffn_down_shexp.weight", n_ff, dims.n_embd)
