"""A model cut into the pieces that the planner places: layers, and the matrices inside them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadmaster.machine.types import SizingRules
from loadmaster.model.types import ModelSpec, TensorSpec
from loadmaster.plan import layout, memory
from loadmaster.plan.types import CPU, EngineSettings, Override

# The matrices that may live apart from their layer: dense feed-forward and experts. The rest of a
# layer (attention, norms, router) stays with the layer's cache, because every token crosses it.
_MOVABLE = re.compile(r"^blk\.\d+\.(ffn_(?:gate|up|down|gate_up)(?:_exps)?)\.weight$")
_ROUTED = re.compile(r"_exps\.")
_OUTPUT = re.compile(r"^(output|output_norm|cls|cls_out)\b")


Kind = tuple[str, int]  # matrices of one role and one size


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor, or several that always move together."""

    name: str
    role: str  # `ffn_up`, `ffn_down_exps`; `base` for what stays with its layer
    gpu_bytes: tuple[int, ...]  # padded size on each GPU, by that GPU's rules
    host_bytes: int
    read_bytes: int  # read for one token: experts count by the share that is used

    @property
    def kind(self) -> Kind:
        return self.role, self.host_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A repeating layer, or the output layer (the last one, without movable pieces)."""

    index: int
    base: Piece
    movable: tuple[Piece, ...]
    cache_bytes: int  # KV and recurrent state
    gpu_cache_bytes: int  # the same, or 0 when caches stay on the host (`offload_kqv` false)

    def whole_bytes(self, gpu: int) -> int:
        """Everything of this layer on one GPU, cache included."""
        return self.fixed_bytes(gpu) + sum(piece.gpu_bytes[gpu] for piece in self.movable)

    def fixed_bytes(self, gpu: int) -> int:
        """What must be on the layer's GPU at the least."""
        return self.base.gpu_bytes[gpu] + self.gpu_cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The whole model in pieces."""

    layers: tuple[Layer, ...]  # n_layer repeating ones and the output layer
    pinned_gpu_bytes: tuple[int, ...]  # tensors that the user's overrides put on each GPU
    pinned_read_bytes: int  # of those on GPUs
    host_read_bytes: int  # read from the host for every token whatever the placement
    n_gpus: int
    read_bytes: int  # all weights read for one token


def cut(
    model: ModelSpec,
    settings: EngineSettings,
    rules: Sequence[SizingRules],
    pinned: Sequence[Override],
) -> Parts:
    """Cut a model for placement.

    `settings` gives the cache sizes (n_ctx, KV types, sequences), not the placement; `pinned` are
    the user's own overrides, whose tensors the planner leaves where they were put.
    """
    overrides = layout.Overrides(pinned)
    base: dict[int, list[Piece]] = {}
    movable: dict[int, list[Piece]] = {}
    pinned_gpu = [0] * len(rules)
    pinned_read = host_read = 0
    for tensor in model.tensors:
        if not layout.is_loaded(model, tensor):
            continue
        piece = _piece(model, tensor, rules)
        device = overrides.device(tensor)
        layer = layer_of(model, tensor)
        if device is not None and device != CPU:
            gpu = int(device.removeprefix("gpu:"))
            pinned_gpu[gpu] += piece.gpu_bytes[gpu]
            pinned_read += piece.read_bytes
        elif device == CPU or layer is None:
            host_read += piece.read_bytes if layer is not None else 0
        elif piece.role == "base":
            base.setdefault(layer, []).append(piece)
        else:
            movable.setdefault(layer, []).append(piece)
    if layout.is_tied(model):
        base.setdefault(model.n_layer, []).append(_tied(model, rules))
    caches = [_cache_bytes(model, index, settings, rules) for index in range(model.n_layer + 1)]
    layers = tuple(
        Layer(
            index=index,
            base=_sum(base.get(index, []), len(rules)),
            movable=tuple(movable.get(index, ())),
            cache_bytes=cache,
            gpu_cache_bytes=cache if settings.offload_kqv else 0,
        )
        for index, cache in enumerate(caches)
    )
    return Parts(
        layers=layers,
        pinned_gpu_bytes=tuple(pinned_gpu),
        pinned_read_bytes=pinned_read,
        host_read_bytes=host_read,
        n_gpus=len(rules),
        read_bytes=_read_bytes(layers) + pinned_read + host_read,
    )


def _read_bytes(layers: Sequence[Layer]) -> int:
    return sum(
        layer.base.read_bytes + sum(piece.read_bytes for piece in layer.movable) for layer in layers
    )


def _cache_bytes(
    model: ModelSpec, index: int, settings: EngineSettings, rules: Sequence[SizingRules]
) -> int:
    if index >= len(model.layers):
        return 0
    rule = rules[0] if rules else memory.HOST_RULES
    layer = model.layers[index]
    return memory.layer_cache_bytes(model, layer, settings, rule) + memory.layer_state_bytes(
        model, layer, settings, rule
    )


def layer_of(model: ModelSpec, tensor: TensorSpec) -> int | None:
    """The layer a tensor belongs to: n_layer for the output layer, None for the embeddings."""
    if tensor.layer is not None:
        return tensor.layer
    if _OUTPUT.match(tensor.name):
        return model.n_layer
    return None


def role_of(tensor_name: str) -> str:
    """`ffn_up`, `ffn_down_exps` … for a movable matrix, else `base`."""
    match = _MOVABLE.match(tensor_name)
    return match[1] if match else "base"


def _piece(model: ModelSpec, tensor: TensorSpec, rules: Sequence[SizingRules]) -> Piece:
    read = int(tensor.size_bytes)
    if _ROUTED.search(tensor.name) and model.n_expert:
        read = read * model.n_expert_used // model.n_expert
    return Piece(
        name=tensor.name,
        role=role_of(tensor.name),
        gpu_bytes=tuple(memory.alloc_bytes(tensor.type, tensor.shape, rule) for rule in rules),
        host_bytes=memory.alloc_bytes(tensor.type, tensor.shape, memory.HOST_RULES),
        read_bytes=read,
    )


def _tied(model: ModelSpec, rules: Sequence[SizingRules]) -> Piece:
    """The copy of token_embd that serves as the output."""
    embedding = next(tensor for tensor in model.tensors if tensor.name == "token_embd.weight")
    return _piece(model, embedding, rules)


def _sum(pieces: Sequence[Piece], n_gpus: int) -> Piece:
    return Piece(
        name="",
        role="base",
        gpu_bytes=tuple(sum(piece.gpu_bytes[gpu] for piece in pieces) for gpu in range(n_gpus)),
        host_bytes=sum(piece.host_bytes for piece in pieces),
        read_bytes=sum(piece.read_bytes for piece in pieces),
    )


def group_by_layer(names: Mapping[str, str]) -> dict[tuple[str, str], list[int]]:
    """Tensor name → device, regrouped as (role, device) → layer numbers, sorted."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, device in names.items():
        groups.setdefault((role_of(name), device), []).append(int(name.split(".")[1]))
    return {key: sorted(layers) for key, layers in groups.items()}
