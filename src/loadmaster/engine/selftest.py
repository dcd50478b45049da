"""Tests an engine build, in a process of its own.

`python -m loadmaster.engine.selftest BUILD [MODEL]` prints one JSON object, with a list of checks:
`{"checks": [{"name": …, "passed": …, "detail": …}]}`. A build that kills this process failed too.
"""

import ctypes as C
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from loadmaster.engine import probe_model
from loadmaster.model.source import read_model

NATIVE_VERSION = 1  # lm_version() of the native library this version of loadmaster speaks to

_ALIGNMENT = 128
_FIRST_TOKEN = 1
_N_TOKENS = 16
_DEMO_PROMPT = range(300, 332)
_DEVICE_BYTES = 1 << 30
# Kernels of another device may round otherwise; the choice must be as good within this.
_LOGIT_TOLERANCE = 0.05


class _Row(C.Structure):
    _fields_ = (
        ("buffer_type", C.c_char * 64),
        ("device_name", C.c_char * 64),
        ("is_host", C.c_int32),
        ("model", C.c_size_t),
        ("context", C.c_size_t),
        ("compute", C.c_size_t),
    )


class _Engine(NamedTuple):
    llama: Any  # the ctypes module of llama.h
    native: C.CDLL


class _Open(NamedTuple):
    """A model on a device, with its context."""

    model: Any
    context: Any


def main(build: Path, demo: Path | None) -> dict[str, object]:
    """Run every check, stopping where a later one could not run."""
    checks: list[dict[str, object]] = []
    for name, check in _checks(build, demo):
        try:
            passed, detail = check()
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
        checks.append({"name": name, "passed": passed, "detail": detail})
        if not passed:
            break
    return {"checks": checks}


Check = Callable[[], tuple[bool, str]]


def _checks(build: Path, demo: Path | None) -> Iterator[tuple[str, Check]]:
    loaded: list[_Engine] = []

    def load() -> tuple[bool, str]:
        loaded.append(_load(build))
        return True, "libllama and the native library"

    yield "loads", load
    engine = loaded[0]
    yield "version", lambda: _version(engine)
    gpus = _gpus(engine)
    virtual = _add_device(engine)
    with TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.gguf"
        probe_model.write(probe)
        yield "header bytes = engine bytes", lambda: _bytes(engine, probe, virtual)
        yield "tokens on the CPU", lambda: _tokens(engine, probe, None)
        yield "tokens on a virtual device", lambda: _tokens(engine, probe, virtual)
        yield "bytes on a virtual device", lambda: _account(engine, probe, virtual)
        for name, gpu in gpus:
            yield f"tokens on {name}", partial(_tokens, engine, probe, gpu)
    if demo is not None:
        yield "demo model, header", lambda: _weights(engine, demo)
        yield "demo model, tokens", lambda: _agree(engine, demo, gpus[0][1] if gpus else virtual)


# ---- the checks


def _load(build: Path) -> _Engine:
    os.environ["LLAMA_CPP_LIB_PATH"] = str(build / "lib")
    sys.path.insert(0, str(build / "python"))
    from llama_cpp import llama_cpp as llama

    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    native = C.CDLL(str(build / "lib" / f"libloadmaster_native{suffix}"))
    native.lm_add_device.argtypes = [
        C.c_char_p,
        C.c_size_t,
        C.c_size_t,
        C.c_size_t,
        C.c_int,
        C.c_int,
    ]
    native.lm_memory_breakdown.argtypes = [C.c_void_p, C.POINTER(_Row), C.c_int]
    native.lm_device_usage.argtypes = [C.c_int, *[C.POINTER(C.c_size_t)] * 3]
    native.lm_struct_sizes.argtypes = [C.POINTER(C.c_size_t)] * 3
    native.ggml_backend_dev_get.argtypes = [C.c_size_t]
    native.ggml_backend_dev_type.argtypes = native.ggml_backend_dev_name.argtypes = [C.c_void_p]
    native.ggml_backend_dev_get.restype = native.ggml_backend_dev_by_name.restype = C.c_void_p
    native.ggml_backend_dev_count.restype = C.c_size_t
    native.ggml_backend_dev_name.restype = C.c_char_p
    llama.llama_log_set(_SILENCE, None)
    llama.llama_backend_init()
    return _Engine(llama, native)


_SILENCE = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(lambda level, text, data: None)


def _version(engine: _Engine) -> tuple[bool, str]:
    found = engine.native.lm_version()
    if found != NATIVE_VERSION:
        return False, f"the native library has version {found}, expected {NATIVE_VERSION}"
    sizes = [C.c_size_t() for _ in range(3)]
    engine.native.lm_struct_sizes(*map(C.byref, sizes))
    names = ("llama_model_params", "llama_context_params", "llama_batch")
    for name, size in zip(names, sizes, strict=True):
        ours = C.sizeof(getattr(engine.llama, name))
        if ours != size.value:
            return (
                False,
                f"{name} has {size.value} bytes in the library, {ours} in its ctypes layer",
            )
    return True, f"native {found}; the structs of both sides have the same size"


def _bytes(engine: _Engine, path: Path, device: int) -> tuple[bool, str]:
    opened = _open(engine, path, device, no_alloc=True)
    model, cache, _ = _on_device(engine, opened)
    _close(engine, opened)
    expected = (probe_model.device_bytes(_ALIGNMENT), probe_model.cache_bytes())
    return (model, cache) == expected, (
        f"model {model} bytes, KV {cache}; from the header {expected[0]} and {expected[1]}"
    )


def _tokens(engine: _Engine, path: Path, device: int | None) -> tuple[bool, str]:
    opened = _open(engine, path, device)
    rows = list(_decode(engine, opened, [_FIRST_TOKEN], _N_TOKENS))
    _close(engine, opened)
    said = [_best(row) for row in rows]
    expected = probe_model.successors(_FIRST_TOKEN, _N_TOKENS)
    if not all(map(math.isfinite, (x for row in rows for x in row))):
        return False, "a logit is not a finite number"
    if said != expected:
        return False, f"{said}, expected {expected}"
    return True, f"{len(said)} tokens as expected"


def _account(engine: _Engine, path: Path, device: int) -> tuple[bool, str]:
    opened = _open(engine, path, device)
    list(_decode(engine, opened, [_FIRST_TOKEN], 1))
    told = sum(_on_device(engine, opened))
    counts = [C.c_size_t() for _ in range(3)]
    engine.native.lm_device_usage(0, *map(C.byref, counts))
    _close(engine, opened)
    used = counts[0].value
    return used == told, f"the device holds {used} bytes, the engine's breakdown says {told}"


def _weights(engine: _Engine, path: Path) -> tuple[bool, str]:
    opened = _open(engine, path, None, no_alloc=True)
    engines = engine.llama.llama_model_size(opened.model)
    _close(engine, opened)
    ours = read_model(path).weight_bytes
    return ours == engines, f"weights {engines} bytes, from the header {ours}"


def _agree(engine: _Engine, path: Path, device: int) -> tuple[bool, str]:
    """The CPU chooses; the device, fed the same tokens, must find no choice worse than its own."""
    prompt = list(_DEMO_PROMPT)
    on_cpu = _open(engine, path, None)
    said = [_best(row) for row in _decode(engine, on_cpu, prompt, _N_TOKENS)]
    _close(engine, on_cpu)
    on_device = _open(engine, path, device)
    gaps = [
        max(row) - row[token]
        for token, row in zip(
            said, _decode(engine, on_device, prompt, _N_TOKENS, said), strict=True
        )
    ]
    _close(engine, on_device)
    worst = max(gaps)
    return worst <= _LOGIT_TOLERANCE, f"largest difference to the CPU's choice {worst:.4f} logits"


# ---- the engine


def _gpus(engine: _Engine) -> list[tuple[str, int]]:
    native = engine.native
    devices = [native.ggml_backend_dev_get(i) for i in range(native.ggml_backend_dev_count())]
    return [
        (native.ggml_backend_dev_name(device).decode(), device)
        for device in devices
        if native.ggml_backend_dev_type(device) in (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
    ]


def _add_device(engine: _Engine) -> int:
    native = engine.native
    native.lm_add_device(b"Virtual0", _DEVICE_BYTES, _ALIGNMENT, 0, 0, 0)
    native.lm_register()
    device = native.ggml_backend_dev_by_name(b"Virtual0")
    if not device:
        raise RuntimeError("a virtual device could not be registered")
    return int(device)


def _open(engine: _Engine, path: Path, device: int | None, *, no_alloc: bool = False) -> _Open:
    llama = engine.llama
    devices = (C.c_void_p * 2)(device, None)
    model_params = llama.llama_model_default_params()
    model_params.devices = C.cast(devices, C.c_void_p)
    model_params.n_gpu_layers = 999 if device is not None else 0
    model_params.no_alloc = no_alloc
    model_params.load_mode = 0  # LLAMA_LOAD_MODE_NONE
    model = llama.llama_model_load_from_file(os.fsencode(path), model_params)
    if not model:
        raise RuntimeError(f"the engine refused `{path.name}`")
    context_params = llama.llama_context_default_params()
    context_params.n_ctx = probe_model.N_CTX
    context_params.n_batch = context_params.n_ubatch = 64
    context_params.n_threads = context_params.n_threads_batch = 1
    context_params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED: every head width
    context = llama.llama_init_from_model(model, context_params)
    if not context:
        llama.llama_model_free(model)
        raise RuntimeError(f"the engine made no context for `{path.name}`")
    return _Open(model, context)


def _close(engine: _Engine, opened: _Open) -> None:
    engine.llama.llama_free(opened.context)
    engine.llama.llama_model_free(opened.model)


def _decode(
    engine: _Engine, opened: _Open, prompt: Sequence[int], count: int, forced: Sequence[int] = ()
) -> Iterator[list[float]]:
    """The logits of `count` steps, each fed the forced token or the likeliest one."""
    llama = engine.llama
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(opened.model))
    tokens = list(prompt)
    for step in range(count):
        fed = (llama.llama_token * len(tokens))(*tokens)
        status = llama.llama_decode(opened.context, llama.llama_batch_get_one(fed, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        row = llama.llama_get_logits_ith(opened.context, -1)[:n_vocab]
        yield row
        tokens = [forced[step] if forced else _best(row)]


def _best(row: Sequence[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def _on_device(engine: _Engine, opened: _Open) -> tuple[int, int, int]:
    rows = (_Row * 16)()
    count = engine.native.lm_memory_breakdown(opened.context, rows, len(rows))
    ours = [row for row in rows[:count] if row.device_name]
    return sum(r.model for r in ours), sum(r.context for r in ours), sum(r.compute for r in ours)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)))
