"""Where `doctor --measure` keeps what it found: per device, driver and engine build.

Every later plan of this machine reads it. Another driver or another build has other kernels, so its
figures are others'; they stay in the file until they are measured again.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loadmaster.machine.measurements import DeviceTimes, Measurements
from loadmaster.machine.types import Cpu, Gpu, Machine
from loadmaster.schema import SchemaError, from_json, to_json
from loadmaster.settings import data_folder

FILE_NAME = "measurements.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    hosts: Mapping[str, Measurements] = field(default_factory=dict)
    gpus: Mapping[str, DeviceTimes] = field(default_factory=dict)


def with_measurements(machine: Machine, build_id: str, folder: Path | None = None) -> Machine:
    """The machine with what was measured of it under this build, if anything was."""
    kept = _read(_file(folder))
    host = kept.hosts.get(_host_key(build_id, machine.cpu))
    if host is None:
        return machine
    gpus = tuple(
        replace(row, id=gpu.id)
        for gpu in machine.gpus
        if (row := kept.gpus.get(_gpu_key(build_id, gpu))) is not None
    )
    return replace(machine, measured=replace(host, devices=(*host.devices, *gpus)))


def keep(
    machine: Machine, build_id: str, measured: Measurements, folder: Path | None = None
) -> Path:
    """Write what was measured beside what is there; gives the file.

    Raises:
        OSError: it cannot be written.
    """
    file = _file(folder)
    kept = _read(file)
    by_id = {gpu.id: gpu for gpu in machine.gpus}
    host = replace(measured, devices=tuple(row for row in measured.devices if row.id not in by_id))
    gpus = {_gpu_key(build_id, by_id[row.id]): row for row in measured.devices if row.id in by_id}
    merged = _Kept(
        hosts={**kept.hosts, _host_key(build_id, machine.cpu): host}, gpus={**kept.gpus, **gpus}
    )
    _write(file, merged)
    return file


def _host_key(build_id: str, cpu: Cpu) -> str:
    cores = cpu.physical_cores or cpu.logical_cores
    return f"{build_id} | {cpu.name or cpu.architecture} | {cores} cores"


def _gpu_key(build_id: str, gpu: Gpu) -> str:
    return f"{build_id} | {gpu.name} | {gpu.driver or 'unknown driver'}"


def _file(folder: Path | None) -> Path:
    return (folder or data_folder()) / FILE_NAME


def _read(file: Path) -> _Kept:
    """What is kept; a damaged file counts as empty, its figures can be measured again."""
    try:
        return from_json(_Kept, json.loads(file.read_text()))
    except (OSError, ValueError, SchemaError):
        return _Kept()


def _write(file: Path, kept: _Kept) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as target:
        json.dump(to_json(kept), target)
        target.flush()
        os.fsync(target.fileno())
    Path(target.name).replace(file)
