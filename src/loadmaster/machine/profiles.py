"""Machines that are not here: profiles shipped as JSON, and files written by `doctor`."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.machine.types import Machine
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
            hint=f"shipped profiles are {', '.join(profile_names())}; "
            "`loadmaster doctor --save-machine FILE` writes one of this machine",
        ) from None
    if len(content) > _MAX_BYTES:
        raise UsageError(
            f"`{name_or_path}` has more than {_MAX_BYTES} bytes: not a machine profile"
        )
    return decode_profile(content.decode("utf-8", errors="replace"), name_or_path)


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
    """What types cannot say: GPUs are numbered in order, and free is within total."""
    _check_free("Machine.ram", machine.ram.available_bytes, machine.ram.total_bytes)
    for index, gpu in enumerate(machine.gpus):
        path = f"Machine.gpus[{index}]"
        if gpu.id != f"gpu:{index}":
            raise SchemaError(f"{path}.id is {gpu.id!r}, not 'gpu:{index}'")
        _check_free(path, gpu.free_bytes, gpu.total_bytes)
        if gpu.rules.alignment_bytes < 1 or gpu.rules.alignment_bytes.bit_count() != 1:
            raise SchemaError(f"{path}.rules.alignment_bytes is not a power of two")


def _check_free(path: str, free_bytes: int | None, total_bytes: int) -> None:
    if total_bytes <= 0:
        raise SchemaError(f"{path}.total_bytes is {total_bytes}, not above 0")
    if free_bytes is not None and not 0 <= free_bytes <= total_bytes:
        raise SchemaError(f"{path}: {free_bytes} bytes are free of {total_bytes}")


def _folder() -> Any:
    return resources.files("loadmaster.machine") / "profiles"
