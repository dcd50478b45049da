"""What a file is when it is not a GGUF: an error page, a pointer, another format."""

import re

from loadmaster.errors import DamagedFileError
from loadmaster.model.damage import quoted, refused
from loadmaster.units import format_size

MAGIC = b"GGUF"
LOOK_BYTES = 512  # the start of a file that the guesses need

_PREFIXES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "unpack it with `gunzip`"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint",
     "get the model's GGUF file, or convert the checkpoint with llama.cpp's convert_hf_to_gguf.py"),
    (b"\x80\x02", "a pickled PyTorch checkpoint", "get the model's GGUF file"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it with `unzstd`"),
    (b"BZh", "a bzip2 archive", "unpack it with `bunzip2`"),
    (b"\xfd7zXZ", "an xz archive", "unpack it with `unxz`"),
    (b"lmgg", "a legacy GGML file", "that format ended in 2023: get the model's GGUF file"),
    (b"fmgg", "a legacy GGMF file", "that format ended in 2023: get the model's GGUF file"),
    (b"tjgg", "a legacy GGJT file", "that format ended in 2023: get the model's GGUF file"),
    (b"algg", "a legacy GGLA adapter", "that format ended in 2023: get the adapter's GGUF file"),
)  # fmt: skip
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n.*?size (\d+)", re.DOTALL)
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<\?xml|<head)", re.IGNORECASE)


def not_gguf(start: bytes, size: int, label: str) -> DamagedFileError:
    """Word the refusal of a file that does not begin with the magic; `start` is its beginning."""
    what, hint = _guess(start, size)
    return refused(
        "not_gguf",
        f"{label} is not a GGUF file: it {what}",
        hint=hint,
        file=label,
        size_bytes=size,
    )


def _guess(start: bytes, size: int) -> tuple[str, str]:
    get_it = "get the model's .gguf file"
    if size == 0:
        return "is empty", "the download did not start: repeat it"
    if MAGIC.startswith(start[:4]):
        return f"ends after {size} bytes", "the download stopped early: resume or repeat it"
    pointer = _POINTER.match(start)
    if pointer:
        wanted = format_size(min(int(pointer[1][:18]), 1 << 60))
        return (
            f"is a git-lfs pointer to a file of {wanted}",
            "run `git lfs pull`, or download the file itself",
        )
    if _PAGE.match(start):
        return "is an HTML page", "the download got an error or login page: repeat it, signed in"
    for prefix, what, hint in _PREFIXES:
        if start.startswith(prefix):
            return f"is {what}", hint
    if _is_safetensors(start, size):
        return "is a safetensors file", "get the model's GGUF file, or convert it to GGUF"
    if re.match(rb"\s*(\{|\[\s*[\[{\"])", start):
        return "is JSON, perhaps an error message or a config file", get_it
    if not start.strip(b"\0"):
        return "begins with zeros", "the download left a hole: repeat it"
    return f"begins with {quoted(start[:16])}", get_it


def _is_safetensors(start: bytes, size: int) -> bool:
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and 8 + length <= size
