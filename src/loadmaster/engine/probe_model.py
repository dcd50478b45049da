"""A tiny GGUF whose answer is known by construction, to test an engine build with.

Its embeddings are one-hot and its output matrix is a permutation, so token `t` is followed by
`successor(t)` whatever the small random weights of attention and feed-forward add: the margin is
more than ten logits. Everything in it follows from a seed; it is written, not shipped.
"""

import random
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadmaster.units import Bytes, align

N_VOCAB = 64
N_EMBD = 64  # as many as tokens, for one-hot rows; also the only head's width
N_FF = 64
N_LAYER = 2
N_CTX = 256

_F32, _Q8_0 = 0, 8
_Q8_0_BLOCK = 32
_FILE_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_NOISE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    type: int
    shape: tuple[int, ...]
    content: bytes


def successor(token: int) -> int:
    """The token that the model says after `token`."""
    return (5 * token + 3) % N_VOCAB


def successors(token: int, count: int) -> list[int]:
    """The `count` tokens that the model says after `token`."""
    said: list[int] = []
    for _ in range(count):
        token = successor(token)
        said.append(token)
    return said


def device_bytes(alignment: int) -> Bytes:
    """Model bytes on a device that holds all layers: everything but the input embedding."""
    sizes = (len(t.content) for t in _tensors() if t.name != "token_embd.weight")
    return Bytes(sum(align(size, alignment) for size in sizes))


def cache_bytes() -> Bytes:
    """The KV cache at N_CTX cells of f16: rows of one head, keys and values."""
    return Bytes(N_LAYER * N_CTX * 2 * N_EMBD * 2)


def write(path: Path) -> None:
    """Write the model as GGUF version 3."""
    tensors = list(_tensors())
    with path.open("wb") as file:
        file.write(_header(tensors))
        file.write(b"\0" * (-file.tell() % _FILE_ALIGNMENT))
        for tensor in tensors:
            file.write(tensor.content)
            file.write(b"\0" * (-len(tensor.content) % _FILE_ALIGNMENT))


def _header(tensors: list[_Tensor]) -> bytes:
    entries = [_entry(name, value) for name, value in _METADATA.items()]
    infos, offset = [], 0
    for tensor in tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        infos.append(_string(tensor.name) + shape + struct.pack("<IQ", tensor.type, offset))
        offset = align(offset + len(tensor.content), _FILE_ALIGNMENT)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    return start + b"".join(entries) + b"".join(infos)


_METADATA: dict[str, str | int | float] = {
    "general.architecture": "llama",
    "general.name": "loadmaster probe",
    "llama.block_count": N_LAYER,
    "llama.context_length": N_CTX,
    "llama.embedding_length": N_EMBD,
    "llama.feed_forward_length": N_FF,
    "llama.attention.head_count": 1,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": N_VOCAB,
    "tokenizer.ggml.model": "none",
}


def _entry(name: str, value: str | float) -> bytes:
    if isinstance(value, str):
        return _string(name) + struct.pack("<I", _STRING) + _string(value)
    kind, form = (_UINT32, "<II") if isinstance(value, int) else (_FLOAT32, "<If")
    return _string(name) + struct.pack(form, kind, value)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensors() -> Iterator[_Tensor]:
    random_bytes = random.Random(0)  # noqa: S311  # weights, not secrets
    yield _f32("token_embd.weight", (N_EMBD, N_VOCAB), _one_hot())
    for layer in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            yield _f32(f"blk.{layer}.{name}.weight", (N_EMBD,), [1.0] * N_EMBD)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            noise = [random_bytes.uniform(-_NOISE, _NOISE) for _ in range(N_EMBD * N_EMBD)]
            yield _f32(f"blk.{layer}.{name}.weight", (N_EMBD, N_EMBD), noise)
        steps = [random_bytes.randint(-127, 127) for _ in range(N_FF * N_EMBD)]
        yield _q8_0(f"blk.{layer}.ffn_down.weight", (N_FF, N_EMBD), steps, _NOISE / 127)
    yield _f32("output_norm.weight", (N_EMBD,), [1.0] * N_EMBD)
    yield _q8_0("output.weight", (N_EMBD, N_VOCAB), _permutation(), 1 / 127)


def _one_hot() -> list[float]:
    return [float(column == row) for row in range(N_VOCAB) for column in range(N_EMBD)]


def _permutation() -> list[int]:
    said_after = {successor(token): token for token in range(N_VOCAB)}
    return [127 * (said_after[row] == column) for row in range(N_VOCAB) for column in range(N_EMBD)]


def _f32(name: str, shape: tuple[int, ...], values: list[float]) -> _Tensor:
    return _Tensor(name=name, type=_F32, shape=shape, content=array("f", values).tobytes())


def _q8_0(name: str, shape: tuple[int, ...], steps: list[int], scale: float) -> _Tensor:
    blocks = (steps[i : i + _Q8_0_BLOCK] for i in range(0, len(steps), _Q8_0_BLOCK))
    content = b"".join(struct.pack(f"<e{_Q8_0_BLOCK}b", scale, *block) for block in blocks)
    return _Tensor(name=name, type=_Q8_0, shape=shape, content=content)
