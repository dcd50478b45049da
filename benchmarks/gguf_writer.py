"""Writes GGUF files for tests and benchmarks: tiny valid ones, header-only ones, random weights.

A model is a description: metadata and a list of tensors. From one description:

    header(metadata, tensors)                  the header's bytes
    write_sparse(path, metadata, tensors)      header and a hole of the full size (no disk used)
    write_random(path, metadata, tensors)      header and seeded random weights, finite and small
    write_split(folder, stem, metadata, tensors, n_shards)

Metadata values are plain: an int is u32 (i32, u64 or i64 where it must be), a float f32, a list an
array; `Typed` says another type. The writer checks nothing: damaged files are written with it too.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loadmaster.model.quants import BY_NAME
from loadmaster.model.types import QuantType
from loadmaster.units import align

ALIGNMENT = 32
(U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64) = range(13)
_FORMAT = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
           U64: "Q", I64: "q", F64: "d"}  # fmt: skip
# Random blocks made once and repeated: weights need not be all different. Their number is a prime:
# no two rows are alike, for of two equal logits an engine may take either.
_CHUNK_BLOCKS = 32749


class Typed(NamedTuple):
    """A metadata value with its GGUF type; for arrays the type of the elements."""

    type: int
    value: Any


class TensorLine(NamedTuple):
    """One row of the tensor table; `shape` has the row length first."""

    name: str
    type: str  # a name of `loadmaster.model.quants`
    shape: tuple[int, ...]

    @property
    def quant(self) -> QuantType:
        return BY_NAME[self.type]

    @property
    def size_bytes(self) -> int:
        n = 1
        for dim in self.shape:
            n *= dim
        return n // self.quant.block_size * self.quant.block_bytes


Metadata = Mapping[str, Any]


def header(
    metadata: Metadata,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    version: int = 3,
    order: str = "<",
) -> bytes:
    """The whole header, padded to the start of the tensor data; `order` ">" is big-endian."""
    lines = [TensorLine(*tensor) for tensor in tensors]
    alignment = _alignment(metadata)
    parts = [b"GGUF", struct.pack(order + "IQQ", version, len(lines), len(metadata))]
    for key, value in metadata.items():
        parts += [string(key, order), _entry(value, order)]
    offset = 0
    for line in lines:
        parts.append(tensor_entry(line.name, line.quant.ggml_id, line.shape, offset, order))
        offset += align(line.size_bytes, alignment)
    raw = b"".join(parts)
    return raw.ljust(align(len(raw), alignment), b"\0")


def string(text: str | bytes, order: str = "<") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(order + "Q", len(raw)) + raw


def tensor_entry(
    name: str | bytes, type_id: int, shape: Sequence[int], offset: int, order: str = "<"
) -> bytes:
    shape_bytes = struct.pack(f"{order}I{len(shape)}Q", len(shape), *shape)
    return string(name, order) + shape_bytes + struct.pack(order + "iQ", type_id, offset)


def _alignment(metadata: Metadata) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    value = value.value if isinstance(value, Typed) else value
    return value if isinstance(value, int) and value > 0 else ALIGNMENT


def _entry(value: object, order: str) -> bytes:
    """The type and the bytes of a metadata value."""
    kind, plain = value if isinstance(value, Typed) else (None, value)
    if isinstance(plain, list | tuple):
        kind = _type_of(plain) if kind is None else kind
        return struct.pack(order + "IIQ", ARRAY, kind, len(plain)) + _elements(kind, plain, order)
    kind = _type_of([plain]) if kind is None else kind
    return struct.pack(order + "I", kind) + _elements(kind, [plain], order)


def _elements(kind: int, values: Sequence[Any], order: str) -> bytes:
    if kind == STRING:
        return b"".join([string(text, order) for text in values])
    return struct.pack(f"{order}{len(values)}{_FORMAT[kind]}", *values)


def _type_of(values: Sequence[object]) -> int:
    first = values[0] if values else 0
    if isinstance(first, bool):
        return BOOL
    if isinstance(first, str | bytes):
        return STRING
    if isinstance(first, float):
        return F32
    numbers = [value for value in values if isinstance(value, int)]
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low < 0:
        return I32 if low >= -(1 << 31) and high < 1 << 31 else I64
    return U32 if high < 1 << 32 else U64


def write_sparse(
    path: Path, metadata: Metadata, tensors: Sequence[tuple[str, str, tuple[int, ...]]]
) -> Path:
    """Write the header and let the file end where the last tensor would."""
    raw = header(metadata, tensors)
    alignment = _alignment(metadata)
    data_bytes = sum(align(TensorLine(*line).size_bytes, alignment) for line in tensors)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + data_bytes)
    return path


def write_random(
    path: Path,
    metadata: Metadata,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    seed: int = 0,
    chunks: dict[str, bytes] | None = None,
) -> Path:
    """Write the header and seeded random weights of the right types, with small block scales.

    `chunks` keeps the random blocks of each type between calls; many small files share them.
    """
    rng = np.random.default_rng(seed)
    alignment = _alignment(metadata)
    chunks = {} if chunks is None else chunks
    with path.open("wb") as file:
        file.write(header(metadata, tensors))
        for line in map(TensorLine._make, tensors):
            _write_weights(file.write, line, chunks, rng)
            file.write(bytes(align(line.size_bytes, alignment) - line.size_bytes))
    return path


def write_split(
    folder: Path,
    stem: str,
    metadata: Metadata,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    n_shards: int,
    *,
    write: Callable[..., Path] = write_random,
) -> list[Path]:
    """Spread the tensors over `n_shards` files; only the first has the model's metadata."""
    paths = []
    per_shard = -(-len(tensors) // n_shards)
    for number in range(n_shards):
        split = {
            "split.no": Typed(U16, number),
            "split.count": Typed(U16, n_shards),
            "split.tensors.count": Typed(I32, len(tensors)),
        }
        path = folder / f"{stem}-{number + 1:05d}-of-{n_shards:05d}.gguf"
        part = tensors[number * per_shard : (number + 1) * per_shard]
        paths.append(write(path, {**(metadata if number == 0 else {}), **split}, part))
    return paths


def _write_weights(
    write: Callable[[bytes], object],
    line: TensorLine,
    chunks: dict[str, bytes],
    rng: np.random.Generator,
) -> None:
    left = line.size_bytes
    if line.name.endswith("norm.weight") and line.type == "f32":
        write(np.ones(left // 4, dtype="<f4").tobytes())
        return
    if line.type not in chunks:
        chunks[line.type] = random_blocks(line.type, _CHUNK_BLOCKS, rng)
    while left:
        piece = chunks[line.type][:left]
        write(piece)
        left -= len(piece)


# The half floats of a block that scale it: byte offset → value, chosen so that weights come out
# near 0.02, the deviation of a freshly initialised transformer.
_HALF_SCALES: Mapping[str, Mapping[int, float]] = {
    "q4_0": {0: 4e-3},
    "q4_1": {0: 4e-3, 2: -3e-2},
    "q5_0": {0: 2e-3},
    "q5_1": {0: 2e-3, 2: -3e-2},
    "q8_0": {0: 3e-4},
    "q8_1": {0: 3e-4, 2: 0.0},
    "q1_0": {0: 2e-2},
    "q2_0": {0: 1e-2},
    "q2_K": {80: 2e-3, 82: 3e-3},
    "q3_K": {108: 5e-4},
    "q4_K": {0: 1e-4, 2: 7.5e-4},
    "q5_K": {0: 5e-5, 2: 7.75e-4},
    "q6_K": {208: 2e-5},
    "iq2_xxs": {0: 5e-4},
    "iq2_xs": {0: 5e-4},
    "iq2_s": {0: 5e-4},
    "iq3_xxs": {0: 5e-4},
    "iq3_s": {0: 1e-4},
    "iq1_s": {0: 3e-3},
    "iq4_nl": {0: 3e-4},
    "iq4_xs": {0: 2e-5},
    "tq1_0": {52: 2e-2},
    "tq2_0": {64: 2e-2},
}
_BYTE_SCALES: Mapping[str, tuple[range, int]] = {
    "mxfp4": (range(1), 119),  # E8M0: 2^(119-127)
    "nvfp4": (range(4), 0x08),  # UE4M3, one for each 16 elements
}


def random_blocks(type_name: str, n_blocks: int, rng: np.random.Generator) -> bytes:
    """Bytes of `n_blocks` valid blocks of a type: random quants, small finite scales."""
    if type_name in ("f32", "f16", "bf16"):
        values = rng.normal(0.0, 0.02, n_blocks).astype("<f4")
        if type_name == "bf16":
            return (values.view("<u4") >> 16).astype("<u2").tobytes()
        return values.astype("<f4" if type_name == "f32" else "<f2").tobytes()
    block_bytes = BY_NAME[type_name].block_bytes
    blocks = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    for offset, scale in _HALF_SCALES.get(type_name, {}).items():
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if type_name in _BYTE_SCALES:
        columns, byte = _BYTE_SCALES[type_name]
        blocks[:, columns.start : columns.stop] = byte
    if type_name == "iq1_m":
        # The scale's four nibbles are the high ones of four 16-bit words (iq1m_scale_t).
        scale_bits = int(np.float16(3e-3).view(np.uint16))
        for word in range(4):
            column = 48 + 2 * word + 1
            nibble = (scale_bits >> (4 * word)) & 0xF
            blocks[:, column] = (blocks[:, column] & 0x0F) | (nibble << 4)
    return blocks.tobytes()


def spm_tokenizer(n_vocab: int) -> dict[str, Any]:
    """A SentencePiece vocabulary: `<unk>`, `<s>`, `</s>`, 256 byte tokens, then words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"▁w{i}" for i in range(n_vocab - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * (n_vocab - 259)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens[:n_vocab],
        "tokenizer.ggml.scores": [-float(i) for i in range(n_vocab)],
        "tokenizer.ggml.token_type": Typed(I32, types[:n_vocab]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte (bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def bpe_tokenizer(n_vocab: int) -> dict[str, Any]:
    """A byte-level BPE vocabulary: 256 bytes, `<|end|>`, then words with one merge each."""
    letters = byte_letters()
    digits = "0123456789"
    tokens, merges = [*letters, "<|end|>"], []
    known = list(digits)
    grown = 0
    while len(tokens) < n_vocab:
        prefix, digit = known[grown // 10], digits[grown % 10]
        tokens.append(prefix + digit)
        known.append(prefix + digit)
        merges.append(f"{prefix} {digit}")
        grown += 1
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed(I32, [1] * 256 + [3] + [1] * (n_vocab - 257)),
        "tokenizer.ggml.merges": Typed(STRING, merges),
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
    }


def tiny_llama(
    tokenizer: str = "spm",
    *,
    n_vocab: int = 269,
    n_layer: int = 1,
    n_expert: int = 0,
    type_name: str = "f32",
) -> tuple[dict[str, Any], list[TensorLine]]:
    """A valid llama of about 300 kB: 4 heads of 16, 2 KV heads, n_embd 64, n_ff 128."""
    n_embd, n_kv, n_ff = 64, 32, 128
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 0,
        "llama.block_count": n_layer,
        "llama.context_length": 512,
        "llama.embedding_length": n_embd,
        "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": n_vocab,
        **(spm_tokenizer(n_vocab) if tokenizer == "spm" else bpe_tokenizer(n_vocab)),
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    if n_expert:
        metadata |= {"llama.expert_count": n_expert, "llama.expert_used_count": 2}
    tensors = [TensorLine("token_embd.weight", type_name, (n_embd, n_vocab))]
    for layer in range(n_layer):
        widths: dict[str, tuple[str, tuple[int, ...]]] = {
            "attn_norm": ("f32", (n_embd,)),
            "attn_q": (type_name, (n_embd, n_embd)),
            "attn_k": (type_name, (n_embd, n_kv)),
            "attn_v": (type_name, (n_embd, n_kv)),
            "attn_output": (type_name, (n_embd, n_embd)),
            "ffn_norm": ("f32", (n_embd,)),
            "ffn_gate": (type_name, (n_embd, n_ff)),
            "ffn_up": (type_name, (n_embd, n_ff)),
            "ffn_down": (type_name, (n_ff, n_embd)),
        }
        if n_expert:
            widths = {
                k: v for k, v in widths.items() if k not in ("ffn_gate", "ffn_up", "ffn_down")
            }
            widths["ffn_gate_inp"] = ("f32", (n_embd, n_expert))
            widths["ffn_gate_exps"] = (type_name, (n_embd, n_ff, n_expert))
            widths["ffn_down_exps"] = (type_name, (n_ff, n_embd, n_expert))
            widths["ffn_up_exps"] = (type_name, (n_embd, n_ff, n_expert))
        tensors += [TensorLine(f"blk.{layer}.{k}.weight", *v) for k, v in widths.items()]
    tensors.append(TensorLine("output_norm.weight", "f32", (n_embd,)))
    tensors.append(TensorLine("output.weight", type_name, (n_embd, n_vocab)))
    return metadata, tensors
