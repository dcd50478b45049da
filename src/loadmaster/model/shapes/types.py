"""What a shape file says, and what becomes of it."""

from dataclasses import dataclass

from loadmaster.model.types import MetadataValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """The numbers of a published checkpoint's config.json; a family uses those that it has."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    head_dim: int = 0  # 0: n_embd / n_head
    rope_freqs: bool = False  # the file has a table of rope factors (Llama 3.1 and later)
    tied: bool = False  # no output matrix: token_embd serves as the output too
    window: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0  # 0: n_ff
    n_expert_shared: int = 0
    n_dense_lead: int = 0
    n_nextn: int = 0  # MTP layers at the end
    n_rot: int = 0
    kv_lora: int = 0

    @property
    def head(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def q_width(self) -> int:
        return self.head * self.n_head

    @property
    def kv_width(self) -> int:
        return self.head * self.n_head_kv


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One shape file."""

    schema_version: int
    name: str  # as in `shape:NAME`, equal to the file's
    published: str  # the repository whose config.json has these numbers
    architecture: str  # llama.cpp's
    family: str  # whose tensors it has: a function of `families`
    dims: Dims
    # What the published weights are in, where other files of the model are made from it without
    # changing the experts: `MXFP4`. Empty: every mix of `mixes`.
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor before its type is chosen; `fixed` for those that no mix touches."""

    name: str
    shape: tuple[int, ...]  # ggml's order, the row length first
    fixed: str | None = None  # `f32` of norms and biases, `mxfp4` of published experts

    @property
    def layer(self) -> int:
        """The repeating layer; -1 for embeddings and output."""
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Metadata and tensors of a model before it is quantized."""

    metadata: dict[str, MetadataValue]
    tensors: tuple[Tensor, ...]
