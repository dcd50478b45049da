"""llama.cpp in this process: the C API, the device registry, our native library and its log."""

import ctypes as c
import importlib
import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster.engine.types import DeviceFacts, VirtualDevice
from loadmaster.errors import EngineMissingError
from loadmaster.plan.types import BufferSizes
from loadmaster.units import Bytes

NATIVE_VERSION = 1
_GPU_TYPES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
_WARN, _ERROR, _CONTINUED = 3, 4, 5
_MARK = {_WARN: b"W ", _ERROR: b"E "}


class BufferRow(c.Structure):
    """`lm_buffer_row` of the native library."""

    _fields_ = (
        ("buffer_type", c.c_char * 64),
        ("device_name", c.c_char * 64),
        ("is_host", c.c_int32),
        ("model", c.c_size_t),
        ("context", c.c_size_t),
        ("compute", c.c_size_t),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU of the engine's registry."""

    id: str
    name: str
    handle: int
    virtual_index: int | None


class Library:
    """The loaded libraries. `api` is `llama_cpp.llama_cpp`; its calls are llama.h's."""

    def __init__(
        self, *, lib_dir: Path, python_dir: Path, devices: Sequence[VirtualDevice]
    ) -> None:
        self.api = _import_api(python_dir)
        self._ggml = _declare_registry(self.api._lib)
        self.last_error: str | None = None
        # ctypes keeps no reference to a callback: ours must live as long as the library.
        self._log_callback = self.api.llama_log_callback(self._log)
        self._log_level = 0
        self.api.llama_log_set(self._log_callback, None)
        self._native = _open_native(lib_dir)
        _check_structs(self.api, self._native)
        self.api.llama_backend_init()
        self._add_virtual(devices)
        self.devices = self._find_devices(devices)

    @property
    def native(self) -> c.CDLL:
        """Our own library, for callers that declare the functions they use."""
        return self._native

    def _log(self, level: int, text: bytes, _: object) -> None:
        if level != _CONTINUED:
            self._log_level = level
        if self._log_level < _WARN:
            return
        if self._log_level == _ERROR and level != _CONTINUED:
            self.last_error = text.decode("utf-8", "replace").strip()
        os.write(2, _MARK.get(level, b"") + text)

    def error(self) -> str:
        """The last error that the engine logged, and forget it."""
        error, self.last_error = self.last_error, None
        return error or "it gave no reason"

    def _add_virtual(self, devices: Sequence[VirtualDevice]) -> None:
        for index, device in enumerate(devices):
            rules = device.rules
            added = self._native.lm_add_device(
                f"GPU{index}".encode(),
                device.total_bytes,
                rules.alignment_bytes,
                rules.row_padding,
                rules.offload_min_batch,
                int(rules.pinned_host),
            )
            if added != index:
                raise EngineMissingError(f"the engine refused virtual device `{device.id}`")
            self._native.lm_device_set_f16_attention(index, int(rules.f16_attention))
        if devices:
            self._native.lm_register()

    def _find_devices(self, virtual: Sequence[VirtualDevice]) -> tuple[Device, ...]:
        """The engine's GPUs; where there are virtual ones, those alone."""
        ggml = self._ggml
        handles = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
        gpus = [h for h in handles if ggml.ggml_backend_dev_type(h) in _GPU_TYPES]
        names = {ggml.ggml_backend_dev_name(h).decode(): h for h in gpus}
        if virtual:
            return tuple(
                Device(id=d.id, name=f"GPU{i}", handle=names[f"GPU{i}"], virtual_index=i)
                for i, d in enumerate(virtual)
            )
        return tuple(
            Device(id=f"gpu:{i}", name=name, handle=handle, virtual_index=None)
            for i, (name, handle) in enumerate(names.items())
        )

    def facts(self, device: Device) -> DeviceFacts:
        """A device's memory as the engine sees it. On CUDA this makes a context on the card."""
        free, total = c.c_size_t(), c.c_size_t()
        self._ggml.ggml_backend_dev_memory(device.handle, c.byref(free), c.byref(total))
        description = self._ggml.ggml_backend_dev_description(device.handle)
        return DeviceFacts(
            id=device.id,
            engine_name=device.name,
            description=description.decode("utf-8", "replace"),
            total_bytes=Bytes(total.value),
            free_bytes=Bytes(free.value),
        )

    def buffer_type(self, device_id: str) -> int:
        """The default buffer type of `cpu` or a GPU; KeyError when there is no such device."""
        if device_id == "cpu":
            return int(self._ggml.ggml_backend_cpu_buffer_type())
        for device in self.devices:
            if device.id == device_id:
                return int(self._ggml.ggml_backend_dev_buffer_type(device.handle))
        raise KeyError(device_id)

    def buffers(self, context: int) -> tuple[BufferSizes, ...]:
        """The engine's own breakdown, summed by device; the host comes last."""
        sums = self._sums(self._rows(self._native.lm_memory_breakdown, context))
        return _by_device(sums)

    def dry_run_buffers(self, context: int, n_outputs_max: int) -> tuple[BufferSizes, ...]:
        """`buffers` of a context made without allocating, its compute buffers as a load has them.

        The breakdown's own are wrong where several GPUs hold all layers (`loadmaster_native.h`).
        """
        sums = self._sums(self._rows(self._native.lm_memory_breakdown, context))
        rows = self._rows(self._native.lm_reserve, context, n_outputs_max)
        if rows:
            reserved = self._sums(rows)
            sums = {key: [*sums[key][:2], reserved[key][2]] for key in sums}
        return _by_device(sums)

    def _rows(self, call: Any, context: int, *arguments: int) -> list[BufferRow]:
        """Rows that a call of the native library fills; none when it failed."""
        rows = (BufferRow * 64)()
        return list(rows[: max(0, call(context, *arguments, rows, len(rows)))])

    def _sums(self, rows: Sequence[BufferRow]) -> dict[str, list[int]]:
        """Model, context and compute bytes by device, buffer types of the host together."""
        ids = {device.name: device.id for device in self.devices}
        sums = {device.id: [0, 0, 0] for device in self.devices} | {"cpu": [0, 0, 0]}
        for row in rows:
            device = ids.get(row.device_name.decode(), "cpu")
            for index, size in enumerate((row.model, row.context, row.compute)):
                sums[device][index] += size
        return sums

    def usage(self, device: Device) -> tuple[int, int, int] | None:
        """Bytes in use, their peak, and refused allocations; None for a real card."""
        if device.virtual_index is None:
            return None
        used, peak, denied = c.c_size_t(), c.c_size_t(), c.c_size_t()
        self._native.lm_device_usage(
            device.virtual_index, c.byref(used), c.byref(peak), c.byref(denied)
        )
        return used.value, peak.value, denied.value


def _by_device(sums: Mapping[str, Sequence[int]]) -> tuple[BufferSizes, ...]:
    return tuple(
        BufferSizes(
            device=device,
            model_bytes=Bytes(model),
            context_bytes=Bytes(kv),
            compute_bytes=Bytes(compute),
        )
        for device, (model, kv, compute) in sums.items()
    )


def _import_api(python_dir: Path) -> Any:
    """The ctypes layer alone: the package's `__init__` would load numpy and a chat server."""
    folder = python_dir / "llama_cpp"
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(folder)]
    sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise EngineMissingError(
            f"the engine build in `{python_dir.parent}` cannot be loaded: {error}",
            hint="build it again: `loadmaster engine build`",
        ) from None


def _declare_registry(library: c.CDLL) -> c.CDLL:
    """Types of the ggml calls that the ctypes layer leaves out; they resolve through libllama."""
    pointer = c.c_void_p
    for name, arguments, result in (
        ("ggml_backend_dev_count", (), c.c_size_t),
        ("ggml_backend_dev_get", (c.c_size_t,), pointer),
        ("ggml_backend_dev_type", (pointer,), c.c_int),
        ("ggml_backend_dev_name", (pointer,), c.c_char_p),
        ("ggml_backend_dev_description", (pointer,), c.c_char_p),
        ("ggml_backend_dev_memory", (pointer, *[c.POINTER(c.c_size_t)] * 2), None),
        ("ggml_backend_dev_buffer_type", (pointer,), pointer),
        ("ggml_backend_cpu_buffer_type", (), pointer),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _open_native(lib_dir: Path) -> c.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = lib_dir / f"libloadmaster_native.{suffix}"
    try:
        return _declare_native(c.CDLL(str(path)), path.name)
    except (OSError, AttributeError) as error:  # AttributeError: an older one lacks a call
        raise EngineMissingError(
            f"cannot load `{path.name}`: {error}", hint="build it: `loadmaster engine build`"
        ) from None


def _declare_native(native: c.CDLL, name: str) -> c.CDLL:
    version = native.lm_version()
    if version != NATIVE_VERSION:
        raise EngineMissingError(
            f"`{name}` has version {version}, not {NATIVE_VERSION}",
            hint="build it again: `loadmaster engine build`",
        )
    native.lm_add_device.argtypes = [c.c_char_p, *[c.c_size_t] * 3, c.c_int, c.c_int]
    native.lm_device_usage.argtypes = [c.c_int, *[c.POINTER(c.c_size_t)] * 3]
    native.lm_memory_breakdown.argtypes = [c.c_void_p, c.POINTER(BufferRow), c.c_int]
    native.lm_reserve.argtypes = [c.c_void_p, c.c_uint32, c.POINTER(BufferRow), c.c_int]
    return native


def _check_structs(api: Any, native: c.CDLL) -> None:
    """Structs of another size would corrupt memory, quietly."""
    theirs = [c.c_size_t() for _ in range(3)]
    native.lm_struct_sizes(*map(c.byref, theirs))
    ours = (api.llama_model_params, api.llama_context_params, api.llama_batch)
    if [size.value for size in theirs] != [c.sizeof(struct) for struct in ours]:
        raise EngineMissingError(
            "the engine's structs do not have the sizes of its Python layer",
            hint="build it again: `loadmaster engine build`",
        )
