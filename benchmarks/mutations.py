"""Seeded damage to small valid models: bytes of the file, or numbers of its description."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gguf_writer as gw
from benchmarks.gguf_writer import TensorLine, Typed
from loadmaster.model import quants

BOUNDARIES = (0, 1, 0x7F, 0xFF, 0xFFFF, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1,
              1 << 63, (1 << 64) - 1)  # fmt: skip
_SMALL = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256,
          257, 512, 513, 1000, 4096)  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 0.5, float("inf"), float("-inf"),
           float("nan"))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A valid small model: its description and, written out, its bytes."""

    name: str
    metadata: dict[str, Any]
    tensors: list[TensorLine]
    raw: bytes
    n_header: int


def bases(folder: Path, chunks: dict[str, bytes]) -> list[Base]:
    """The models to damage: llama in three tokenizer and weight forms, and a row of others."""
    from benchmarks.shapes import TINY

    models: list[tuple[str, Any, Any]] = []
    for tokenizer, type_name, n_expert in (
        ("spm", "f32", 0), ("bpe", "q8_0", 0), ("spm", "q4_0", 0), ("bpe", "f16", 4),
    ):  # fmt: skip
        name = f"llama-{tokenizer}-{type_name}-{n_expert}"
        model = gw.tiny_llama(tokenizer, type_name=type_name, n_expert=n_expert)
        models.append((name, *model))
    for name, describe in TINY.items():
        metadata, tensors = describe("q8_0")
        models.append((name, metadata, tensors))
    found = []
    for name, metadata, tensors in models:
        path = gw.write_random(folder / "base.gguf", metadata, tensors, chunks=chunks)
        n_header = len(gw.header(metadata, tensors))
        found.append(
            Base(
                name=name,
                metadata=dict(metadata),
                tensors=[TensorLine(*line) for line in tensors],
                raw=path.read_bytes(),
                n_header=n_header,
            )
        )
    return found


def mutant(models: list[Base], index: int, seed: int, path: Path, chunks: dict[str, bytes]) -> str:
    """Write mutant `index` of `seed` to `path`; the answer says what was done."""
    rng = random.Random(f"{seed}:{index}")
    # Two in three of the small llamas, whose files are written fastest.
    base = rng.choice(models[:4] if rng.random() < 0.67 else models)
    kind = rng.choices(("header", "described", "cut", "weights"), (60, 32, 4, 4))[0]
    if kind == "described":
        what = _described(base, rng, path, chunks)
    else:
        raw = bytearray(base.raw)
        what = {"header": _header_bytes, "cut": _cut, "weights": _weights}[kind](base, raw, rng)
        path.write_bytes(raw)
    return f"{base.name}: {what}"


def _header_bytes(base: Base, raw: bytearray, rng: random.Random) -> str:
    n_places = rng.randint(1, 16)
    for _ in range(n_places):
        at = rng.randrange(4, base.n_header - 8)
        _damage_one(raw, at, rng)
    return f"{n_places} places of the header"


def _damage_one(raw: bytearray, at: int, rng: random.Random) -> None:
    choice = rng.random()
    if choice < 0.4:
        raw[at] ^= 1 << rng.randrange(8)
    elif choice < 0.7:
        raw[at] = rng.randrange(256)
    else:
        size = rng.choice((4, 8))
        value = rng.choice(BOUNDARIES) & ((1 << (8 * size)) - 1)
        raw[at : at + size] = value.to_bytes(size, "little")


def _cut(base: Base, raw: bytearray, rng: random.Random) -> str:
    end = base.n_header if rng.random() < 0.5 else len(raw)
    length = rng.randrange(end)
    del raw[length:]
    return f"cut to {length} bytes"


def _weights(base: Base, raw: bytearray, rng: random.Random) -> str:
    n_places = rng.randint(1, 64)
    for _ in range(n_places):
        _damage_one(raw, rng.randrange(base.n_header, len(raw) - 8), rng)
    return f"{n_places} places of the weights"


def _described(base: Base, rng: random.Random, path: Path, chunks: dict[str, bytes]) -> str:
    metadata, tensors = dict(base.metadata), list(base.tensors)
    edits = rng.choices(_EDITS, k=rng.choice((1, 1, 2)))
    told = [edit(metadata, tensors, rng) for edit in edits]
    try:
        gw.write_random(path, metadata, tensors, chunks=chunks)
    except (struct.error, OverflowError, KeyError):
        path.write_bytes(base.raw[: base.n_header])  # not to be written: then cut instead
    return ", ".join(told)


def _set_number(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    keys = [k for k, v in metadata.items() if isinstance(v, int | float)]
    key = rng.choice(keys)
    old = metadata[key]
    if isinstance(old, bool):
        metadata[key] = not old
    elif isinstance(old, float):
        metadata[key] = rng.choice((*_FLOATS, old * 2))
    else:
        boundary = rng.choice(BOUNDARIES) & 0xFFFFFFFF
        value = rng.choice((rng.choice(_SMALL), boundary, old + 1, max(0, old - 1), old * 2))
        metadata[key] = Typed(gw.U32, value & 0xFFFFFFFF)
    return f"{key} {old} to {metadata[key]}"


def _retype(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    key = rng.choice(list(metadata))
    value = metadata[key]
    value = value.value if isinstance(value, Typed) else value
    choices: list[Any] = [Typed(kind, 1) for kind in (0, 1, 2, 3, 4, 5, 7, 10, 11)]
    choices += [Typed(gw.F32, 1.0), "text", [1, 2], Typed(gw.STRING, []), ["a", "b"]]
    metadata[key] = rng.choice(choices)
    return f"{key} as {metadata[key]}"


def _drop_key(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    key = rng.choice(list(metadata))
    del metadata[key]
    return f"without {key}"


def _add_key(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    arch = metadata.get("general.architecture", "llama")
    name = rng.choice((
        "nextn_predict_layers", "expert_count", "expert_used_count", "attention.key_length",
        "attention.value_length", "attention.sliding_window", "rope.scaling.type",
        "rope.scaling.factor", "rope.dimension_count", "rope.freq_base_swa", "pooling_type",
        "attention.causal", "embedding_length_out", "logit_scale", "ssm.conv_kernel",
        "attention.shared_kv_layers", "attention.sliding_window_pattern", "rope.dimension_sections",
        "leading_dense_block_count", "expert_group_count", "attention.key_length_swa",
    ))  # fmt: skip
    key = f"{arch}.{name}"
    metadata[key] = rng.choice((rng.choice(_SMALL), rng.choice(_SMALL), 0.5, True, "yarn",
                                [1, 2, 3, 4]))  # fmt: skip
    return f"{key} = {metadata[key]}"


def _table(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    keys = [k for k, v in metadata.items() if isinstance(getattr(v, "value", v), list | tuple)]
    keys = [k for k in keys if getattr(metadata[k], "value", metadata[k])]
    if not keys:
        return "no table"
    key = rng.choice(keys)
    kept = metadata[key]
    values = list(kept.value if isinstance(kept, Typed) else kept)
    at, other = rng.randrange(len(values)), rng.randrange(len(values))
    if isinstance(values[at], str):
        values[at] = rng.choice((values[other], "", "x", "\x7f", values[at] * 40, "<0x41>"))
    elif isinstance(values[at], bool):
        values[at] = not values[at]
    elif isinstance(values[at], float):
        values[at] = rng.choice(_FLOATS)
    else:
        values[at] = rng.choice((0, 1, 2, 6, 7, 100, 513))
    if rng.random() < 0.2:
        del values[at:]
    metadata[key] = Typed(kept.type, values) if isinstance(kept, Typed) else values
    return f"{key}[{at}]"


def _tensor_type(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    at = rng.randrange(len(tensors))
    tensors[at] = tensors[at]._replace(type=rng.choice(list(quants.BY_NAME)))
    return f"{tensors[at].name} as {tensors[at].type}"


def _tensor_shape(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    at = rng.randrange(len(tensors))
    shape = list(tensors[at].shape)
    choice = rng.random()
    if choice < 0.6:
        place = rng.randrange(len(shape))
        shape[place] = rng.choice((1, 32, 64, 128, 256, shape[place] + 1, shape[place] * 2))
    elif choice < 0.8:
        shape.reverse()
    elif len(shape) < 4:
        shape.append(rng.choice((1, 2)))
    tensors[at] = tensors[at]._replace(shape=tuple(shape))
    return f"{tensors[at].name} of shape {shape}"


def _tensor_name(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    at = rng.randrange(len(tensors))
    old = tensors[at].name
    other = rng.choice(tensors).name
    new = rng.choice((old + "x", other.replace("weight", "bias"), old.replace("blk.0", "blk.1")))
    tensors[at] = tensors[at]._replace(name=new)
    return f"{old} named {new}"


def _drop_tensor(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    return f"without {tensors.pop(rng.randrange(len(tensors))).name}"


def _add_tensor(metadata: dict[str, Any], tensors: list[TensorLine], rng: random.Random) -> str:
    like = rng.choice(tensors)
    name = like.name.removesuffix("weight") + rng.choice(("bias", "scale", "input_scale"))
    name = rng.choice((name, "rope_freqs.weight", "blk.0.attn_q_norm.weight", "output.bias"))
    shape = rng.choice(((1,), (8,), (16,), (64,), (like.shape[0],), (like.shape[-1],)))
    line = TensorLine(name, rng.choice(("f32", "f32", "f16", "i32")), shape)
    if all(line.name != one.name for one in tensors):
        tensors.append(line)
    return f"with {line}"


_Edit = Callable[[dict[str, Any], list[TensorLine], random.Random], str]
_EDITS: tuple[_Edit, ...] = (
    _set_number, _set_number, _set_number, _retype, _drop_key, _add_key, _add_key, _table,
    _tensor_type, _tensor_type, _tensor_shape, _tensor_name, _drop_tensor, _add_tensor,
)  # fmt: skip
