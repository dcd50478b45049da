"""Where the engine puts every tensor: the device of each layer, overrides, duplicates.

Repeats `llama_model_base::load_tensors` (llama-model.cpp) and `llama_model_loader::create_tensor`
(llama-model-loader.cpp) of llama.cpp 0c1e57098. GPUs are `gpu:0`, `gpu:1`, … in the order of
`EngineSettings.layers_per_device`; the host is `cpu`, whatever the buffer type there is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from loadmaster.model.types import LayerKind, ModelSpec, TensorSpec
from loadmaster.plan.types import CPU, EngineSettings, Override

# Tensors that the input layer reads row by row (LLM_TENSOR_LAYER_INPUT in llama-arch.cpp).
ROW_LOOKUPS = frozenset({"token_embd", "position_embd", "token_types", "per_layer_token_embd"})
# Repeating tensors without a layer number in their name, created with layer 0.
_FIRST_LAYER = frozenset({"token_embd_norm", "per_layer_model_proj", "per_layer_proj_norm",
                          "conv1d"})  # fmt: skip
# One in the file, asked for by every layer: a copy in each buffer type (TENSOR_DUPLICATED).
_ROPE = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short"})
_UNUSED = frozenset({"masked_embd_centroids", "masked_embd_ordering"})  # GGML_OP_NONE: not loaded
_LFM2 = frozenset({"lfm2", "lfm2moe"})  # their token_embd_norm is the output norm
# They ask for the output before token_embd: a tied output is a copy even on the same device.
_OUTPUT_FIRST = frozenset({"gemma3n", "gemma4"})
# Encoders: no `output.weight`, and none is made from token_embd either.
_HEADLESS = frozenset({"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert",
                       "jina-bert-v2", "jina-bert-v3", "eurobert"})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor in memory on a device; a duplicated tensor is placed once on each."""

    tensor: TensorSpec
    device: str
    duplicate: bool


def device_ids(settings: EngineSettings) -> tuple[str, ...]:
    """The GPUs of the settings, in the engine's order."""
    return tuple(f"gpu:{index}" for index in range(len(settings.layers_per_device)))


def opened_gpus(settings: EngineSettings) -> tuple[str, ...]:
    """The GPUs that the engine is given.

    Those with layers or named by an override; without either, the first one when host weights are
    streamed to it. A GPU that is not given costs nothing, not even a context.
    """
    named = {override.device for override in settings.overrides}
    ids = device_ids(settings)
    opened = tuple(
        device
        for device, count in zip(ids, settings.layers_per_device, strict=True)
        if count or device in named
    )
    return opened or (ids[:1] if settings.op_offload else ())


def layer_devices(model: ModelSpec, settings: EngineSettings) -> tuple[str, ...]:
    """The device of every repeating layer and, last, of the output layer.

    `get_layer_buft_list` of load_tensors: the last n_gpu_layers of n_layer + 1 go to the GPUs. We
    pass layers_per_device as tensor_split, so the split points are met exactly and each GPU's
    layers are contiguous.
    """
    on_gpu = [
        device
        for device, count in zip(device_ids(settings), settings.layers_per_device, strict=True)
        for _ in range(count)
    ]
    n_slots = model.n_layer + 1
    return tuple([CPU] * (n_slots - len(on_gpu)) + on_gpu[:n_slots])


def device_of_tensor(model: ModelSpec, settings: EngineSettings) -> Mapping[str, str]:
    """The device of every loaded tensor; of a duplicated one, that of the first copy."""
    return {p.tensor.name: p.device for p in placed_tensors(model, settings) if not p.duplicate}


def placed_tensors(model: ModelSpec, settings: EngineSettings) -> tuple[Placed, ...]:
    """Every tensor the engine keeps in memory, duplicates included.

    create_tensor: an override goes before the layer's device. Tensors of MTP layers are skipped
    (TENSOR_SKIP: load_mtp is false).
    """
    devices = layer_devices(model, settings)
    overrides = Overrides(settings.overrides)
    return tuple(
        placed
        for tensor in model.tensors
        if is_loaded(model, tensor)
        for placed in _place(model, tensor, devices, overrides)
    )


def is_loaded(model: ModelSpec, tensor: TensorSpec) -> bool:
    """Whether the engine loads the tensor at all."""
    if tensor.layer is None:
        return tensor.name.partition(".")[0] not in _UNUSED
    return tensor.layer < n_layer_trunk(model)


def n_layer_trunk(model: ModelSpec) -> int:
    """Repeating layers without the MTP layers at the end (llama_hparams::n_layer)."""
    value = model.metadata.get(f"{model.architecture}.nextn_predict_layers", 0)
    return model.n_layer - (value if isinstance(value, int) else 0)


def is_tied(model: ModelSpec) -> bool:
    """Whether the engine makes the output from token_embd (llama_model_*::load_arch_tensors)."""
    return model.tied_output and model.architecture not in _HEADLESS


def copies_tied_output(model: ModelSpec) -> bool:
    """Whether a tied output is a copy even where token_embd itself lies."""
    return model.architecture in _OUTPUT_FIRST


class Overrides:
    """tensor_buft_overrides: the first pattern found in a tensor's name wins.

    A pattern that begins with one layer's number is looked up by layer: a plan may have one for
    each of 126 layers, and is placed hundreds of times in a search.
    """

    def __init__(self, overrides: Sequence[Override]) -> None:
        self._by_layer: dict[int | None, list[tuple[int, Override]]] = {}
        for order, override in enumerate(overrides):
            self._by_layer.setdefault(_layer_of(override.pattern), []).append((order, override))

    def device(self, tensor: TensorSpec) -> str | None:
        """The device an override names for the tensor; None when none matches."""
        candidates = list(self._by_layer.get(None, ()))
        if tensor.layer is not None:
            candidates += self._by_layer.get(tensor.layer, ())
        found = [
            (order, override.device)
            for order, override in candidates
            if _compiled(override.pattern).search(tensor.name)
        ]
        return min(found)[1] if found else None


_ONE_LAYER = re.compile(r"\^blk\\\.(\d+)\\\.[^|]*(\([^()]*\)[^|]*)*")


@lru_cache(maxsize=8192)
def _layer_of(pattern: str) -> int | None:
    match = _ONE_LAYER.fullmatch(pattern)
    return int(match[1]) if match else None


@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _place(
    model: ModelSpec, tensor: TensorSpec, devices: Sequence[str], overrides: Overrides
) -> Iterator[Placed]:
    override = overrides.device(tensor)
    homes = [override or device for device in _homes(model, tensor, devices)]
    copied = tensor.name == "token_embd.weight" and copies_tied_output(model)
    for number, device in enumerate(homes if copied else dict.fromkeys(homes)):
        yield Placed(tensor=tensor, device=device, duplicate=number > 0)


def _homes(model: ModelSpec, tensor: TensorSpec, devices: Sequence[str]) -> list[str]:
    if tensor.layer is not None:
        return [devices[tensor.layer]]
    base = tensor.name.partition(".")[0]
    if base in _ROPE:
        return [devices[il] for il in _rope_layers(model)]
    if tensor.name == "token_embd.weight" and is_tied(model):
        return [CPU, devices[-1]]
    if base in ROW_LOOKUPS:
        return [CPU]
    first = base in _FIRST_LAYER and not (base == "token_embd_norm" and _is_lfm2(model))
    return [devices[0] if first else devices[-1]]


def _is_lfm2(model: ModelSpec) -> bool:
    return model.architecture in _LFM2


def _rope_layers(model: ModelSpec) -> list[int]:
    """The layers that ask for rope factors: all, but in Gemma 4 those without a window."""
    trunk = range(n_layer_trunk(model))
    if model.architecture == "gemma4":
        return [il for il in trunk if model.layers[il].kind is not LayerKind.SWA]
    return list(trunk)
