"""A safetensors checkpoint as planning sees it: one frozen `CheckpointSpec`, from headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from loadmaster.model.safetensors import FLOATS
from loadmaster.model.types import FileStamp, LayerSpec, ModelSpec, Pooling
from loadmaster.units import Bytes

# What a tensor is to the engine, hence what a quantization makes of it:
#   linear     a matrix of an `nn.Linear` inside a layer: quantized
#   output     the matrix that makes logits: as computed
#   embedding  rows looked up by token: as computed
#   expert     one expert's matrix, kept in a stack with the others: no `nn.Linear`
#   other      norms, biases, routers: as computed
#   statistic  what belongs to a quantized matrix: scales, code tables
Role = Literal["linear", "output", "embedding", "expert", "other", "statistic"]
# Quantizations that a checkpoint can come in.
Method = Literal["bnb4", "bnb8", "fp8", "gptq", "awq", "compressed-tensors", "fbgemm-fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One tensor of the checkpoint."""

    name: str
    dtype: str  # as in the file: `BF16`
    shape: tuple[int, ...]
    size_bytes: Bytes  # in the file
    role: Role
    layer: int | None  # None for embeddings, the last norm and the output
    shard: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether loading casts it to the type that is computed in."""
        return self.dtype in FLOATS

    @property
    def module(self) -> str:
        """`model.layers.3.mlp.up_proj` of `model.layers.3.mlp.up_proj.weight`."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a checkpoint's matrices are already quantized."""

    method: Method
    label: str  # as people call it: `NF4`, `INT8`, `FP8`, `GPTQ 4-bit`
    double_quant: bool = False
    fp4: bool = False  # of bnb4: FP4 instead of NF4
    bits: int = 8  # of a weight
    # Of matrices with scales of their own: elements that share one, where the shapes do not tell.
    block: tuple[int, int] | None = None
    zeros_less_one: bool = False  # of GPTQ: what stands for zero is stored less one
    act_order: bool = False  # of GPTQ: columns share scales in another order than they are in
    runs: bool = True  # whether the engine has products for it; planned it is in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    """A checkpoint as its headers and its config describe it. Weights are not read."""

    folder: Path  # what the engine opens; of a remote checkpoint only its headers are there
    files: tuple[FileStamp, ...]  # config.json, then every shard, in order
    file_bytes: Bytes  # all shards together
    header_bytes: Bytes  # bytes read to learn this
    name: str
    architecture: str  # the config's `model_type`: `llama`
    dtype: str  # what most weights are stored as: `bf16`, `f16`, `f32`
    stored: Stored | None  # None: not quantized
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_ff: int
    n_head: int
    n_expert: int
    n_expert_used: int
    n_ff_expert: int
    n_swa: int  # sliding window in tokens; 0 when no layer has one
    tied_output: bool  # the embedding serves as the output too
    rope_width: int  # elements of each table of inverse frequencies
    n_rope: int  # tables of inverse frequencies
    embed_scale: bool  # the embedding keeps a factor beside its rows
    softcap: bool  # scores of attention are capped, so its products are spelled out
    layers: tuple[LayerSpec, ...]
    tensors: tuple[CheckpointTensor, ...]
    chat_template: str | None = None
    pooling: Pooling | None = None  # how its vectors are made; None for a model that writes text
    writes_text: bool = True  # False: saved without an output, which makes logits of vectors
    dense_after_pooling: bool = False  # its vectors go through a matrix of their own
    remote: bool = False  # headers only: nothing to load
    skipped: Mapping[str, Bytes] = field(default_factory=dict)  # in the files and not loaded

    @property
    def path(self) -> Path:
        """The folder to hand to the engine."""
        return self.folder

    @property
    def quantization(self) -> str:
        """The checkpoint's own label: how it is stored."""
        return self.stored.label if self.stored else self.dtype.upper()

    @property
    def weight_bytes(self) -> Bytes:
        return Bytes(sum(tensor.size_bytes for tensor in self.tensors))


AnyModel = ModelSpec | CheckpointSpec
