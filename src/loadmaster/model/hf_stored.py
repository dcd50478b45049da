"""What a checkpoint is already quantized to: `quantization_config` of its config.json. Pure."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loadmaster.model.checkpoint import Method, Stored
from loadmaster.model.damage import damaged, quoted, refused

_KEY = "quantization_config"
# Formats of compressed-tensors that the engine writes out, each with its kinds of weights.
_WRITTEN_OUT = {
    "float-quantized": ("FP8",), "int-quantized": ("INT8",), "naive-quantized": ("FP8", "INT8"),
    "pack-quantized": ("INT4", "INT8"),
}  # fmt: skip
_GPTQ_BITS = (2, 4, 8)  # of these a word holds a whole number
_GROUP_SIZE = 128  # of GPTQ and AWQ, where nothing is said


def stored_of(config: Mapping[str, Any], label: str) -> Stored | None:
    """None: it is not quantized.

    Raises:
        DamagedFileError: it is, in a way that is not planned, or it is pruned as well.
    """
    found = config.get(_KEY) or config.get("compression_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise damaged("bad_config", label, _KEY, "not an object", "an object")
    sparse = found.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise refused(
            "pruned",
            f"{label} is of a pruned checkpoint (`sparsity_config`)",
            hint="take the model it was pruned from, quantized: `--quantize nf4`",
        )
    method = _METHODS.get(str(found.get("quant_method")), _unknown_method)
    return method(found, label)


def _bitsandbytes(found: Mapping[str, Any], label: str) -> Stored:
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return Stored(method="bnb8", label="INT8")
    fp4 = found.get("bnb_4bit_quant_type", "fp4") != "nf4"
    return Stored(
        method="bnb4",
        label="FP4" if fp4 else "NF4",
        fp4=fp4,
        bits=4,
        double_quant=found.get("bnb_4bit_use_double_quant") is True,
    )


def _fp8(found: Mapping[str, Any], label: str) -> Stored:
    block = _block(found.get("weight_block_size"), "weight_block_size", label)
    return Stored(method="fp8", label="FP8", block=block)


def _fbgemm(found: Mapping[str, Any], label: str) -> Stored:
    """As Meta ships the 405B: a scale for each row of the matrices of the feed-forward."""
    return Stored(method="fbgemm-fp8", label="FP8")


def _block(value: object, name: str, label: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(
        type(one) is int and 0 < one < 1 << 16 for one in value
    ):  # fmt: skip
        raise damaged("bad_config", label, name, quoted(str(value)), "two numbers")
    return (value[0], value[1])


def _compressed(found: Mapping[str, Any], label: str) -> Stored:
    """One kind of matrices; where groups differ, or a format is another, there is no product."""
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise damaged("bad_config", label, "config_groups", "missing", "an object of groups")
    kinds = {_compressed_kind(group, label) for group in groups.values()}
    name = str(found.get("format"))
    bits, kind, block = kinds.pop() if len(kinds) == 1 else (4, "mixed", None)
    return Stored(
        method="compressed-tensors",
        label=f"compressed-tensors {kind}",
        bits=bits,
        block=block,
        # Rotations of activations (`transform_config`) are products that nobody makes here.
        runs=kind in _WRITTEN_OUT.get(name, ()) and not found.get("transform_config"),
    )


def _compressed_kind(group: object, label: str) -> tuple[int, str, tuple[int, int] | None]:
    """Bits, name and shared elements of one group of matrices."""
    weights = group.get("weights") if isinstance(group, dict) else None
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or type(bits) is not int or not 1 <= bits <= 16:
        raise damaged("bad_config", label, "config_groups", "no weights", "`weights.num_bits`")
    name = ("FP" if weights.get("type") == "float" else "INT") + str(bits)
    size = weights.get("group_size")
    if weights.get("strategy") == "group" and type(size) is int and 0 < size < 1 << 16:
        return bits, name, (1, size)
    return bits, name, _block(weights.get("block_structure"), "block_structure", label)


def _gptq(found: Mapping[str, Any], label: str) -> Stored:
    """Version 1 stores what stands for zero less one; `gptqmodel` writes version 2 as well."""
    version = str(found.get("checkpoint_format") or found.get("format") or "gptq").lower()
    rules = found.get("dynamic") or {}  # for single modules; `-:` leaves them unquantized
    plain = isinstance(rules, dict) and all(str(name).startswith("-:") for name in rules)
    return replace(
        _packed("gptq", "GPTQ", found, label),
        runs=found.get("bits") in _GPTQ_BITS
        and version in ("gptq", "gptq_v2")
        and str(found.get("pack_dtype") or "int32") == "int32"
        and not any(found.get(name) for name in ("is_marlin_format", "rotation", "activation"))
        and plain,
        zeros_less_one=version != "gptq_v2",
        act_order=found.get("desc_act") is True,
    )


def _awq(found: Mapping[str, Any], label: str) -> Stored:
    """`gemm` is how nearly all are packed; `gemv` and others are for single kernels."""
    version = str(found.get("version") or found.get("format") or "gemm").lower()
    names = {"bits": found.get("w_bit"), "group_size": found.get("q_group_size")}
    found = {name: value for name, value in names.items() if value is not None} | dict(found)
    return replace(
        _packed("awq", "AWQ", found, label),
        runs=found.get("bits") == 4 and version == "gemm" and found.get("zero_point") is not False,
    )


def _packed(method: Method, name: str, found: Mapping[str, Any], label: str) -> Stored:
    """Small integers in words of 32 bits; a group size of -1 is a whole row."""
    if found.get("lm_head") is True:
        raise refused(
            "unknown_quantization",
            f"{label}: checkpoints whose output (`lm_head`) is packed are not planned",
            hint="take the unquantized checkpoint and `--quantize nf4`, or a GGUF of it",
        )
    bits, size = found.get("bits"), found.get("group_size", _GROUP_SIZE)
    if type(size) is not int or not (size == -1 or 0 < size < 1 << 16):
        raise damaged("bad_config", label, "group_size", quoted(str(size)), "-1 or 1–65535")
    block = (1, size) if size > 0 else None
    if type(bits) is not int or not 1 <= bits <= 8:
        return Stored(method=method, label=name, bits=4, block=block)
    return Stored(method=method, label=f"{name} {bits}-bit", bits=bits, block=block)


def _unknown_method(found: Mapping[str, Any], label: str) -> Stored:
    name = re.sub(r"[^\w.-]", "?", str(found.get("quant_method")))[:32]
    raise refused(
        "unknown_quantization",
        f"{label}: checkpoints quantized with `{name}` are not planned",
        hint="take the unquantized checkpoint and `--quantize nf4`, or a GGUF of it",
    )


_Reader = Callable[[Mapping[str, Any], str], Stored]
_METHODS: Mapping[str, _Reader] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fbgemm,
}
