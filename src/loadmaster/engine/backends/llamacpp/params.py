"""`EngineSettings` to llama.cpp's parameter structs; its sentinels and enums stay here."""

import ctypes as c
from dataclasses import dataclass
from typing import Any

from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.errors import EngineRefusedError
from loadmaster.model.types import POOLINGS
from loadmaster.plan.layout import opened_gpus
from loadmaster.plan.types import AnySettings, EngineSettings

GGML_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20,
    "bf16": 30,
}  # fmt: skip
_LOAD_MODES = {"none": 0, "mmap": 1, "mlock": 2}  # mlock without mmap: private and locked
_SPLIT_BY_LAYER = 1


class _TensorOverride(c.Structure):
    """`llama_model_tensor_buft_override`."""

    _fields_ = (("pattern", c.c_char_p), ("buffer_type", c.c_void_p))


def llamacpp_settings(settings: AnySettings) -> EngineSettings:
    """Raises EngineRefusedError: the plan is another engine's."""
    if not isinstance(settings, EngineSettings):
        raise EngineRefusedError("the plan is for a safetensors model, this engine is llama.cpp")
    return settings


@dataclass(frozen=True, slots=True)
class Params:
    """A parameter struct and the arrays it points to; keep it as long as the struct is in use."""

    struct: Any
    alive: tuple[object, ...]


def model_params(
    library: Library, settings: EngineSettings, *, dry_run: bool, progress: object = None
) -> Params:
    """`llama_model_params` for a load, or for a dry run that allocates nothing.

    Raises:
        EngineRefusedError: the settings name a device that this engine does not have.
    """
    n_gpus = len(settings.layers_per_device)
    if n_gpus > len(library.devices):
        raise EngineRefusedError(
            f"the plan uses {n_gpus} GPUs, the engine sees {len(library.devices)}",
            hint="run `loadmaster doctor`, then plan again",
        )
    opened = [int(device.removeprefix("gpu:")) for device in opened_gpus(settings)]
    devices = (c.c_void_p * (len(opened) + 1))(*(library.devices[i].handle for i in opened))
    layers = [settings.layers_per_device[i] for i in opened]
    split = (c.c_float * max(n_gpus, library.api.llama_max_devices()))(*layers)
    overrides = _overrides(library, settings)
    params = library.api.llama_model_default_params()
    params.devices = c.addressof(devices)
    params.tensor_split = c.cast(split, c.POINTER(c.c_float))
    params.tensor_buft_overrides = c.addressof(overrides)
    params.n_gpu_layers = settings.n_gpu_layers
    params.split_mode = _SPLIT_BY_LAYER
    # A dry run with mmap would count mapped ranges instead of buffers.
    params.load_mode = _LOAD_MODES["none" if dry_run else settings.load_mode]
    params.use_extra_bufts = settings.use_extra_bufts
    params.no_alloc = dry_run
    if progress is not None:
        params.progress_callback = progress
    return Params(params, (devices, split, overrides, progress))


def _overrides(library: Library, settings: EngineSettings) -> c.Array[_TensorOverride]:
    """A list that ends with a NULL pattern; the first match wins."""
    lines = (_TensorOverride * (len(settings.overrides) + 1))()
    for line, override in zip(lines, settings.overrides, strict=False):
        try:
            line.buffer_type = library.buffer_type(override.device)
        except KeyError:
            raise EngineRefusedError(
                f"the plan puts tensors on `{override.device}`, which the engine does not see",
                hint="run `loadmaster doctor`, then plan again",
            ) from None
        line.pattern = override.pattern.encode()
    return lines


def context_params(library: Library, settings: EngineSettings) -> Params:
    """`llama_context_params`.

    Raises:
        EngineRefusedError: values that the engine would abort on.
    """
    if settings.n_outputs_max < settings.n_seq_max:
        raise EngineRefusedError(
            f"n_outputs_max {settings.n_outputs_max} is below n_seq_max {settings.n_seq_max}"
        )
    params = library.api.llama_context_default_params()
    params.n_ctx = settings.n_ctx
    params.n_batch = settings.n_batch
    params.n_ubatch = settings.n_ubatch
    params.n_seq_max = settings.n_seq_max
    params.n_outputs_max = settings.n_outputs_max
    params.n_threads = settings.n_threads
    params.n_threads_batch = settings.n_threads_batch
    params.flash_attn_type = int(settings.flash_attn)
    params.type_k = GGML_TYPES[settings.type_k]
    params.type_v = GGML_TYPES[settings.type_v]
    params.offload_kqv = settings.offload_kqv
    params.op_offload = settings.op_offload
    params.swa_full = settings.swa_full
    # One sequence in a cache of its own and in a unified one take the same bytes, but only in the
    # unified one are there ids for kept sequences.
    params.kv_unified = settings.kv_unified or settings.n_seq_max == 1
    params.no_perf = True
    if settings.pooling is not None:
        _check_pooled(settings)
        params.embeddings = True
        params.pooling_type = 1 + POOLINGS.index(settings.pooling)
    return Params(params, ())


def _check_pooled(settings: EngineSettings) -> None:
    """Each token is an output, and a prompt lies within one ubatch.

    The engine reserves a step of equal sequences; it aborts if that has more tokens than outputs.
    """
    sizes = (settings.n_batch, settings.n_ubatch, settings.n_outputs_max)
    if len(set(sizes)) != 1 or settings.n_ubatch % settings.n_seq_max:
        raise EngineRefusedError(
            "for embeddings n_batch, n_ubatch and n_outputs_max are one multiple of n_seq_max"
            f" {settings.n_seq_max}, not {', '.join(map(str, sizes))}"
        )
