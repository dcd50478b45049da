"""The Llama architecture in plain PyTorch, with the names of the Hugging Face checkpoint."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Model shape; rows of 256 and 768 values suit every K-quant of llama.cpp."""

    n_vocab: int = 4096
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 768
    n_ctx_train: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):  # type: ignore[misc, unused-ignore]
    """Grouped-query attention; `q` and `k` use the half-split rotation of the HF layout."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_width, kv_width = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
        self.q_proj = nn.Linear(shape.n_embd, q_width, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_seq, n_tokens, _ = x.shape
        head_dim = self.shape.head_dim
        q = self.q_proj(x).view(n_seq, n_tokens, -1, head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n_seq, n_tokens, -1, head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n_seq, n_tokens, -1, head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        repeat = self.shape.n_head // self.shape.n_head_kv
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(n_seq, n_tokens, -1))
        return out


class FeedForward(nn.Module):  # type: ignore[misc, unused-ignore]
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.up_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.down_proj = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):  # type: ignore[misc, unused-ignore]
    """One transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):  # type: ignore[misc, unused-ignore]
    """Token ids in, logits out; the output matrix is the token embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.norm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        cos, sin = _rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, weight in self.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=self.shape.n_embd**-0.5)

    def hidden(self, tokens: Tensor) -> Tensor:
        n_tokens = tokens.shape[1]
        x = self.embed_tokens(tokens)
        cos, sin = self.get_buffer("cos")[:n_tokens], self.get_buffer("sin")[:n_tokens]
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.embed_tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each next token; `tokens` has one more than is read."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    positions = torch.arange(shape.n_ctx_train, dtype=torch.float32)
    angles = torch.outer(positions, shape.rope_theta**-exponents)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
