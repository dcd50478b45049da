"""What a checkpoint is already quantized to: `quantization_config` of its config.json. Pure."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from loadmaster.model.checkpoint import Method, Stored
from loadmaster.model.damage import damaged, quoted, refused

_KEY = "quantization_config"
# Formats of compressed-tensors that the engine writes out, each with its kinds of weights.
_WRITTEN_OUT = {
    "float-quantized": ("FP8",), "int-quantized": ("INT8",), "naive-quantized": ("FP8", "INT8"),
    "pack-quantized": ("INT4", "INT8"),
}  # fmt: skip


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


def _named(method: Method, name: str) -> "_Reader":
    """Of products that another library would have to bring."""

    def stored(found: Mapping[str, Any], label: str) -> Stored:
        bits = found.get("bits")
        if type(bits) is not int or not 1 <= bits <= 8:
            return Stored(method=method, label=name, bits=4, runs=False)
        return Stored(method=method, label=f"{name} {bits}-bit", bits=bits, runs=False)

    return stored


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
    "gptq": _named("gptq", "GPTQ"),
    "awq": _named("awq", "AWQ"),
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fbgemm,
}
