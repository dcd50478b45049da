"""Library adapters. They are imported inside the worker only, by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from loadmaster.engine.types import Backend, VirtualDevice
from loadmaster.errors import UsageError

NAMES = ("llamacpp", "transformers", "fake")


def open_backend(
    name: str,
    *,
    lib_dir: Path,
    python_dir: Path,
    devices: Sequence[VirtualDevice],
    options: Mapping[str, object],
) -> Backend:
    """Load a backend's libraries into this process, for good.

    Raises:
        EngineMissingError: the build's libraries cannot be loaded.
        UsageError: there is no such backend.
    """
    if name == "llamacpp":
        from loadmaster.engine.backends.llamacpp.backend import LlamaCpp

        return LlamaCpp(lib_dir=lib_dir, python_dir=python_dir, devices=devices)
    if name == "transformers":
        return _transformers(devices)
    if name == "fake":
        from loadmaster.engine.backends.fake import Fake

        return Fake(devices=devices, options=options)
    raise UsageError(f"there is no backend `{name}`", hint=f"one of: {', '.join(NAMES)}")


def _transformers(devices: Sequence[VirtualDevice]) -> Backend:
    if devices:
        raise UsageError("the transformers engine has no stand-in devices")
    from loadmaster.engine.backends.transformers.environment import prepare

    prepare()
    from loadmaster.engine.backends.transformers.backend import Transformers

    return Transformers()
