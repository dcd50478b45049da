"""Memory outside the engine's buffers, as measured here: kept per device, driver and build.

A driver's context, workspaces and pools are in no breakdown. They are what is left of the process
total on a device when the engine's buffers are taken off, after the peak was committed; the largest
value seen counts. Until a device was measured, `plan.overhead` has a bound.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from loadmaster.machine.types import Gpu
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import CPU, Overheads
from loadmaster.schema import SchemaError, from_json
from loadmaster.settings import data_folder
from loadmaster.tasks.measurement import MemoryRow
from loadmaster.units import MIB, Bytes

# Readings of one driver scatter by about this much between runs (llama.cpp reports; VMM granules
# are 2 MiB, graphs and modules load in steps of a few).
SPREAD_BYTES = 32 * MIB


def calibrated_overheads(
    build_id: str,
    gpus: Sequence[Gpu],
    folder: Path | None = None,
    *,
    line_editor: bool = False,
    server: bool = False,
    schemas: bool = False,
) -> Overheads:
    """Bounds, replaced by what was measured where every GPU has been."""
    kept = _read(_file(folder))
    overheads = default_overheads(gpus, line_editor=line_editor, server=server, schemas=schemas)
    measured = {
        gpu.id: Bytes(kept[key] + SPREAD_BYTES)
        for gpu in gpus
        if (key := _key(build_id, gpu)) in kept
    }
    if not measured:
        return overheads
    return replace(
        overheads,
        device_bytes={**overheads.device_bytes, **measured},
        device_source="calibrated" if len(measured) == len(gpus) else "bound",
    )


def record(
    build_id: str, gpus: Sequence[Gpu], rows: Sequence[MemoryRow], folder: Path | None = None
) -> None:
    """Keep what a proved session took on each GPU beside its buffers. A full disk loses no run."""
    found = {
        _key(build_id, gpu): int(row.measured_bytes)
        for gpu in gpus
        for row in rows
        if row.device == gpu.id != CPU
        and not row.exact
        and row.cap_bytes is None
        and row.measured_bytes is not None
    }
    file = _file(folder)
    kept = _read(file)
    merged = {**kept, **{key: max(size, kept.get(key, 0)) for key, size in found.items()}}
    if merged != kept:
        with suppress(OSError):
            _write(file, merged)


def _key(build_id: str, gpu: Gpu) -> str:
    return f"{build_id} | {gpu.name} | {gpu.driver or 'unknown driver'}"


def _file(folder: Path | None) -> Path:
    return (folder or data_folder()) / "calibration.json"


def _read(file: Path) -> Mapping[str, int]:
    """What is kept; a damaged file counts as empty, its figures can be measured again."""
    try:
        return from_json(dict[str, int], json.loads(file.read_text()))
    except (OSError, ValueError, SchemaError):
        return {}


def _write(file: Path, values: Mapping[str, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as target:
        json.dump(dict(sorted(values.items())), target, indent=1)
        target.flush()
        os.fsync(target.fileno())
    Path(target.name).replace(file)
