"""What is asked to run: one frozen `ModelSpec`, read from headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Literal, get_args

from loadmaster.units import Bytes

Scalar = int | float | bool | str
MetadataValue = Scalar | tuple[Scalar, ...]  # a tuple where the file has one number per layer
# How one vector is made of a prompt: llama.cpp's LLAMA_POOLING_TYPE_MEAN (1) to _RANK (4).
Pooling = Literal["mean", "cls", "last", "rank"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantType:
    """A ggml tensor type: `block_size` elements are stored in `block_bytes` bytes."""

    name: str  # llama.cpp's spelling in lower case: `f16`, `q4_K`, `mxfp4`
    ggml_id: int
    block_size: int
    block_bytes: int

    def row_bytes(self, n_elements: int) -> Bytes:
        """Bytes of a row; `n_elements` is a multiple of `block_size` (ggml_row_size)."""
        return Bytes(n_elements // self.block_size * self.block_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of the file; `shape` is in ggml's order, the row length first."""

    name: str
    type: QuantType
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of its shard's data section
    shard: int

    @property
    def size_bytes(self) -> Bytes:
        return Bytes(self.type.row_bytes(self.shape[0]) * prod(self.shape[1:]))

    @property
    def layer(self) -> int | None:
        """The repeating layer of `blk.12.…`; None for embeddings and output."""
        if not self.name.startswith("blk."):
            return None
        number = self.name[4:].split(".", 1)[0]
        return int(number) if number.isdigit() else None


class LayerKind(StrEnum):
    """What a layer remembers between tokens, hence which formula sizes its cache."""

    FULL = "full"  # K and V rows for every cell of n_ctx (MHA, GQA, MQA)
    SWA = "swa"  # K and V rows for a sliding window
    MLA = "mla"  # one compressed K row, no V
    RECURRENT = "recurrent"  # a state of fixed size for each sequence
    NONE = "none"  # nothing of its own (shares another layer's cache, or has no attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """The cache-relevant shape of one layer; the widths are rows of the cache, in elements."""

    index: int
    kind: LayerKind
    n_head: int
    n_head_kv: int
    k_width: int  # n_embd_k_gqa: elements of one K row
    v_width: int  # n_embd_v_gqa; 0 when there is no V
    recurrent_r_width: int = 0  # F32 elements of the convolution state of one sequence
    recurrent_s_width: int = 0  # F32 elements of the recurrent state of one sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """Identity of a file when it was planned; a changed file is not loaded."""

    path: Path
    size_bytes: Bytes
    device: int
    inode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as its header describes it. Weights are not read."""

    files: tuple[FileStamp, ...]  # every shard, in order
    file_bytes: Bytes  # all shards together, as on disk
    header_bytes: Bytes  # bytes read to learn this
    name: str
    architecture: str
    quantization: str  # the file's own label, `Q4_K_M`; or its dominant tensor type
    n_layer: int  # all repeating layers, as llama.cpp's n_layer_all (MTP layers included)
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_ff: int  # the widest dense feed-forward
    n_expert: int
    n_expert_used: int
    n_swa: int  # sliding window in tokens; 0 when no layer has one
    tied_output: bool  # no `output.weight`: token_embd serves as the output too
    layers: tuple[LayerSpec, ...]
    tensors: tuple[TensorSpec, ...]
    kv_formula: bool  # False: the engine's own sizing is the only source for the caches
    chat_template: str | None
    tokenizer_model: str
    n_merges: int = 0  # rules of a byte-pair tokenizer
    # Every scalar of the header and its short arrays of numbers, without the tokenizer's tables;
    # for `doctor`, `show` and formulas.
    metadata: Mapping[str, MetadataValue] = field(repr=False)

    @property
    def path(self) -> Path:
        """The file to hand to the engine: the first shard."""
        return self.files[0].path

    @property
    def weight_bytes(self) -> Bytes:
        """All tensors, unpadded."""
        return Bytes(sum(tensor.size_bytes for tensor in self.tensors))

    @property
    def pooling(self) -> Pooling | None:
        """What the header says of embeddings: None for a model that writes text."""
        kind = self.metadata.get(f"{self.architecture}.pooling_type")
        if isinstance(kind, int) and 1 <= kind <= len(POOLINGS):
            return POOLINGS[kind - 1]
        return None

    @property
    def is_recurrent(self) -> bool:
        """Whether any layer keeps a recurrent state (recurrent and hybrid models)."""
        return any(layer.kind is LayerKind.RECURRENT for layer in self.layers)
