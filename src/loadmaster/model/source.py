"""A path to a model in: its `ModelSpec` out, from the headers of all its shards."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loadmaster.errors import DamagedFileError, LoadmasterError, NotFoundError, UsageError
from loadmaster.model import gguf, hparams, lookalikes
from loadmaster.model.checks import check_model
from loadmaster.model.cursor import U16, Cursor
from loadmaster.model.damage import damaged, quoted, refused
from loadmaster.model.gguf import TOKENS, Header, parse_header
from loadmaster.model.types import (
    FileStamp,
    MetadataValue,
    ModelSpec,
    TensorSpec,
)
from loadmaster.units import Bytes

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SHARDS = 512

# `general.file_type` (enum llama_ftype of llama.h), as quantizations are called everywhere.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
    39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


def read_model(path: str | Path) -> ModelSpec:
    """Read a model's headers and check them; any shard of a split model names it.

    Raises:
        NotFoundError: no such file.
        DamagedFileError: not a GGUF, damaged, incomplete, or of no use to the engine.
    """
    stamp, header = _read_file(_first_shard(Path(path)))
    stamps, headers = [stamp], [header]
    for number in range(1, _shard_count(header)):
        stamp, shard = _read_file(_sibling(stamps[0].path, header, number))
        _check_shard(shard, number)
        stamps.append(stamp)
        headers.append(shard)
    tensors = _all_tensors(headers)
    check_model(header, tensors)
    return _spec(tuple(stamps), headers, tensors)


def read_tokens(path: Path) -> list[bytes]:
    """The tokens of a file's vocabulary in their order; none where it has no vocabulary.

    Raises:
        LoadmasterError: it cannot be read, or is damaged.
    """
    label = _printable(path)
    with _opened(path, label) as (file, status):

        def read_at(at: int, length: int) -> bytes:
            return _pread(file, at, length)

        entry = parse_header(read_at, status.st_size, label).entries.get(TOKENS)
        if entry is None:
            return []
        cursor = Cursor(read_at, status.st_size, label)
        cursor.skip(entry.offset, TOKENS)
        return [token for batch in cursor.strings(entry.count, TOKENS) for token in batch]


def _first_shard(path: Path) -> Path:
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["number"]) <= 1:
        return path
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")


def _shard_count(header: Header) -> int:
    entry = header.entries.get("split.count")
    if entry is None:
        return 1
    count = _u16(header, "split.count")
    if count > MAX_SHARDS:
        raise damaged(
            "gguf_field_out_of_range", header.label, "split.count", count, f"0–{MAX_SHARDS}",
            offset=entry.offset,
        )  # fmt: skip
    if count > 1:
        _check_shard(header, 0)
    return max(count, 1)


def _u16(header: Header, key: str) -> int:
    """The engine reads these as u16 and aborts on another type (gguf_get_val_u16)."""
    entry, value = header.entries.get(key), header.metadata.get(key)
    if entry is None or entry.type != U16 or not isinstance(value, int):
        found = "missing" if entry is None else entry.type_name
        raise damaged(
            "bad_type", header.label, key, found, "a u16", offset=entry.offset if entry else None
        )
    return value


def _check_shard(header: Header, number: int) -> None:
    found = _u16(header, "split.no")
    if found != number:
        raise damaged(
            "split_incomplete", header.label, "split.no", found, f"{number}, by the file's name",
            offset=header.entries["split.no"].offset,
            hint="a shard has another's name: rename it or download it again",
        )  # fmt: skip


def _sibling(first: Path, header: Header, number: int) -> Path:
    match = _SHARD.fullmatch(first.name)
    count = _shard_count(header)
    if match is None or int(match["count"]) != count:
        raise refused(
            "split_incomplete",
            f"{header.label} is the first of {count} shards, and its name does not say so",
            hint=f"name the shards `NAME-00001-of-{count:05d}.gguf` and so on",
            shards=count,
        )
    path = first.with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf")
    if not path.exists():
        raise refused(
            "split_incomplete",
            f"shard {number + 1} of {count} is missing: {_printable(path)}",
            hint="download it into the same folder",
            shard=number + 1,
            shards=count,
        )
    return path


def _all_tensors(headers: list[Header]) -> tuple[TensorSpec, ...]:
    if len(headers) == 1:
        return headers[0].tensors
    seen: dict[str, int] = {}
    tensors: list[TensorSpec] = []
    for shard, header in enumerate(headers):
        for tensor in header.tensors:
            if seen.setdefault(tensor.name, shard) != shard:
                raise damaged(
                    "duplicate_tensor", header.label, f"tensor {quoted(tensor.name)}",
                    f"also in shard {seen[tensor.name] + 1}", "each name once",
                    offset=header.tensor_offsets[tensor.name],
                )  # fmt: skip
            tensors.append(replace(tensor, shard=shard))
    wanted = headers[0].metadata.get("split.tensors.count")
    if wanted != len(tensors):
        raise damaged(
            "split_incomplete", headers[0].label, "split.tensors.count",
            "missing" if wanted is None else wanted, f"{len(tensors)}, the tensors of all shards",
        )  # fmt: skip
    return tuple(tensors)


def _read_file(path: Path) -> tuple[FileStamp, Header]:
    label = _printable(path)
    with _opened(path, label) as (file, status):
        size = status.st_size
        start = os.pread(file, lookalikes.LOOK_BYTES, 0)
        if not start.startswith(lookalikes.MAGIC):
            raise lookalikes.not_gguf(start, size, label)
        header = parse_header(lambda at, length: _pread(file, at, length), size, label)
    stamp = FileStamp(
        path=path,
        size_bytes=Bytes(size),
        device=status.st_dev,
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
    )
    return stamp, header


def _pread(file: int, at: int, length: int) -> bytes:
    """Read fully: a pipe of the kernel's may give less than asked long before the end."""
    parts: list[bytes] = []
    while length:
        part = os.pread(file, length, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _opened(path: Path, label: str) -> Iterator[tuple[int, os.stat_result]]:
    """A regular file's descriptor and its status; other kinds of file are not waited for."""
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for its writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path, label) from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _not_a_file(status.st_mode, path, label)
        yield file, status
    except OSError as error:
        raise _unreadable(error, label) from None
    finally:
        os.close(file)


_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def _cannot_open(error: OSError | ValueError, path: Path, label: str) -> LoadmasterError:
    if isinstance(error, ValueError):  # a NUL in the path
        return UsageError(f"{label} is not a path", hint="name a .gguf file")
    if error.errno in _NOT_THERE:
        near = _ggufs_in(path.parent)
        hint = f"in that folder: {', '.join(near)}" if near else "check the path"
        return NotFoundError(f"{label} is not there: {os.strerror(error.errno)}", hint=hint)
    if stat.S_ISSOCK(_mode(path)):
        return _not_a_file(stat.S_IFSOCK, path, label)
    return _unreadable(error, label)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _unreadable(error: OSError, label: str) -> DamagedFileError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    hint = (
        f"`ls -l {label}` shows who may read it"
        if error.errno in (errno.EACCES, errno.EPERM)
        else "the disk or the network share failed: copy the file and try the copy"
    )
    return refused("unreadable", f"{label} cannot be read: {reason}", hint=hint, file=label)


def _not_a_file(mode: int, path: Path, label: str) -> DamagedFileError:
    kinds: Mapping[str, Callable[[int], bool]] = {
        "a folder": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
        "a socket": stat.S_ISSOCK,
    }
    what = next((name for name, test in kinds.items() if test(mode)), "not a file")
    near = _ggufs_in(path) if stat.S_ISDIR(mode) else []
    hint = f"name a file in it: {', '.join(near)}" if near else "name a .gguf file"
    return refused("not_gguf", f"{label} is {what}, not a GGUF file", hint=hint, file=label)


def _ggufs_in(folder: Path) -> list[str]:
    try:
        return sorted(_printable(Path(one.name)) for one in folder.glob("*.gguf"))[:3]
    except (OSError, ValueError):
        return []


def _printable(path: Path) -> str:
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _spec(
    stamps: tuple[FileStamp, ...], headers: list[Header], tensors: tuple[TensorSpec, ...]
) -> ModelSpec:
    header = headers[0]
    metadata = header.metadata
    architecture = str(metadata["general.architecture"])
    layers, kv_formula = hparams.layers_of(architecture, metadata, tensors)

    def number(name: str) -> int:
        value = metadata.get(f"{architecture}.{name}", 0)
        one = max(value, default=0) if isinstance(value, tuple) else value
        return int(one) if isinstance(one, int | float) else 0

    template = metadata.get(gguf.TEMPLATE)
    return ModelSpec(
        files=stamps,
        file_bytes=Bytes(sum(stamp.size_bytes for stamp in stamps)),
        header_bytes=Bytes(sum(one.bytes_read for one in headers)),
        name=_name(metadata, stamps[0].path),
        architecture=architecture,
        quantization=_quantization(metadata, tensors),
        n_layer=number("block_count"),
        n_ctx_train=number("context_length"),
        n_embd=number("embedding_length"),
        n_vocab=header.tokens.count if header.tokens else _n_vocab(metadata, architecture, tensors),
        n_ff=number("feed_forward_length"),
        n_expert=number("expert_count"),
        n_expert_used=number("expert_used_count"),
        n_swa=hparams.window_of(architecture, metadata)
        if kv_formula
        else number("attention.sliding_window"),
        tied_output=not any(tensor.name == "output.weight" for tensor in tensors),
        layers=layers,
        tensors=tensors,
        kv_formula=kv_formula,
        chat_template=template if isinstance(template, str) else None,
        tokenizer_model=str(metadata.get("tokenizer.ggml.model", "none")),
        n_merges=_count(header, gguf.MERGES),
        metadata=metadata,
    )


def _count(header: Header, key: str) -> int:
    """Elements of an array that is not kept; 0 when the file has none."""
    entry = header.entries.get(key)
    return entry.count if entry is not None and entry.is_array else 0


def _name(metadata: Mapping[str, MetadataValue], path: Path) -> str:
    given = metadata.get("general.name")
    name = given.strip() if isinstance(given, str) else ""
    safe = "".join(c for c in name if c.isprintable())
    return safe[:128] or _printable(Path(path.stem))


def _n_vocab(
    metadata: Mapping[str, MetadataValue], architecture: str, tensors: tuple[TensorSpec, ...]
) -> int:
    given = metadata.get(f"{architecture}.vocab_size")
    if isinstance(given, int):
        return given
    rows = [one.shape[-1] for one in tensors if one.name in ("token_embd.weight", "output.weight")]
    return rows[0] if rows else 0


def _quantization(metadata: Mapping[str, MetadataValue], tensors: tuple[TensorSpec, ...]) -> str:
    """The file's own label; without one the type that most of its bytes have."""
    file_type = metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type in _FILE_TYPES:
        return _FILE_TYPES[file_type]
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.size_bytes
    return max(sizes, key=lambda name: sizes[name]).upper()
