"""Hand-made damaged model files: what is wrong with each, and the code of its refusal.

`CASES` is used by `benchmarks.damaged_files` and by tests/faults. A case whose code is None is odd
but fit to load: it must be accepted, and the engine must survive it.
"""

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gguf_writer as gw
from benchmarks.gguf_writer import TensorLine, Typed


class Case(NamedTuple):
    """One damaged file; `make` writes it into an empty folder and gives the path to open."""

    group: str
    name: str
    code: str | None
    make: Callable[[Path], Path]


Edit = Callable[[dict[str, Any], list[TensorLine]], Any]


def _model(edit: Edit, tokenizer: str = "spm", n_expert: int = 0) -> Callable[[Path], Path]:
    """The tiny model with its description edited before it is written."""

    def make(folder: Path) -> Path:
        metadata, tensors = gw.tiny_llama(tokenizer, n_expert=n_expert)
        edit(metadata, tensors)
        return gw.write_random(folder / "model.gguf", metadata, tensors)

    return make


def _keys(
    changes: Mapping[str, Any], *drop: str, tokenizer: str = "spm", n_expert: int = 0
) -> Callable[[Path], Path]:
    def edit(metadata: dict[str, Any], tensors: list[TensorLine]) -> None:
        metadata.update(changes)
        for key in drop:
            del metadata[key]

    return _model(edit, tokenizer, n_expert)


def _tensor(name: str, /, **changes: Any) -> Callable[[Path], Path]:
    def edit(metadata: dict[str, Any], tensors: list[TensorLine]) -> None:
        index = next(i for i, line in enumerate(tensors) if line.name == name)
        tensors[index] = tensors[index]._replace(**changes)

    return _model(edit)


def _bytes(change: Callable[[bytes], bytes], tokenizer: str = "spm") -> Callable[[Path], Path]:
    """The tiny model with its file's bytes changed."""

    def make(folder: Path) -> Path:
        path = gw.write_random(folder / "model.gguf", *gw.tiny_llama(tokenizer))
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def _content(content: bytes, name: str = "model.gguf") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return make


def _put(offset: int, layout: str, value: int) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        patch = struct.pack("<" + layout, value)
        return raw[:offset] + patch + raw[offset + len(patch) :]

    return change


def _after(needle: bytes, skip: int, layout: str, value: int) -> Callable[[bytes], bytes]:
    """Overwrite a number `skip` bytes after the end of `needle`."""
    return lambda raw: _put(raw.index(needle) + len(needle) + skip, layout, value)(raw)


def _raw(n_tensors: int, n_keys: int, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts)


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return gw.string(name) + struct.pack("<I", kind) + value


def _header_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32
        + b"\nsize 4920739232\n"
    )  # fmt: skip
    return [
        ("empty", "not_gguf", _content(b"")),
        ("four bytes", "truncated", _content(b"GGUF")),
        ("two bytes", "not_gguf", _content(b"GG")),
        ("html page", "not_gguf", _content(b"<!DOCTYPE html><html><body>Sign in</body></html>")),
        ("git-lfs pointer", "not_gguf", _content(pointer)),
        ("safetensors", "not_gguf", _content(struct.pack("<Q", 2) + b"{}" + bytes(64))),
        ("zip", "not_gguf", _content(b"PK\x03\x04" + bytes(64))),
        ("pickle", "not_gguf", _content(b"\x80\x02}q\x00." + bytes(64))),
        ("gzip", "not_gguf", _content(b"\x1f\x8b\x08" + bytes(64))),
        ("ggjt", "not_gguf", _content(b"tjgg" + bytes(64))),
        ("ggml", "not_gguf", _content(b"lmgg" + bytes(64))),
        ("zeros", "not_gguf", _content(bytes(4096))),
        ("noise", "not_gguf", _content(b"\x01\x1b[31mred\x07" * 40)),
        ("big-endian", "wrong_endian", _big_endian),
        ("version 0", "unsupported_version", _bytes(_put(4, "I", 0))),
        ("version 1", "unsupported_version", _bytes(_put(4, "I", 1))),
        ("version 4", "unsupported_version", _bytes(_put(4, "I", 4))),
        ("version 2", None, _version_2),
        ("tensor count 2^63", "length_out_of_bounds", _bytes(_put(8, "Q", 1 << 63))),
        ("tensor count 32,000", "truncated", _bytes(_put(8, "Q", 32_000))),
        ("one tensor too many", None, _content_never),
        ("key count 2^64-1", "length_out_of_bounds", _bytes(_put(16, "Q", (1 << 64) - 1))),
        ("key count 65,535", "truncated", _content(_raw(0, 65_535, bytes(100)))),
    ]


def _content_never(folder: Path) -> Path:
    """No tensors at all would be refused; one spare optional tensor is not."""
    metadata, tensors = gw.tiny_llama()
    tensors.append(TensorLine("rope_freqs.weight", "f32", (8,)))
    return gw.write_random(folder / "model.gguf", metadata, tensors)


def _big_endian(folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(gw.header(*gw.tiny_llama(), order=">") + bytes(1 << 16))
    return path


def _version_2(folder: Path) -> Path:
    path = gw.write_random(folder / "model.gguf", *gw.tiny_llama())
    path.write_bytes(_put(4, "I", 2)(path.read_bytes()))
    return path


def _key_value_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    u32 = struct.pack("<I", 7)
    long_key = b"k" * 600
    deep = struct.pack("<IQ", gw.ARRAY, 1)
    huge = struct.pack("<IQ", gw.STRING, 1 << 40)
    return [
        ("empty key", "bad_key", _content(_raw(0, 1, _key(b"", gw.U32, u32), bytes(64)))),
        ("key of 600 bytes", "length_out_of_bounds",
         _content(_raw(0, 1, _key(long_key, gw.U32, u32)))),
        ("key length 2^64-1", "length_out_of_bounds",
         _content(_raw(0, 1, struct.pack("<Q", (1 << 64) - 1), bytes(64)))),
        ("key with escape codes", "bad_key",
         _content(_raw(0, 1, _key(b"a\x1b[31m", gw.U32, u32), bytes(64)))),
        ("key not UTF-8", "bad_key", _content(_raw(0, 1, _key(b"a\xff", gw.U32, u32), bytes(64)))),
        ("duplicate key", "duplicate_key",
         _content(_raw(0, 2, _key(b"a.b", gw.U32, u32) * 2, bytes(64)))),
        ("type 13", "bad_type", _content(_raw(0, 1, _key(b"a", 13, u32), bytes(64)))),
        ("type 2^32-1", "bad_type",
         _content(_raw(0, 1, _key(b"a", 0xFFFFFFFF, u32), bytes(64)))),
        ("array of arrays", "bad_type",
         _content(_raw(0, 1, _key(b"a", gw.ARRAY, deep), bytes(64)))),
        ("array of 2^40 strings", "length_out_of_bounds",
         _content(_raw(0, 1, _key(b"a", gw.ARRAY, huge), bytes(64)))),
        ("array longer than the file", "truncated",
         _content(_raw(0, 1, _key(b"a", gw.ARRAY, struct.pack("<IQ", gw.U8, 1 << 20))))),
        ("bool 2", "bad_type", _content(_raw(0, 1, _key(b"a", gw.BOOL, b"\x02"), bytes(64)))),
        ("string of 1 GiB", "length_out_of_bounds",
         _content(_raw(0, 1, _key(b"a", gw.STRING, struct.pack("<Q", 1 << 30)), bytes(64)))),
        ("string longer than the file", "truncated",
         _content(_raw(0, 1, _key(b"a", gw.STRING, struct.pack("<Q", 1 << 20)), bytes(64)))),
        ("metadata of 200 MiB", "length_out_of_bounds", _fat_metadata),
        ("alignment 0", "gguf_field_out_of_range", _keys({"general.alignment": 0})),
        ("alignment 48", "gguf_field_out_of_range", _keys({"general.alignment": 48})),
        ("alignment 4", "gguf_field_out_of_range", _keys({"general.alignment": 4})),
        ("alignment 2^30", "gguf_field_out_of_range",
         _bytes(lambda raw: _raw(0, 1, _key(b"general.alignment", gw.U32,
                                            struct.pack("<I", 1 << 30)), bytes(64)))),
        ("alignment as i32", "gguf_field_out_of_range",
         _keys({"general.alignment": Typed(gw.I32, 32)})),
        ("alignment 64", None, _keys({"general.alignment": 64})),
        ("template of 300 kB", "bad_template", _keys({"tokenizer.chat_template": "x" * 300_000})),
        ("template not UTF-8", "bad_template",
         _keys({"tokenizer.chat_template": Typed(gw.STRING, b"{{ \xff }}")})),
        ("licence of 1 MB", None, _keys({"general.license.text": "free " * 200_000})),
        ("unknown key of every type", None, _keys({
            f"x.{kind}": Typed(kind, 1) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)})),
    ]  # fmt: skip


def _fat_metadata(folder: Path) -> Path:
    one = struct.pack("<IQ", gw.U32, 4096) + bytes(4 * 4096)
    entries = b"".join(_key(f"fat.{i}".encode(), gw.ARRAY, one) for i in range(3000))
    return _content(_raw(0, 3000, entries))(folder)


def _tensor_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    q, norm = b"blk.0.attn_q.weight", b"blk.0.attn_norm.weight"
    return [
        ("empty name", "bad_tensor", _tensor("output.weight", name="")),
        ("name of 64 bytes", "length_out_of_bounds", _tensor("output.weight", name="n" * 64)),
        ("name with a newline", "bad_tensor", _tensor("output.weight", name="out\nput")),
        ("same name twice", "duplicate_tensor",
         _tensor("output.weight", name="token_embd.weight")),
        ("5 dimensions", "bad_tensor", _bytes(_after(q, 0, "I", 5))),
        ("2^32-1 dimensions", "bad_tensor", _bytes(_after(q, 0, "I", 0xFFFFFFFF))),
        ("dimension 0", "bad_tensor", _bytes(_after(q, 12, "Q", 0))),
        ("dimension -1", "bad_tensor", _bytes(_after(q, 4, "q", -1))),
        ("dimension 2^62", "bad_tensor", _bytes(_after(q, 4, "Q", 1 << 62))),
        ("sizes that wrap 2^64", "tensor_layout", _bytes(
            lambda raw: _after(q, 12, "Q", 1 << 39)(_after(q, 4, "Q", 1 << 39)(raw)))),
        ("type 4, removed", "unsupported_quant", _bytes(_after(q, 20, "i", 4))),
        ("type 31, removed", "unsupported_quant", _bytes(_after(q, 20, "i", 31))),
        ("type 43", "unsupported_quant", _bytes(_after(q, 20, "i", 43))),
        ("type -1", "unsupported_quant", _bytes(_after(q, 20, "i", -1))),
        ("row not whole blocks", "shape_mismatch",
         _tensor("blk.0.attn_q.weight", type="q4_K")),
        ("offset off by 32", "tensor_layout", _bytes(_after(norm, 16, "Q", 32))),
        ("offset 2^63", "tensor_layout", _bytes(_after(norm, 16, "Q", 1 << 63))),
        ("norm as f16", "unsupported_quant", _tensor("blk.0.attn_norm.weight", type="f16")),
        ("norm as q8_0", "unsupported_quant", _tensor("output_norm.weight", type="q8_0")),
        ("bias as bf16", "unsupported_quant", _model(lambda metadata, tensors: tensors.append(
            TensorLine("blk.0.attn_q.bias", "bf16", (64,))))),
        ("rope factors as f16", "unsupported_quant", _model(
            lambda metadata, tensors: tensors.append(
                TensorLine("rope_freqs.weight", "f16", (8,))))),
        ("weights as i32", "unsupported_quant", _tensor("blk.0.ffn_up.weight", type="i32")),
        ("weights as f64", "unsupported_quant", _tensor("blk.0.attn_output.weight", type="f64")),
        ("embedding of other width", "shape_mismatch",
         _tensor("token_embd.weight", shape=(128, 269))),
        ("embedding short of tokens", "shape_mismatch",
         _tensor("token_embd.weight", shape=(64, 200))),
        ("no embedding", "missing_tensor", _tensor("token_embd.weight", name="token_other.weight")),
        ("layer 7 of 1", "shape_mismatch",
         _tensor("blk.0.ffn_up.weight", name="blk.7.ffn_up.weight")),
        ("no tensors", "missing_tensor", _model(lambda metadata, tensors: tensors.clear())),
    ]  # fmt: skip


def _architecture_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    out = "gguf_field_out_of_range"
    return [
        ("no architecture", "missing_key", _keys({}, "general.architecture")),
        ("architecture unknown", "unsupported_architecture",
         _keys({"general.architecture": "llama9"})),
        ("architecture a number", "unsupported_architecture", _keys({"general.architecture": 7})),
        ("vision projector", "not_a_model", _keys({"general.architecture": "clip"})),
        ("adapter", "not_a_model", _keys({"general.type": "adapter"})),
        ("layers 0", out, _keys({"llama.block_count": 0})),
        ("layers 513", out, _keys({"llama.block_count": 513})),
        ("layers 2^32-1", out, _keys({"llama.block_count": 0xFFFFFFFF})),
        ("layers a string", "bad_type", _keys({"llama.block_count": "one"})),
        ("layers missing", "missing_key", _keys({}, "llama.block_count")),
        ("prediction layers 2 of 1", out, _keys({"llama.nextn_predict_layers": 2})),
        ("context 0", out, _keys({"llama.context_length": 0})),
        ("context missing", "missing_key", _keys({}, "llama.context_length")),
        ("embedding 0", out, _keys({"llama.embedding_length": 0})),
        ("embedding 2^31", out, _keys({"llama.embedding_length": 1 << 31})),
        ("heads 5000", out, _keys({"llama.attention.head_count": 5000})),
        ("heads 7", out, _keys({"llama.attention.head_count": 7})),
        ("kv heads 3 of 4", out, _keys({"llama.attention.head_count_kv": 3})),
        ("kv heads for no layer", out,
         _keys({"llama.attention.head_count_kv": Typed(gw.U32, [])})),
        ("feed-forward 2^31", out, _keys({"llama.feed_forward_length": 1 << 31})),
        ("key length 0", out, _keys({"llama.attention.key_length": 0})),
        ("rope wider than a head", out, _keys({"llama.rope.dimension_count": 32})),
        ("rope odd", out, _keys({"llama.rope.dimension_count": 15})),
        ("rope base 0", out, _keys({"llama.rope.freq_base": 0.0})),
        ("rope base nan", out, _keys({"llama.rope.freq_base": float("nan")})),
        ("rope scaling unknown", out, _keys({"llama.rope.scaling.type": "cubic"})),
        ("rope factor -1", out, _keys({"llama.rope.scaling.factor": -1.0})),
        ("epsilon -1", out, _keys({"llama.attention.layer_norm_rms_epsilon": -1.0})),
        ("epsilon inf", out, _keys({"llama.attention.layer_norm_rms_epsilon": float("inf")})),
        ("experts 2000", out, _keys({"llama.expert_count": 2000, "llama.expert_used_count": 2})),
        ("experts used, none there", out, _keys({"llama.expert_used_count": 2})),
        ("experts used 0", out, _keys({"llama.expert_used_count": 0}, n_expert=4)),
        ("experts used 5 of 4", out, _keys({"llama.expert_used_count": 5}, n_expert=4)),
        ("expert groups 3 of 4", out, _keys({"llama.expert_group_count": 3}, n_expert=4)),
        ("expert groups, none used", "missing_key",
         _keys({"llama.expert_group_count": 2}, n_expert=4)),
        ("experts", None, _keys({}, n_expert=4)),
        ("vocabulary 0", out, _keys({"llama.vocab_size": 0})),
    ]  # fmt: skip


def _tokenizer_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    bad = "bad_tokenizer"
    spm, bpe = gw.spm_tokenizer(269), gw.bpe_tokenizer(269)
    tokens, scores = spm["tokenizer.ggml.tokens"], spm["tokenizer.ggml.scores"]
    types = spm["tokenizer.ggml.token_type"].value
    merges = bpe["tokenizer.ggml.merges"].value

    def listed(values: list[Any], index: int, value: Any) -> list[Any]:
        return [*values[:index], value, *values[index + 1 :]]

    def with_tokens(value: list[Any]) -> Callable[[Path], Path]:
        return _keys({"tokenizer.ggml.tokens": Typed(gw.STRING, value)})

    return [
        ("tokens missing", bad, _keys({}, "tokenizer.ggml.tokens")),
        ("tokens as numbers", bad, _keys({"tokenizer.ggml.tokens": [1, 2, 3]})),
        ("tokens empty", bad, with_tokens([])),
        ("tokens all empty", bad, with_tokens([""] * 269)),
        ("token twice", bad, with_tokens(listed(tokens, 268, tokens[267]))),
        ("tokens equal up to a NUL", bad, with_tokens(listed(tokens, 268, tokens[267] + "\0x"))),
        ("three empty tokens", None, with_tokens([*tokens[:266], "", "", ""])),
        ("byte token missing", bad, with_tokens(listed(tokens, 20, "<0xZZ>"))),
        ("scores missing one", bad, _keys({"tokenizer.ggml.scores": scores[:-1]})),
        ("scores as u8", bad, _keys({"tokenizer.ggml.scores": Typed(gw.U8, [0] * 269)})),
        ("scores nan", bad, _keys({"tokenizer.ggml.scores": listed(scores, 9, float("nan"))})),
        ("types as u8", bad, _keys({"tokenizer.ggml.token_type": Typed(gw.U8, [1] * 269)})),
        ("types short", bad, _keys({"tokenizer.ggml.token_type": Typed(gw.I32, types[:5])})),
        ("type 7", bad, _keys({"tokenizer.ggml.token_type": Typed(gw.I32, listed(types, 9, 7))})),
        ("type -1", bad, _keys({"tokenizer.ggml.token_type": Typed(gw.I32, listed(types, 9, -1))})),
        ("bos beyond the vocabulary", bad, _keys({"tokenizer.ggml.bos_token_id": 269})),
        ("eos 2^31", bad, _keys({"tokenizer.ggml.eos_token_id": 1 << 31})),
        ("bos none", None, _keys({"tokenizer.ggml.bos_token_id": 0xFFFFFFFF})),
        ("padding beyond the vocabulary", None, _keys({"tokenizer.ggml.padding_token_id": 269})),
        ("add a bos that is not there", "gguf_field_out_of_range", _keys(
            {"tokenizer.ggml.pre": "glm4", "tokenizer.ggml.add_bos_token": True},
            "tokenizer.ggml.bos_token_id", tokenizer="bpe")),
        ("merge of one word", bad, _keys(
            {"tokenizer.ggml.merges": Typed(gw.STRING, listed(merges, 3, "01"))},
            tokenizer="bpe")),
        ("charsmap of 3 bytes", bad, _keys(
            {"tokenizer.ggml.precompiled_charsmap": Typed(gw.U8, [1, 2, 3])})),
        ("2^20 tokens", "length_out_of_bounds", _many_tokens),
        ("tokens of 20 MB", "length_out_of_bounds",
         with_tokens([f"{i:05d}" + "x" * 80_000 for i in range(269)])),
    ]  # fmt: skip


def _many_tokens(folder: Path) -> Path:
    array = struct.pack("<IQ", gw.STRING, 1 << 20) + bytes(8 << 20)
    return _content(_raw(0, 1, _key(b"tokenizer.ggml.tokens", gw.ARRAY, array)))(folder)


def _costly_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    """Headers as large as the limits let them be, wrong at the very end."""
    return [
        ("524,288 tokens, the last twice", "bad_tokenizer", _long_vocabulary),
        ("1,000,000 merges, cut", "truncated", _long_merges),
        ("32,000 tensors, the last of a removed type", "unsupported_quant", _long_table),
        ("12 MB of keys, then a bad one", "bad_type", _long_keys),
    ]


def _long_vocabulary(folder: Path) -> Path:
    count = 1 << 19
    tokens = b"".join(gw.string(f"token-{i:014d}") for i in range(count - 1))
    array = struct.pack("<IQ", gw.STRING, count) + tokens + gw.string("token-00000000000000")
    return _content(_raw(0, 1, _key(b"tokenizer.ggml.tokens", gw.ARRAY, array), bytes(64)))(folder)


def _long_merges(folder: Path) -> Path:
    array = struct.pack("<IQ", gw.STRING, 1_000_000) + gw.string("ab cd") * 999_999
    return _content(_raw(0, 1, _key(b"tokenizer.ggml.merges", gw.ARRAY, array)))(folder)


def _long_table(folder: Path) -> Path:
    one = 32
    entries = [gw.tensor_entry(f"t{i}", 0, (8,), i * one) for i in range(32_000)]
    entries.append(gw.tensor_entry("last", 4, (8,), 32_000 * one))
    return _content(_raw(32_001, 0, *entries))(folder)


def _long_keys(folder: Path) -> Path:
    n_keys = 40_000
    keys = [_key(f"some.long.key.{i:06d}".encode(), gw.U32, bytes(4)) for i in range(n_keys)]
    return _content(_raw(0, n_keys + 1, *keys, _key(b"a", 77, bytes(4)), bytes(64)))(folder)


def _file_cases() -> list[tuple[str, str | None, Callable[[Path], Path]]]:
    return [
        ("cut in the magic", "not_gguf", _bytes(lambda raw: raw[:3])),
        ("cut in the header", "truncated", _bytes(lambda raw: raw[:1000])),
        ("cut in the tensor table", "truncated", _bytes(lambda raw: raw[:7000])),
        ("cut in the tensors", "truncated", _bytes(lambda raw: raw[:200_000])),
        ("one byte short", "truncated", _bytes(lambda raw: raw[:-1])),
        ("1 TB header claim, sparse", "length_out_of_bounds", _sparse),
        ("4 kB after the tensors", None, _bytes(lambda raw: raw + bytes(4096))),
        ("weights all zero", None, _bytes(lambda raw: raw[:9000] + bytes(len(raw) - 9000))),
        ("folder", "not_gguf", _folder),
        ("fifo", "not_gguf", _fifo),
        ("symlink to itself", "not_found", _loop),
        ("name that is not there", "not_found", lambda folder: folder / "other.gguf"),
        ("name with escape codes", "not_gguf", _content(b"x", "a\x1b[31m\n.gguf")),
        ("device", "not_gguf", lambda folder: Path("/dev/zero")),
        ("shards", None, _split(lambda paths: None)),
        ("shards, the second named", None, _split(lambda paths: None, given=1)),
        ("last shard missing", "split_incomplete", _split(lambda paths: paths[2].unlink())),
        ("first shard missing", "not_found", _split(lambda paths: paths[0].unlink(), given=1)),
        ("shards swapped", "split_incomplete", _split(_swap)),
        ("shard truncated", "truncated", _split(lambda paths: os.truncate(paths[1], 4000))),
        ("shard of another model", "duplicate_tensor", _split(_same_tensors)),
        ("first shard renamed", "split_incomplete", _renamed),
        ("shard number as u32", "bad_type", _split(_wrong_type)),
        ("tensor count of shards wrong", "split_incomplete", _split(_wrong_total)),
        ("65,535 shards", "gguf_field_out_of_range", _keys(
            {"split.count": Typed(gw.U16, 65535), "split.no": Typed(gw.U16, 0)})),
    ]  # fmt: skip


def _sparse(folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(_raw(0, 1, gw.string(b"a") + struct.pack("<I", gw.ARRAY)
                          + struct.pack("<IQ", gw.STRING, 1 << 35)))  # fmt: skip
    os.truncate(path, 1 << 40)
    return path


def _folder(folder: Path) -> Path:
    (folder / "model.gguf").mkdir()
    return folder / "model.gguf"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.gguf")
    return folder / "model.gguf"


def _loop(folder: Path) -> Path:
    (folder / "model.gguf").symlink_to(folder / "model.gguf")
    return folder / "model.gguf"


def _split(damage: Callable[[list[Path]], object], given: int = 0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        paths = gw.write_split(folder, "model", *gw.tiny_llama(), 3)
        damage(paths)
        return paths[given]

    return make


def _swap(paths: list[Path]) -> None:
    one, two = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(two)
    paths[2].write_bytes(one)


def _same_tensors(paths: list[Path]) -> None:
    tensors = gw.tiny_llama()[1]
    split = {"split.no": Typed(gw.U16, 1), "split.count": Typed(gw.U16, 3)}
    gw.write_random(paths[1], split, tensors[:4])


def _wrong_type(paths: list[Path]) -> None:
    gw.write_random(paths[1], {"split.no": Typed(gw.U32, 1)}, gw.tiny_llama()[1][4:8])


def _wrong_total(paths: list[Path]) -> None:
    gw.write_random(paths[2], {"split.no": Typed(gw.U16, 2)}, gw.tiny_llama()[1][8:10])


def _renamed(folder: Path) -> Path:
    path = gw.write_split(folder, "model", *gw.tiny_llama(), 3)[0]
    return path.rename(folder / "renamed.gguf")


CASES: tuple[Case, ...] = tuple(
    Case(group, name, code, make)
    for group, cases in (
        ("header", _header_cases()),
        ("key-values", _key_value_cases()),
        ("tensor table", _tensor_cases()),
        ("architecture", _architecture_cases()),
        ("tokenizer", _tokenizer_cases()),
        ("files", _file_cases()),
        ("costly", _costly_cases()),
    )
    for name, code, make in cases
)
