"""Machines that are not here: profiles shipped as JSON, and files written by `doctor`."""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.machine.types import Gpu, Machine, Ram
from loadmaster.schema import SchemaError, from_json, to_json

SCHEMA_VERSION = 1
_KEYS = ("schema_version", "sources", "machine")
_MAX_BYTES = 1 << 20  # a profile is a few kilobytes


def profile_names() -> tuple[str, ...]:
    """The shipped profiles, in alphabetical order."""
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def load_profile(name_or_path: str) -> Machine:
    """A shipped profile by its name, or a machine from a file.

    Raises:
        NotFoundError: neither a shipped name nor a readable file.
        UsageError: the file is not a machine; the message has the path of the offending key.
    """
    if name_or_path in profile_names():
        return decode_profile((_folder() / f"{name_or_path}.json").read_text("utf-8"), name_or_path)
    path = Path(name_or_path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(
            f"no machine profile `{name_or_path}`: {error.strerror}",
            hint=f"{_near(name_or_path)}; "
            "`loadmaster doctor --save-machine FILE` writes one of this machine",
        ) from None
    if len(content) > _MAX_BYTES:
        raise UsageError(
            f"`{name_or_path}` has more than {_MAX_BYTES} bytes: not a machine profile"
        )
    return decode_profile(content.decode("utf-8", errors="replace"), name_or_path)


def _near(name: str) -> str:
    close = difflib.get_close_matches(name, profile_names(), n=4, cutoff=0.5)
    shown = close or profile_names()
    return f"{'nearest' if close else 'shipped'} profiles: {', '.join(shown)}"


def profile_sources(name: str) -> tuple[str, ...]:
    """Where the figures of a shipped profile are from."""
    content = json.loads((_folder() / f"{name}.json").read_text("utf-8"))
    return tuple(map(str, content["sources"]))


def save_profile(machine: Machine, path: str | Path, *, sources: tuple[str, ...] = ()) -> None:
    """Write a machine so that `load_profile` gives it back.

    Raises:
        UsageError: the file cannot be written.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "sources": list(sources),
        "machine": to_json(machine),
    }
    try:
        Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}") from None


def decode_profile(text: str, origin: str) -> Machine:
    """The machine in a profile's text; `origin` names it in messages."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{origin}` is not a machine profile: {error}") from None
    _check_envelope(content, origin)
    try:
        machine = from_json(Machine, content["machine"])
        _check_figures(machine)
    except SchemaError as error:
        raise UsageError(
            f"`{origin}`: {error}",
            hint="`loadmaster doctor --save-machine FILE` writes a valid one",
        ) from None
    return machine


def _check_envelope(content: Any, origin: str) -> None:
    if not isinstance(content, dict) or "machine" not in content:
        raise UsageError(f"`{origin}` is not a machine profile: it has no `machine`")
    for key in content:
        if key not in _KEYS:
            raise UsageError(
                f"`{origin}`: {key}: unknown key", hint=f"the keys are {', '.join(_KEYS)}"
            )
    if content.get("schema_version") != SCHEMA_VERSION:
        version = content.get("schema_version")
        raise UsageError(
            f"`{origin}` has schema_version {version!r}, this loadmaster reads {SCHEMA_VERSION}"
        )


def _check_figures(machine: Machine) -> None:
    """What types cannot say: counts and rates are above 0, free is within total, GPUs are numbered
    in order."""
    _check_ram(machine.ram)
    _check_positive("Machine.cpu.logical_cores", machine.cpu.logical_cores)
    _check_positive("Machine.cpu.physical_cores", machine.cpu.physical_cores)
    for index, gpu in enumerate(machine.gpus):
        path = f"Machine.gpus[{index}]"
        if gpu.id != f"gpu:{index}":
            raise SchemaError(f"{path}.id is {gpu.id!r}, not 'gpu:{index}'")
        _check_gpu(path, gpu)
    if machine.disk_free_bytes is not None and machine.disk_free_bytes < 0:
        raise SchemaError(f"Machine.disk_free_bytes is {machine.disk_free_bytes}, below 0")


def _check_ram(ram: Ram) -> None:
    path = "Machine.ram"
    _check_free(path, ram.available_bytes, ram.total_bytes)
    _check_positive(f"{path}.bandwidth_bytes_s", ram.bandwidth_bytes_s)
    _check_positive(f"{path}.cgroup_limit_bytes", ram.cgroup_limit_bytes)
    if not 0 <= ram.swap_free_bytes <= ram.swap_total_bytes:
        raise SchemaError(
            f"{path}: {ram.swap_free_bytes} bytes of swap are free of {ram.swap_total_bytes}"
        )
    for name in ("cgroup_used_bytes", "mlock_limit_bytes"):
        value = getattr(ram, name)
        if value is not None and value < 0:
            raise SchemaError(f"{path}.{name} is {value}, below 0")


def _check_gpu(path: str, gpu: Gpu) -> None:
    _check_free(path, gpu.free_bytes, gpu.total_bytes)
    for name in _GPU_RATES:
        _check_positive(f"{path}.{name}", getattr(gpu, name))
    rules = gpu.rules
    if rules.alignment_bytes < 1 or rules.alignment_bytes.bit_count() != 1:
        raise SchemaError(f"{path}.rules.alignment_bytes is not a power of two")
    if rules.row_padding < 0:
        raise SchemaError(f"{path}.rules.row_padding is {rules.row_padding}, below 0")
    _check_positive(f"{path}.rules.offload_min_batch", rules.offload_min_batch)


_GPU_RATES = ("bandwidth_bytes_s", "link_bytes_s", "pcie_gen", "pcie_gen_now", "pcie_width",
              "pcie_width_max")  # fmt: skip


def _check_positive(path: str, value: int | None) -> None:
    if value is not None and value <= 0:
        raise SchemaError(f"{path} is {value}, not above 0 (null: unknown)")


def _check_free(path: str, free_bytes: int | None, total_bytes: int) -> None:
    if total_bytes <= 0:
        raise SchemaError(f"{path}.total_bytes is {total_bytes}, not above 0")
    if free_bytes is not None and not 0 <= free_bytes <= total_bytes:
        raise SchemaError(f"{path}: {free_bytes} bytes are free of {total_bytes}")


def _folder() -> Any:
    return resources.files("loadmaster.machine") / "profiles"
