"""Which modules transformers makes for quantized matrices: registered as its own quantizers are."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from loadmaster.engine.backends.transformers.kept import TYPES
from loadmaster.engine.backends.transformers.making import (
    SUFFIX,
    FourBitsInParts,
    Fp8InParts,
    Int8InParts,
    n_tiles,
)
from loadmaster.engine.backends.transformers.packed import PARTS, PackedExperts, PackedLinear
from loadmaster.engine.backends.transformers.scaled import (
    DTYPES,
    SCALES,
    ScaledExperts,
    ScaledLinear,
    Sized,
)
from loadmaster.errors import EngineRefusedError
from loadmaster.model.checkpoint import CheckpointSpec, Stored
from loadmaster.plan.hf_weights import FP8_TILE, owner_of

_METHOD = "loadmaster"
_EXPERT = re.compile(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)$")
_GATES, _DOWNS = ("gate_proj", "w1"), ("down_proj", "w2")
_MADE = ("weight", "gate_up_proj", "down_proj")  # what is quantized while it loads
_FP8 = torch.float8_e4m3fn
_MARKS = (*SCALES, "qweight")  # what tells a quantized matrix
Table = Mapping[str, Sized]


class ScaledConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Says that matrices are those of `scaled` and `packed`: as a checkpoint has them, or made into
    FP8."""

    def __init__(self, model: CheckpointSpec, shuffled: frozenset[str] = frozenset()) -> None:
        """`shuffled` are the packed matrices whose columns are in another order than their
        groups."""
        self.quant_method = _METHOD
        self.model = model
        self.shuffled = shuffled


class ScaledQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the modules of `scaled` and `packed` in place, and fills them."""

    requires_calibration = False
    quantization_config: ScaledConfig

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Raises EngineRefusedError: tensors do not make the model's matrices."""
        spec = self.quantization_config.model
        tables = _tables(spec)
        experts = _experts(tables)
        self._biased = {t.module for t in spec.tensors if t.name.endswith(".bias")}
        left = set(self.get_modules_to_not_convert(model))
        for name, module in list(model.named_modules()):
            made = None
            with torch.device("meta"):
                if type(module) is nn.Linear:
                    made = self._linear(name, module, tables.get(name), name in left)
                elif name.endswith(".experts"):
                    layer = int(name.split(".layers.")[1].partition(".")[0])
                    made = self._experts(module, experts.get(layer))
            if made is not None:
                model.set_submodule(name, made)

    def _linear(
        self, name: str, linear: nn.Linear, table: Table | None, left: bool
    ) -> nn.Module | None:
        stored = self.quantization_config.model.stored
        if stored is not None:
            return self._stored_linear(name, linear, table, stored) if table else None
        if left:
            return None
        made: Table = {
            "weight": (_FP8, (linear.out_features, linear.in_features)),
            "weight" + SUFFIX: (torch.float32, n_tiles(*linear.weight.shape)),
        }
        return ScaledLinear(linear, made, FP8_TILE)

    def _stored_linear(
        self, name: str, linear: nn.Linear, table: Table, stored: Stored
    ) -> nn.Module:
        if "qweight" not in table:
            return ScaledLinear(linear, table, stored.block, stored.bits)
        in_order = name not in self.quantization_config.shuffled
        has_bias = name in self._biased
        return PackedLinear(linear, table, stored, in_order=in_order, has_bias=has_bias)

    def _experts(self, experts: nn.Module, tables: Mapping[str, Table] | None) -> nn.Module | None:
        stored = self.quantization_config.model.stored
        if stored is None:
            _, rows, columns = experts.down_proj.shape
            made = {
                "gate_up_proj": (torch.float32, n_tiles(columns, rows)),
                "down_proj": (torch.float32, n_tiles(rows, columns)),
            }
            return ScaledExperts(experts, SUFFIX, made, FP8_TILE)
        if tables is None:
            return None
        if any("qweight" in table for table in tables.values()):
            return self._packed_experts(experts, tables, stored)
        suffix, scales = _scales_of_experts(tables)
        # Converters of the family that stack weights then stack their scales alike.
        self.serialized_names = {"weight": ["weight", "weight" + suffix]}
        return ScaledExperts(experts, suffix, scales, stored.block or FP8_TILE)

    def _packed_experts(
        self, experts: nn.Module, tables: Mapping[str, Table], stored: Stored
    ) -> nn.Module:
        by_name = {
            name: next((tables[one] for one in names if one in tables), {})
            for name, names in (("gate_up_proj", _GATES), ("down_proj", _DOWNS))
        }
        biased = any(map(_EXPERT.match, self._biased))
        if biased or not all("qweight" in table for table in by_name.values()):
            raise EngineRefusedError(
                "experts of the checkpoint have biases, which the model has not"
                if biased
                else "of the experts' matrices some are packed and others are not",
                hint="take the unquantized checkpoint and `--quantize fp8`, or a GGUF of it",
            )
        in_order = not any(map(_EXPERT.match, self.quantization_config.shuffled))
        return PackedExperts(experts, by_name, stored, in_order=in_order)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Converters of the family that stack the experts' weights stack what they are packed
        into alike."""
        names = {name for name, _ in model.named_parameters()}
        found = super().update_weight_conversions(weight_conversions, model)
        for converter in weight_conversions:
            sources = getattr(converter, "_original_source_patterns", ())
            targets = getattr(converter, "_original_target_patterns", ())
            for part in PARTS:
                made = [f"{target}_{part}" for target in targets]
                if any(name.endswith(tuple(made)) for name in names):
                    stacked = [source.removesuffix("weight") + part for source in sources]
                    operations = list(converter.operations)
                    found.append(converter.copy(stacked, made, operations=operations))
        return list(found)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a tensor of the file is made into FP8."""
        if self.quantization_config.model.stored is not None:
            return False
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, ScaledLinear | ScaledExperts) and name in _MADE

    def get_quantize_ops(self) -> ConversionOps:
        return Fp8InParts()


def _tables(model: CheckpointSpec) -> dict[str, dict[str, Sized]]:
    """The modules that have scales, with the tensors of each but its bias."""
    found: dict[str, dict[str, Sized]] = {}
    for tensor in model.tensors if model.stored else ():
        name = tensor.name.rpartition(".")[2]
        if name != "bias":
            found.setdefault(tensor.module, {})[name] = (DTYPES[tensor.dtype], tensor.shape)
    return {name: table for name, table in found.items() if any(one in table for one in _MARKS)}


def _experts(tables: Mapping[str, Table]) -> dict[int, dict[str, Table]]:
    """By layer: the tables of its first expert, `gate` and `down` among them."""
    found: dict[int, dict[str, Table]] = {}
    for name, table in tables.items():
        match = _EXPERT.match(name)
        if match and match[2] == "0":
            found.setdefault(int(match[1]), {})[match[3]] = table
    return found


def _scales_of_experts(
    tables: Mapping[str, Table],
) -> tuple[str, dict[str, Sized]]:
    """How the scales of experts are called, and those of a gate and of a down matrix."""
    scales = {}
    for part, names in (("gate_up_proj", _GATES), ("down_proj", _DOWNS)):
        table = next((tables[name] for name in names if name in tables), {})
        scale = next((name for name in SCALES if name in table), "")
        if not scale or table.get("weight", (None,))[0] is not _FP8 or not table[scale][1]:
            raise EngineRefusedError(
                "experts are multiplied with in 16 bits or in FP8 with scales of their own, and "
                "those of the checkpoint are neither",
                hint="take the unquantized checkpoint and `--quantize fp8`, or a GGUF of it",
            )
        scales[part] = table[scale]
    return scale.removeprefix("weight"), scales


class _InParts8(Bnb8BitHfQuantizer):  # type: ignore[misc]
    """LLM.int8, a part of a matrix at a time."""

    def get_quantize_ops(self) -> ConversionOps:
        return Int8InParts(self)


class _InParts4(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """NF4 and FP4, a part of a matrix at a time."""

    def get_quantize_ops(self) -> ConversionOps:
        return FourBitsInParts(self)


def bitsandbytes_config(model: CheckpointSpec, compute_type: str) -> dict[str, Any]:
    """What transformers must know of a checkpoint of bitsandbytes: by its headers, not its config.

    Modules whose weights have no scales are left as they are.
    """
    stored = model.stored
    assert stored is not None
    scaled = {owner_of(tensor.name) for tensor in model.tensors if tensor.role == "statistic"}
    plain = {t.module for t in model.tensors if t.role in ("linear", "output")} - scaled
    if "lm_head" not in scaled:
        plain.add("lm_head")
    found = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": sorted(map(re.escape, plain))}
    if stored.method == "bnb8":
        return found | {"load_in_8bit": True}
    packed = next(t for t in model.tensors if t.module in scaled and t.role == "linear")
    return found | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4" if stored.fp4 else "nf4",
        "bnb_4bit_use_double_quant": stored.double_quant,
        "bnb_4bit_compute_dtype": TYPES[compute_type],
        "bnb_4bit_quant_storage": DTYPES[packed.dtype],
    }


def register() -> None:
    """Have transformers take these; once in a process, or again."""
    auto.AUTO_QUANTIZER_MAPPING.update({
        _METHOD: ScaledQuantizer, "bitsandbytes_8bit": _InParts8, "bitsandbytes_4bit": _InParts4,
    })  # fmt: skip
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = ScaledConfig
