"""A folder with safetensors in: its `CheckpointSpec` out, from config.json and the headers."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from loadmaster.errors import DamagedFileError, NotFoundError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.damage import damaged, quoted, refused
from loadmaster.model.hf_config import CONFIG, MAX_CONFIG_BYTES, Dimensions, parse_config
from loadmaster.model.hf_pooling import TEXT, UNNAMED, Vectors, read_pooling
from loadmaster.model.hf_tensors import checkpoint_tensors, is_statistic
from loadmaster.model.reference import is_safe_file_path
from loadmaster.model.safetensors import ShardHeader, parse_header, pickled
from loadmaster.model.stamp import file_stamp
from loadmaster.model.types import FileStamp
from loadmaster.units import MIB, Bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_INDEX_BYTES = 16 * MIB
MAX_SHARDS = 1024
_MAX_TEMPLATE_BYTES = 4 * MIB
_MAX_ENTRIES = 4096
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f64"}


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a folder with a config and weights, pickled ones too, which are refused
    by name; or a file in such a folder."""
    if path.is_file():
        return path.suffix == ".safetensors" or path.name in (CONFIG, INDEX)
    return (path / CONFIG).is_file() and (
        (path / INDEX).is_file()
        or any(name.endswith((".safetensors", *_PICKLES)) for name in _names(path))
    )


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint that is named by it or by one of its files."""
    return path if path.is_dir() else path.parent


def read_checkpoint(path: Path) -> CheckpointSpec:
    """Read a checkpoint's config and headers, and check that they agree.

    Raises:
        NotFoundError: there is no checkpoint, or a shard of it is missing.
        DamagedFileError: it is damaged, wants code to run, or is of a model that is not planned.
    """
    folder = checkpoint_folder(path)
    names = _names(folder)
    _check_weights(folder, names)
    config = _read(folder / CONFIG, MAX_CONFIG_BYTES)
    dims = parse_config(config, CONFIG)
    _check_scripts(names, folder)
    weights = shard_names(folder, names)
    stamps = [file_stamp(folder / name) for name in weights]
    shards = [_shard(folder / name, stamp) for name, stamp in zip(weights, stamps, strict=True)]
    _check_index(folder, names, shards)
    return spec_of(
        dims,
        shards,
        Origin(
            folder=folder,
            files=(file_stamp(folder / CONFIG), *stamps),
            header_bytes=len(config) + sum(shard.header_bytes for shard in shards),
            name=folder_name(folder),
            chat_template=_template(folder, names),
            vectors=read_pooling(folder),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a checkpoint's headers are from."""

    folder: Path
    name: str
    files: tuple[FileStamp, ...] = ()
    header_bytes: int = 0
    chat_template: str | None = None
    vectors: Vectors = TEXT


def spec_of(dims: Dimensions, shards: Sequence[ShardHeader], origin: Origin) -> CheckpointSpec:
    """A checkpoint of a config and of the headers of all its shards. Pure.

    Raises:
        DamagedFileError: they contradict each other.
    """
    tensors, skipped = checkpoint_tensors(shards, dims, CONFIG)
    has_output = any(tensor.role == "output" for tensor in tensors)
    writes_text = has_output or dims.tied
    return CheckpointSpec(
        folder=origin.folder,
        files=origin.files,
        file_bytes=Bytes(
            sum(shard.header_bytes + sum(t.size_bytes for t in shard.tensors) for shard in shards)
        ),
        header_bytes=Bytes(origin.header_bytes),
        name=origin.name,
        architecture=dims.architecture,
        dtype=_dtype(shards),
        stored=dims.stored,
        n_layer=dims.n_layer,
        n_ctx_train=dims.n_ctx_train,
        n_embd=dims.n_embd,
        n_vocab=dims.n_vocab,
        n_ff=dims.n_ff,
        n_head=dims.n_head,
        n_expert=dims.n_expert,
        n_expert_used=dims.n_expert_used,
        n_ff_expert=dims.n_ff_expert,
        n_swa=dims.window if any(dims.slides) else 0,
        tied_output=dims.tied and not has_output,
        rope_width=dims.rope_width,
        n_rope=dims.family.n_rope,
        embed_scale=dims.family.embed_scale,
        softcap=dims.softcap,
        layers=dims.layers,
        tensors=tensors,
        chat_template=origin.chat_template,
        pooling=origin.vectors.pooling or (None if writes_text else UNNAMED),
        writes_text=writes_text,
        dense_after_pooling=origin.vectors.dense,
        skipped=skipped,
    )


def _dtype(shards: Iterable[ShardHeader]) -> str:
    """What the most bytes of plain floats are stored as, scales apart."""
    sums: dict[str, int] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.dtype in _DTYPES and not is_statistic(tensor.name):
                name = _DTYPES[tensor.dtype]
                sums[name] = sums.get(name, 0) + tensor.size_bytes
    return max(sums, key=lambda name: sums[name], default="bf16")


def folder_name(folder: Path) -> str:
    """A folder's name; a snapshot of the Hub's cache is called as its repository is."""
    parts = folder.resolve().parts
    for part, following in pairwise(parts):
        if part.startswith("models--") and following == "snapshots":
            return part.rpartition("--")[2]
    return folder.resolve().name


# ---- which files


def _names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in islice(entries, _MAX_ENTRIES))
    except OSError as error:
        raise NotFoundError(f"cannot read `{folder}`: {error.strerror}") from None


def _check_weights(folder: Path, names: frozenset[str]) -> None:
    """Say what is missing of a folder that is no checkpoint."""
    if not any(name.endswith(".safetensors") for name in names) and INDEX not in names:
        others = sorted(name for name in names if name.endswith(_PICKLES))
        if others:
            raise pickled(others[0])
        raise NotFoundError(
            f"no safetensors in `{folder}`",
            hint="give a folder with config.json and model.safetensors, or a GGUF file",
        )
    if CONFIG not in names and "adapter_config.json" in names:
        raise refused(
            "adapter",
            f"`{folder.name}` is a LoRA adapter, not a model",
            hint="merge it into the model it was made for; `--lora` adds one to a GGUF",
        )
    if CONFIG not in names:
        raise NotFoundError(
            f"no {CONFIG} in `{folder}`",
            hint="download the whole repository, not its weights alone",
        )


def _check_scripts(names: frozenset[str], folder: Path) -> None:
    """A model that brings Python files is made to run them."""
    scripts = sorted(name for name in names if name.endswith(".py"))
    if scripts:
        raise refused(
            "remote_code",
            f"`{folder.name}` brings code (`{scripts[0]}`): loadmaster runs none of a model's",
            hint="take a checkpoint without Python files of a family that transformers has itself",
        )


def shard_names(folder: Path, names: frozenset[str]) -> tuple[str, ...]:
    """The files with the weights, in order.

    Raises:
        NotFoundError: a shard is missing.
    """
    if INDEX not in names:
        if SINGLE in names:
            return (SINGLE,)
        raise NotFoundError(
            f"`{folder}` has neither `{SINGLE}` nor `{INDEX}`",
            hint="transformers finds weights by these names: download the whole repository",
        )
    wanted = index_shards(_read(folder / INDEX, MAX_INDEX_BYTES), INDEX)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise NotFoundError(
            f"{len(missing)} of {len(wanted)} shards are missing in `{folder}`: `{missing[0]}`",
            hint="download the rest: the weights are not complete",
            numbers={"missing": len(missing), "shards": len(wanted)},
        )
    return tuple(wanted)


def index_shards(raw: bytes, label: str) -> Mapping[str, int]:
    """The shards of an index, each with the number of its tensors.

    Raises:
        DamagedFileError: it is no index.
    """
    counts: dict[str, int] = {}
    for name in _weight_map(raw, label).values():
        counts[name] = counts.get(name, 0) + 1
    if not 0 < len(counts) <= MAX_SHARDS:
        raise damaged("bad_index", label, "shards", len(counts), f"1–{MAX_SHARDS}")
    return dict(sorted(counts.items()))


def _weight_map(raw: bytes, label: str) -> Mapping[str, str]:
    try:
        document: Any = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged("bad_index", label, "the file", "no JSON", "one object") from None
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise damaged("bad_index", label, "weight_map", "missing", "files by tensor name")
    for name in found.values():
        if not isinstance(name, str) or "/" in name or not is_safe_file_path(name):
            raise damaged("bad_index", label, "a shard's name", quoted(str(name)), "a plain name")
        if name.endswith(_PICKLES):
            raise pickled(name)
    return found


def _check_index(folder: Path, names: frozenset[str], shards: Sequence[ShardHeader]) -> None:
    """Every tensor of the index is in the shard that it names."""
    if INDEX not in names:
        return
    held = {tensor.name: shard.label for shard in shards for tensor in shard.tensors}
    for name, file in _weight_map(_read(folder / INDEX, MAX_INDEX_BYTES), INDEX).items():
        if held.get(name) != file:
            raise refused(
                "index_mismatch",
                f"{INDEX} says that {quoted(name)} is in {quoted(file)}, and it is not",
                hint="a shard is of another model: download the checkpoint again",
            )


# ---- reading


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read `{path}`: {error.strerror}") from None
    if len(raw) > limit:
        raise damaged("bad_config", path.name, "its size", "more", f"up to {limit} bytes")
    return raw


def _shard(path: Path, stamp: FileStamp) -> ShardHeader:
    try:
        with path.open("rb") as file:

            def read_at(offset: int, length: int) -> bytes:
                return os.pread(file.fileno(), length, offset)

            return parse_header(read_at, stamp.size_bytes, path.name)
    except OSError as error:
        raise NotFoundError(f"cannot read `{path}`: {error.strerror}") from None


def _template(folder: Path, names: frozenset[str]) -> str | None:
    """The chat template: a file of its own, or a string of the tokenizer's config."""
    try:
        if TEMPLATE in names:
            return _read(folder / TEMPLATE, _MAX_TEMPLATE_BYTES).decode("utf-8")
        if TOKENIZER_CONFIG in names:
            document = json.loads(_read(folder / TOKENIZER_CONFIG, _MAX_TEMPLATE_BYTES))
            found = document.get("chat_template") if isinstance(document, dict) else None
            return found if isinstance(found, str) else _default_template(found)
    except (ValueError, RecursionError, DamagedFileError):
        return None
    return None


def _default_template(found: object) -> str | None:
    """Of several by name the one that transformers takes where none is asked for."""
    named = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    texts = (one.get("template") for one in named if one.get("name") == "default")
    return next((text for text in texts if isinstance(text, str)), None)
