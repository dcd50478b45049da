"""Sizes in bytes: the one place where they are parsed and printed."""

import re
from typing import NewType

from loadmaster.errors import UsageError

Bytes = NewType("Bytes", int)

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_UNITS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)")
_UNITS_BY_LOWER = {name.lower(): factor for name, factor in _UNITS.items()}


def parse_size(text: str) -> Bytes:
    """Turn `11.5GiB` into bytes.

    A unit is required and is a power of two: a bare `6G` or `6GB` means 10⁹ to disk sellers and
    2³⁰ to llama.cpp, so it is refused.

    Raises:
        UsageError: no number, no unit, or a unit that means two things.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS_BY_LOWER.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"`{text}` is not a size", hint=_size_hint(text))
    whole, _, fraction = match["number"].partition(".")
    # Integer arithmetic: 0.1GiB must not depend on how a float rounds.
    scale = 10 ** len(fraction)
    return Bytes(int(whole + fraction) * factor // scale)


def _size_hint(text: str) -> str:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B?\s*", text, re.IGNORECASE)
    if match:
        number, letter = match[1], match[2].upper()
        return f"write `{number}{letter}iB`: a size needs a unit, KiB, MiB, GiB or TiB (2ⁿ bytes)"
    return "write a size as `11.5GiB` or `512MiB`; units are KiB, MiB, GiB and TiB (2ⁿ bytes)"


def format_size(size_bytes: int) -> str:
    """Print bytes with two decimals in the largest fitting unit: `11.50 GiB`, `17 B`."""
    sign, magnitude = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    for name, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            return f"{sign}{magnitude / factor:.2f} {name}"
    return f"{sign}{magnitude} B"


def to_flag(size_bytes: int) -> str:
    """Spell bytes so that `parse_size` gives them back, rounded up to a whole MiB when larger."""
    if size_bytes < MIB:
        return f"{size_bytes}B"
    return f"{-(-size_bytes // MIB)}MiB"


def align(size_bytes: int, alignment: int) -> int:
    """Round up to a multiple of `alignment` (ggml's GGML_PAD)."""
    return -(-size_bytes // alignment) * alignment
