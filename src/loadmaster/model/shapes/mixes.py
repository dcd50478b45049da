"""Which type each tensor gets in a quantization, by the rules of llama-quantize.

Source: `llama_tensor_get_type_impl`, `tensor_type_fallback` and `llama_ftype_get_default_type` of
src/llama-quant.cpp, llama.cpp 0c1e57098, without `--tensor-type` and for the architectures of
`families`. Mixes of 3 bits and less are those made with an importance matrix, as published files
are (and as the engine demands below IQ3_XXS).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadmaster.model.quants import BY_NAME
from loadmaster.model.shapes.types import Dims, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A quantization by its label: `general.file_type` and the type that most tensors get."""

    file_type: int
    base: str


# From the most bits to the fewest. Source: enum llama_ftype of llama.h, quantize.cpp for the names.
MIXES: Mapping[str, Mix] = {
    "F16": Mix(file_type=1, base="f16"),
    "BF16": Mix(file_type=32, base="bf16"),
    "Q8_0": Mix(file_type=7, base="q8_0"),
    "Q6_K": Mix(file_type=18, base="q6_K"),
    "Q5_K_M": Mix(file_type=17, base="q5_K"),
    "Q5_K_S": Mix(file_type=16, base="q5_K"),
    "Q4_K_M": Mix(file_type=15, base="q4_K"),
    "Q4_K_S": Mix(file_type=14, base="q4_K"),
    "Q4_0": Mix(file_type=2, base="q4_0"),
    "IQ4_NL": Mix(file_type=25, base="iq4_nl"),
    "IQ4_XS": Mix(file_type=30, base="iq4_xs"),
    "MXFP4": Mix(file_type=38, base="q8_0"),  # what is not an expert is Q8_0
    "Q3_K_L": Mix(file_type=13, base="q3_K"),
    "Q3_K_M": Mix(file_type=12, base="q3_K"),
    "Q3_K_S": Mix(file_type=11, base="q3_K"),
    "IQ3_M": Mix(file_type=27, base="iq3_s"),
    "IQ3_S": Mix(file_type=26, base="iq3_s"),
    "IQ3_XS": Mix(file_type=22, base="iq3_s"),
    "IQ3_XXS": Mix(file_type=23, base="iq3_xxs"),
    "Q2_K": Mix(file_type=10, base="q2_K"),
    "IQ2_M": Mix(file_type=29, base="iq2_s"),
    "IQ2_S": Mix(file_type=28, base="iq2_xs"),
    "IQ2_XS": Mix(file_type=20, base="iq2_xs"),
    "IQ2_XXS": Mix(file_type=19, base="iq2_xxs"),
    "IQ1_M": Mix(file_type=31, base="iq1_m"),
    "IQ1_S": Mix(file_type=24, base="iq1_s"),
}
_WHOLE = frozenset({"F16", "BF16", "Q8_0", "MXFP4"})  # one type for every matrix
_LOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_IQ2_SM = frozenset({"IQ2_S", "IQ2_M"})
_MANY_HEADS = 4  # query heads of a KV head from which attn_v is small enough for more bits
# Architectures whose model with 80 layers the engine calls a 70B (LLM_TYPE_70B).
_HAS_70B = frozenset({"llama", "qwen2"})
_70B_LAYERS = 80
_8_EXPERTS = 8

# Where a row is no multiple of the block (tensor_type_fallback).
_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"),
                    "iq4_nl"),
    "q2_K": "q4_0", "q3_K": "q4_0", "q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A tensor among those of its kind: the counters of quantize_state_impl."""

    index: int
    count: int

    @property
    def more_bits(self) -> bool:
        """use_more_bits: the first and the last eighth, and every third between them."""
        eighth = self.count // 8
        return (
            self.index < eighth
            or self.index >= 7 * self.count // 8
            or (self.index - eighth) % 3 == 2
        )

    def first(self, part: int) -> bool:
        """Whether it is in the first 1/`part`."""
        return self.index < self.count // part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What the rules ask of a model."""

    mix: str
    n_gqa: int
    n_expert: int
    is_70b: bool
    tied: bool

    @property
    def base(self) -> str:
        return MIXES[self.mix].base

    @property
    def many_heads(self) -> bool:
        return self.n_gqa >= _MANY_HEADS


def typed(
    tensors: Sequence[Tensor], dims: Dims, architecture: str, mix: str
) -> Iterator[tuple[Tensor, str]]:
    """Every tensor with the name of its type, in the order of the file."""
    model = _Model(
        mix=mix,
        n_gqa=dims.n_head // dims.n_head_kv,
        n_expert=dims.n_expert,
        is_70b=architecture in _HAS_70B
        and dims.n_layer == _70B_LAYERS
        and dims.n_head != dims.n_head_kv,
        tied=dims.tied,
    )
    places = _places(tensors, dims)
    for tensor in tensors:
        if tensor.fixed is not None:
            yield tensor, tensor.fixed
            continue
        chosen = model.base
        if mix not in _WHOLE:
            chosen = _chosen(model, tensor.name, places.get(tensor.name))
        yield tensor, _fitting(chosen, tensor.shape[0])


def _places(tensors: Sequence[Tensor], dims: Dims) -> dict[str, _Place]:
    """attn_v by its rank among all of them, ffn_down by its layer.

    With experts the engine reads the layer off the name; without, every layer has one ffn_down.
    """
    values = [t.name for t in sorted(tensors, key=lambda t: t.layer) if _is_value(t.name)]
    places = {name: _Place(index=i, count=len(values)) for i, name in enumerate(values)}
    for tensor in tensors:
        if tensor.layer >= 0 and "ffn_" in tensor.name:
            places[tensor.name] = _Place(index=tensor.layer, count=dims.n_layer)
    return places


def _is_value(name: str) -> bool:
    return name.endswith("attn_v.weight")


def _fitting(name: str, row: int) -> str:
    quant = BY_NAME[name]
    if row % quant.block_size == 0:
        return name
    fallback = _FALLBACK.get(name, name)
    return fallback if row % BY_NAME[fallback].block_size == 0 else "f16"


def _chosen(model: _Model, name: str, place: _Place | None) -> str:
    """llama_tensor_get_type_impl: one rule for each kind of tensor."""
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        return _output(model)
    if name == "token_embd.weight":
        return _EMBEDDING.get(model.mix, model.base)
    rules = _LOW_RULES if model.mix in _LOW else _RULES
    part = name.split(".")[2] if name.startswith("blk.") else name
    for prefix, rule in rules.items():
        if part.startswith(prefix):
            return rule(model, place or _Place(index=0, count=1))
    return model.base


def _output(model: _Model) -> str:
    if model.mix in _LOW or model.mix == "IQ3_XXS":
        return "q5_K"
    return "q6_K"


_EMBEDDING = {
    "IQ1_S": "q2_K", "IQ1_M": "q2_K", "IQ2_XXS": "q2_K", "IQ2_XS": "q2_K",
    "IQ2_S": "iq3_s", "IQ2_M": "iq3_s", "IQ3_XXS": "iq3_s",
}  # fmt: skip


# ---- two bits and less


def _low_value(model: _Model, place: _Place) -> str:
    if model.many_heads or model.n_expert >= _MANY_HEADS:
        return "q4_K"
    return "iq3_s" if model.mix in _IQ2_SM else "q2_K"


def _low_key(model: _Model, place: _Place) -> str:
    return "q4_K" if model.n_expert == _8_EXPERTS else model.base


def _low_down(model: _Model, place: _Place) -> str:
    if not place.first(8):
        return model.base
    return "iq3_s" if model.mix in _IQ2_SM else "q2_K"


def _low_attn_output(model: _Model, place: _Place) -> str:
    if model.n_expert == _8_EXPERTS:
        return "q5_K"
    if model.mix in ("IQ1_S", "IQ1_M"):
        return "iq2_xxs"
    return "iq3_s" if model.mix in _IQ2_SM else model.base


# ---- more than two bits


def _value(model: _Model, place: _Place) -> str:
    if model.n_expert == _8_EXPERTS:
        return "q8_0"
    chosen = _value_of_mix(model, place)
    return "q5_K" if model.is_70b and chosen in ("q3_K", "q4_K") else chosen


def _value_of_mix(model: _Model, place: _Place) -> str:
    match model.mix:
        case "Q2_K":
            return "q4_K" if model.many_heads else "q3_K"
        case "IQ3_XXS":
            return "q4_K" if model.many_heads else model.base
        case "IQ3_XS" | "IQ3_S":
            return "q4_K" if model.many_heads else model.base
        case "IQ3_M":
            return "q4_K"
        case "Q3_K_M":
            return "q5_K" if place.index < 2 else "q4_K"
        case "Q3_K_L":
            return "q5_K"
        case "IQ4_NL" | "IQ4_XS":
            return "q5_K" if model.many_heads else model.base
        case "Q4_K_M" | "Q5_K_M":
            return "q6_K" if place.more_bits else model.base
        case "Q4_K_S":
            return "q5_K" if place.index < 4 else model.base
    return model.base


def _key(model: _Model, place: _Place) -> str:
    if model.n_expert == _8_EXPERTS:
        return "q8_0"
    return _query(model, place)


def _query(model: _Model, place: _Place) -> str:
    return {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}.get(model.mix, model.base)


def _down(model: _Model, place: _Place) -> str:
    match model.mix:
        case "Q2_K":
            return "q3_K"
        case "Q3_K_M":
            return "q5_K" if place.first(16) else "q4_K"
        case "IQ3_M":
            more = model.n_expert == _8_EXPERTS and place.more_bits
            return "q4_K" if place.first(8) or more else model.base
        case "Q3_K_L":
            return "q5_K"
        case "Q4_K_M" | "Q5_K_M":
            return "q6_K" if place.more_bits else model.base
        case "Q4_K_S":
            return "q5_K" if place.first(8) else model.base
    return model.base


_ATTN_OUTPUT_8 = frozenset({"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S",
                            "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"})  # fmt: skip
_ATTN_OUTPUT = {"Q2_K": "q3_K", "IQ3_XXS": "iq3_s", "Q3_K_M": "q4_K", "Q3_K_L": "q5_K",
                "IQ3_M": "q4_K"}  # fmt: skip


def _attn_output(model: _Model, place: _Place) -> str:
    if model.n_expert == _8_EXPERTS:
        return "q5_K" if model.mix in _ATTN_OUTPUT_8 else model.base
    return _ATTN_OUTPUT.get(model.mix, model.base)


def _gate_up(model: _Model, place: _Place) -> str:
    inside = place.count // 8 <= place.index < 7 * place.count // 8
    return "iq3_xxs" if model.mix == "IQ3_XS" and inside else model.base


_Rule = Callable[[_Model, _Place], str]
# By the beginning of a tensor's name inside its layer; `attn_v_b` of MLA is none of them.
_LOW_RULES: Mapping[str, _Rule] = {
    "attn_output": _low_attn_output, "attn_v_b": lambda model, _: model.base, "attn_v": _low_value,
    "attn_k_b": lambda model, _: model.base, "attn_kv": lambda model, _: model.base,
    "attn_k": _low_key, "ffn_down": _low_down,
}  # fmt: skip
_RULES: Mapping[str, _Rule] = {
    "attn_output": _attn_output, "attn_v_b": lambda model, _: model.base, "attn_v": _value,
    "attn_k_b": lambda model, _: model.base, "attn_kv": lambda model, _: model.base,
    "attn_k": _key, "attn_q": _query, "ffn_down": _down, "ffn_gate": _gate_up, "ffn_up": _gate_up,
}  # fmt: skip
