"""The shapes that ship, and a MODEL argument that names one: `shape:llama-3-70b@Q4_K_M`."""

import difflib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model.remote import skeleton_folder
from loadmaster.model.shapes.checkpoints import QUANTIZATIONS
from loadmaster.model.shapes.families import FAMILIES, outline_of
from loadmaster.model.shapes.header import encode
from loadmaster.model.shapes.mixes import MIXES, typed
from loadmaster.model.shapes.types import Shape
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.schema import SchemaError, from_json

PREFIX = "shape:"
USUAL = "Q4_K_M"
SCHEMA_VERSION = 1
# What `--compare` shows of a shape that names no quantization: one mix for each half bit or so.
COMPARED = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS",
            "Q2_K", "IQ2_M", "IQ2_XS")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeReference:
    """`shape:NAME` or `shape:NAME@QUANTIZATION`."""

    name: str
    quantization: str | None = None

    def __str__(self) -> str:
        at = f"@{self.quantization}" if self.quantization else ""
        return f"{PREFIX}{self.name}{at}"


def is_shape(text: str) -> bool:
    """Whether a MODEL argument names a shape."""
    return text.startswith(PREFIX)


def parse_shape(text: str) -> ShapeReference:
    """Read `shape:NAME[@QUANTIZATION]`; both are checked.

    Raises:
        NotFoundError: no such shape or quantization; the nearest are named.
    """
    name, separator, quantization = text.removeprefix(PREFIX).partition("@")
    shape = load_shape(name)
    if not separator:
        return ShapeReference(name=name)
    label = quantization.upper()
    if label not in (*quantizations_of(shape), *QUANTIZATIONS):
        raise _unknown_quantization(shape, quantization)
    return ShapeReference(name=name, quantization=label)


def shape_names() -> tuple[str, ...]:
    """The shipped shapes, in alphabetical order."""
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


@cache
def load_shape(name: str) -> Shape:
    """A shipped shape.

    Raises:
        NotFoundError: there is none of this name; the nearest are named.
    """
    if name not in shape_names():
        near = difflib.get_close_matches(name, shape_names(), n=4, cutoff=0.4)
        shown = ", ".join(f"`{PREFIX}{one}`" for one in near or shape_names())
        raise NotFoundError(f"there is no shape `{name}`", hint=f"nearest: {shown}")
    return decode_shape((_folder() / f"{name}.json").read_text("utf-8"), name)


def decode_shape(text: str, name: str) -> Shape:
    """The shape in a file's text.

    Raises:
        UsageError: it is not one; the message has the path of the offending key.
    """
    try:
        shape = from_json(Shape, json.loads(text))
        _check(shape, name)
    except ValueError as error:
        raise UsageError(f"the shape `{name}` is not readable: {error}") from None
    return shape


def _check(shape: Shape, name: str) -> None:
    if shape.schema_version != SCHEMA_VERSION:
        raise SchemaError(f"Shape.schema_version is {shape.schema_version}, not {SCHEMA_VERSION}")
    if shape.name != name:
        raise SchemaError(f"Shape.name is {shape.name!r}, not {name!r}")
    if shape.family not in FAMILIES:
        raise SchemaError(f"Shape.family {shape.family!r} is none of {', '.join(FAMILIES)}")
    if unknown := set(shape.only) - MIXES.keys():
        raise SchemaError(f"Shape.only: no quantization {min(unknown)!r}")


def quantizations_of(shape: Shape) -> tuple[str, ...]:
    """The quantizations a shape can be planned in, from the most bits to the fewest."""
    if shape.only:
        return shape.only
    return tuple(mix for mix in MIXES if mix != "MXFP4")


def compared_quantizations(shape: Shape) -> tuple[str, ...]:
    """Those that a comparison shows when none is named."""
    return shape.only or COMPARED


def _unknown_quantization(shape: Shape, wanted: str) -> NotFoundError:
    known = quantizations_of(shape)
    near = difflib.get_close_matches(wanted.upper(), (*known, *QUANTIZATIONS), n=4, cutoff=0.4)
    if shape.only:
        why = f"{', '.join(known)}: its published weights are in that type"
        return NotFoundError(f"`{shape.name}` has no {wanted}", hint=f"it has {why}")
    has = f"it has {', '.join(known)}; of safetensors {', '.join(QUANTIZATIONS)}"
    shown = f"nearest: {', '.join(near)}" if near else has
    return NotFoundError(f"`{shape.name}` has no {wanted}", hint=shown)


def shape_header(shape: Shape, quantization: str) -> tuple[bytes, int]:
    """The header of the file that llama-quantize would make, and that file's size. Pure."""
    outline = outline_of(shape)
    rows = [
        (tensor.name, type_name, tensor.shape)
        for tensor, type_name in typed(
            outline.tensors, shape.dims, shape.architecture, quantization
        )
    ]
    metadata = {**outline.metadata, "general.file_type": MIXES[quantization].file_type}
    return encode(metadata, rows)


def shape_model(reference: ShapeReference) -> ModelSpec:
    """A shape as a model: its header lies in the cache as a sparse file of the true size."""
    shape = load_shape(reference.name)
    quantization = reference.quantization or (shape.only[0] if shape.only else USUAL)
    header, size = shape_header(shape, quantization)
    path = skeleton_folder() / "shapes" / f"{shape.name}-{quantization}.gguf"
    if not _is_current(path, header, size):
        _write(path, header, size)
    return read_model(path)


def _is_current(path: Path, header: bytes, size: int) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header
    except OSError:
        return False


def _write(path: Path, header: bytes, size: int) -> None:
    """Beside, then renamed: another process may be reading the same shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(header)
        file.truncate(size)
    Path(file.name).replace(path)


def _folder() -> Any:
    return resources.files("loadmaster.model.shapes")
