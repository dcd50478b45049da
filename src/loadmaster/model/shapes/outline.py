"""An outline in the making, and the parts that model families share."""

from loadmaster.model.shapes.types import Dims, Outline, Shape, Tensor
from loadmaster.model.types import MetadataValue


class Draft:
    """Collects metadata and tensors of one shape."""

    def __init__(self, shape: Shape) -> None:
        self.dims = dims = shape.dims
        self._prefix = shape.architecture
        self._metadata: dict[str, MetadataValue] = {
            "general.architecture": shape.architecture,
            "general.name": shape.name,
            "general.type": "model",
            "tokenizer.ggml.model": "no_vocab",
        }
        self._tensors: list[Tensor] = []
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

    def keys(self, **values: MetadataValue) -> None:
        """Metadata under the architecture's prefix."""
        self._metadata.update({f"{self._prefix}.{key}": value for key, value in values.items()})

    def vector(self, name: str, *shape: int) -> None:
        """A tensor that stays F32: norms, biases, routers."""
        self._tensors.append(Tensor(name=name, shape=shape, fixed="f32"))

    def matrix(self, name: str, *shape: int, fixed: str | None = None) -> None:
        """A tensor whose type the mix chooses, unless the published weights fix it."""
        self._tensors.append(Tensor(name=name, shape=shape, fixed=fixed))

    def done(self) -> Outline:
        return Outline(metadata=self._metadata, tensors=tuple(self._tensors))


def attention_keys(draft: Draft, dims: Dims) -> None:
    draft.keys(**{"attention.head_count_kv": dims.n_head_kv,
                  "rope.dimension_count": dims.n_rot or dims.head})  # fmt: skip
    if dims.head_dim:
        draft.keys(**{"attention.key_length": dims.head, "attention.value_length": dims.head})


def ends(draft: Draft, dims: Dims) -> None:
    """Embedding and output; a tied model has no output of its own."""
    draft.matrix("token_embd.weight", dims.n_embd, dims.n_vocab)
    draft.vector("output_norm.weight", dims.n_embd)
    if not dims.tied:
        draft.matrix("output.weight", dims.n_embd, dims.n_vocab)
    if dims.rope_freqs:
        draft.vector("rope_freqs.weight", dims.head // 2)


def qkv(draft: Draft, dims: Dims, b: str, *, bias: bool = False) -> None:
    """Separate Q, K, V and the projection back."""
    draft.matrix(b + "attn_q.weight", dims.n_embd, dims.q_width)
    draft.matrix(b + "attn_k.weight", dims.n_embd, dims.kv_width)
    draft.matrix(b + "attn_v.weight", dims.n_embd, dims.kv_width)
    draft.matrix(b + "attn_output.weight", dims.q_width, dims.n_embd)
    if bias:
        draft.vector(b + "attn_q.bias", dims.q_width)
        draft.vector(b + "attn_k.bias", dims.kv_width)
        draft.vector(b + "attn_v.bias", dims.kv_width)


def qk_norms(draft: Draft, dims: Dims, b: str) -> None:
    draft.vector(b + "attn_q_norm.weight", dims.head)
    draft.vector(b + "attn_k_norm.weight", dims.head)


def ffn(draft: Draft, dims: Dims, b: str) -> None:
    draft.matrix(b + "ffn_gate.weight", dims.n_embd, dims.n_ff)
    draft.matrix(b + "ffn_up.weight", dims.n_embd, dims.n_ff)
    draft.matrix(b + "ffn_down.weight", dims.n_ff, dims.n_embd)


def experts(draft: Draft, dims: Dims, b: str, fixed: str | None = None) -> None:
    n_ff, n = dims.n_ff_exp or dims.n_ff, dims.n_expert
    draft.vector(b + "ffn_gate_inp.weight", dims.n_embd, n)
    draft.matrix(b + "ffn_gate_exps.weight", dims.n_embd, n_ff, n, fixed=fixed)
    draft.matrix(b + "ffn_up_exps.weight", dims.n_embd, n_ff, n, fixed=fixed)
    draft.matrix(b + "ffn_down_exps.weight", n_ff, dims.n_embd, n, fixed=fixed)


def shared_experts(draft: Draft, dims: Dims, b: str) -> None:
    n_ff = dims.n_ff_exp * dims.n_expert_shared
    draft.matrix(b + "ffn_gate_shexp.weight", dims.n_embd, n_ff)
    draft.matrix(b + "ffn_up_shexp.weight", dims.n_embd, n_ff)
    draft.matrix(b + "ffn_down_shexp.weight", n_ff, dims.n_embd)
