"""From a checkpoint's files to a model of transformers: read tensor by tensor, placed as planned.

The files are read here, by offsets that were checked: one tensor is in memory at a time beside the
model, nothing is mapped, and nothing of the folder but its weights and its config is looked at.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from transformers import core_model_loading
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers import AutoHfQuantizer

from loadmaster.engine.backends.transformers import attention, cuda
from loadmaster.engine.backends.transformers.filled import check_found, check_scales
from loadmaster.engine.backends.transformers.kept import TYPES
from loadmaster.engine.backends.transformers.packed import shuffled
from loadmaster.engine.backends.transformers.quantizers import (
    ScaledConfig,
    bitsandbytes_config,
    register,
)
from loadmaster.engine.backends.transformers.scaled import DTYPES
from loadmaster.errors import EngineRefusedError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_config import CODE_KEYS
from loadmaster.model.safetensors import ShardHeader, StoredTensor, parse_header
from loadmaster.plan.hf_weights import written_out_in_parts
from loadmaster.plan.types import CPU, TransformersSettings

Watch = Callable[[int], None]  # bytes that were read; raises to stop the load

# Beside the fields of its own class: older spellings that transformers translates, and what some
# families read without declaring it.
_MORE_KEYS = frozenset({
    "head_dim",
    "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_pct", "partial_rotary_factor",
    "sliding_window_pattern", "_sliding_window_pattern", "torch_dtype", "architectures",
    "use_sliding_window", "tie_word_embeddings",
})  # fmt: skip


class StoredWeight:
    """One tensor of a file, read when it is indexed: what transformers takes for a tensor."""

    def __init__(self, path: Path, data_start: int, tensor: StoredTensor, watch: Watch) -> None:
        self._path, self._start, self._tensor, self._watch = path, data_start, tensor, watch

    def get_dtype(self) -> str:
        return self._tensor.dtype

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, _: object) -> Any:
        """All of it: transformers slices with `...` only where nothing is split over processes."""
        tensor = self._tensor
        data = torch.empty(tensor.size_bytes, dtype=torch.uint8)
        with self._path.open("rb") as file:
            _fill(file.fileno(), memoryview(data.numpy()), self._start + tensor.begin, self._path)
        self._watch(tensor.size_bytes)
        return data.view(DTYPES[tensor.dtype]).view(tensor.shape)


def _fill(descriptor: int, room: memoryview, offset: int, path: Path) -> None:
    at = 0
    while at < len(room):
        n = os.preadv(descriptor, [room[at:]], offset + at)
        if n == 0:
            raise EngineRefusedError(f"`{path.name}` has become shorter while it was read")
        at += n


def open_weights(model: CheckpointSpec, watch: Watch) -> dict[str, StoredWeight]:
    """Every tensor of the checkpoint by name, nothing of it read.

    Raises:
        EngineRefusedError: a tensor has a type that torch does not have.
    """
    found = {}
    for path in (stamp.path for stamp in model.files if stamp.path.suffix == ".safetensors"):
        header = _header(path)
        for tensor in header.tensors:
            if tensor.dtype not in DTYPES:
                raise EngineRefusedError(f"`{tensor.name}` is of type {tensor.dtype}")
            found[tensor.name] = StoredWeight(path, header.header_bytes, tensor, watch)
    return found


def _header(path: Path) -> ShardHeader:
    with path.open("rb") as file:
        descriptor = file.fileno()
        size_bytes = os.fstat(descriptor).st_size
        return parse_header(
            lambda offset, length: os.pread(descriptor, length, offset), size_bytes, path.name
        )


def clean_config(folder: Path) -> Any:
    """The checkpoint's config as an object of transformers, of keys that its class knows.

    Raises:
        EngineRefusedError: transformers refuses a value of it.
    """
    raw: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    config_class = transformers.CONFIG_MAPPING[raw["model_type"]]
    names = config_class.attribute_map
    fields = (*config_class.__dataclass_fields__, *names.keys(), *names.values())
    known = {name for name in fields if not name.startswith("_")}
    allowed = (known | _MORE_KEYS) - {*CODE_KEYS, "model_type", "name_or_path"}
    try:
        return config_class(**{key: value for key, value in raw.items() if key in allowed})
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineRefusedError(f"transformers refuses config.json: {reason}") from None


def check_settings(model: CheckpointSpec, settings: TransformersSettings) -> None:
    """Raises EngineRefusedError: what is asked cannot be done, or not on these devices."""
    used = {device for _, device in settings.device_map}
    if "disk" in used:
        raise EngineRefusedError("weights on the disk are not supported: they would be read anew "
                                 "for each token")  # fmt: skip
    cuda.check_present(used)
    if model.stored is not None and settings.quantize != "none":
        raise EngineRefusedError(
            f"`{model.name}` is quantized already ({model.stored.label}): it is loaded as it is",
            hint="leave `--quantize` out, or take the unquantized checkpoint",
        )
    if model.stored is not None and not model.stored.runs:
        raise EngineRefusedError(
            f"`{model.name}` is {model.stored.label}, which needs kernels that are not here",
            hint="take the unquantized checkpoint and `--quantize nf4`, or a GGUF of it",
        )
    if settings.pooling is None and not model.writes_text:
        raise EngineRefusedError(
            f"`{model.name}` writes no text: it was saved without `lm_head`, for vectors alone",
            hint="plan it again: `loadmaster plan` plans it for vectors",
        )
    if settings.attention == "flash_attention_2":
        raise EngineRefusedError(
            "flash_attention_2 is not used: `sdpa` runs torch's own flash kernels where the "
            "hardware has them",
            hint="leave it out, or take `sdpa`",
        )


def load_weights(model: CheckpointSpec, settings: TransformersSettings, watch: Watch) -> Any:
    """The model, ready for steps.

    Raises:
        EngineRefusedError: files and config do not make one, or there is no memory for it.
    """
    config = clean_config(model.folder)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None or not getattr(cls, "_supports_attention_backend", False):
        raise EngineRefusedError(
            f"`{model.architecture}` is a model that transformers runs in a way of its own"
        )
    register()
    if not model.writes_text:  # its class wants an output: the embedding, which takes no memory
        config.tie_word_embeddings = True
    if model.stored is not None and model.stored.method in ("bnb4", "bnb8"):
        config.quantization_config = bitsandbytes_config(model, settings.compute_type)
    order = shuffled(model, open_weights(model, lambda _: None))
    with _errors_as_they_come():
        opened, found = cls.from_pretrained(
            None,
            config=config,
            state_dict=open_weights(model, watch),
            dtype=TYPES[settings.compute_type],
            device_map=_devices(settings),
            quantization_config=_quantization(model, settings, order),
            attn_implementation=attention.NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_found` says which
        )
    _move_between_layers_alone(opened, settings)
    if not model.writes_text:
        opened.lm_head = torch.nn.Identity()
        found["missing_keys"] = {k for k in found["missing_keys"] if not k.startswith("lm_head.")}
    check_found(found)
    check_scales(opened)
    return opened.requires_grad_(False)


@contextmanager
def _errors_as_they_come() -> Iterator[None]:
    """transformers keeps what fails while it makes a tensor, goes on with the next ones, and says
    at the end that something did: memory that has run out would be read about nowhere."""
    kept = core_model_loading.log_conversion_errors
    core_model_loading.log_conversion_errors = lambda *_, **__: _as_value_errors()
    try:
        yield
    finally:
        core_model_loading.log_conversion_errors = kept


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """What libraries come upon in tensors that do not belong together."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _move_between_layers_alone(model: Any, settings: TransformersSettings) -> None:
    """What the map names is one device's, and is given its inputs there. accelerate looks again
    before every matrix inside: 0.10 ms a layer that takes 0.20 (a Llama of 64 columns)."""
    if len(settings.device_map) == 1:
        return
    for name, device in settings.device_map:
        block = model.get_submodule(name)
        for module in block.modules() if device != CPU else ():
            if module is not block:
                remove_hook_from_module(module)


def _devices(settings: TransformersSettings) -> dict[str, Any]:
    """The map as accelerate takes it: beside GPUs it knows the CPU by its name alone, and sends its
    weights to a GPU for every product."""
    found = {name: cuda.torch_device(device) for name, device in settings.device_map}
    if len(set(found.values())) == 1:
        return found
    return {name: "cpu" if one.type == "cpu" else one for name, one in found.items()}


def _quantization(
    model: CheckpointSpec, settings: TransformersSettings, order: frozenset[str] = frozenset()
) -> Any:
    """What transformers is to make of the matrices while it loads them."""
    name = settings.quantize
    if written_out_in_parts(model, settings):
        return ScaledConfig(model, order)
    if name == "none":
        return None
    # Beside a GPU, modules on the CPU are kept as they are: the plan has them so.
    mixed = len({device for _, device in settings.device_map}) > 1
    if name == "int8":
        return transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=mixed
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=TYPES[settings.compute_type],
        llm_int8_enable_fp32_cpu_offload=mixed,
    )


def quantizer_of(model: CheckpointSpec, settings: TransformersSettings) -> Any:
    """What transformers replaces modules with before a load of a checkpoint that is not quantized:
    for who counts what it makes."""
    register()
    return AutoHfQuantizer.from_config(_quantization(model, settings), pre_quantized=False)


def tensors_of(model: Any) -> Iterator[Any]:
    """Every tensor that the model holds: parameters, buffers, and what quantization keeps."""
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            yield from _inside(value)
        for value in vars(module).values():
            yield from _inside(value)
        # Of a matrix in 8 bits, bitsandbytes moves values and scales there at its first use.
        yield from _eight_bits(getattr(module, "state", None))
        # Weights of the CPU that are sent to a GPU lie with accelerate's hook.
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for value in (getattr(getattr(kept, "dataset", None), "state_dict", None) or {}).values():
            yield from _inside(value)


def _inside(value: Any) -> Iterator[Any]:
    if not isinstance(value, torch.Tensor):
        return
    yield value
    yield from _parts(getattr(value, "quant_state", None))
    yield from _eight_bits(value)


def _eight_bits(holder: Any) -> Iterator[Any]:
    """Values and scales; what else is there belongs to one step."""
    for name in ("CB", "SCB"):
        yield from _inside(getattr(holder, name, None))


def _parts(state: Any) -> Iterator[Any]:
    """The scales and tables of a matrix in four bits."""
    if state is None:
        return
    yield from _inside(state.absmax)
    yield from _inside(state.code)
    yield from _inside(state.offset)
    yield from _parts(state.state2)


def bytes_by_device(model: Any) -> dict[str, int]:
    """What the model's tensors take, by torch's names of devices; shared storage counts once."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in tensors_of(model):
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.device.type != "meta":
            sizes[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    sums: dict[str, int] = {}
    for (device, _), n_bytes in sizes.items():
        sums[device] = sums.get(device, 0) + n_bytes
    return sums
