"""Starting a worker process: its environment is an allow-list, its streams are ours."""

import contextlib
import importlib.util
import os
import py_compile
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import loadmaster
from loadmaster.engine.types import EngineBuild

# What a worker may know. No tokens, no keys, nothing that loads code or changes allocations
# (LD_PRELOAD, GGML_BACKEND_PATH, GGML_CUDA_ENABLE_UNIFIED_MEMORY, LLAMA_ARG_*).
_PASSED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "ONEAPI_DEVICE_SELECTOR",
)

_LARGE_BLOCK = str(1 << 20)  # bytes from which malloc maps a block, and unmaps it when it is freed


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """A started worker: its process, our end of the socket, the read end of its log."""

    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    log_fd: int


def worker_environment(
    build: EngineBuild, min_batch: int | None, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The whole environment of a worker."""
    source = os.environ if environment is None else environment
    passed = {name: source[name] for name in _PASSED if name in source}
    ours = {
        "GGML_NO_BACKTRACE": "1",  # an abort would run a debugger from PATH
        "LLAMA_CPP_LIB_PATH": str(build.lib_dir),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the driver's order, as NVML has it
        "PYTHONPATH": str(Path(loadmaster.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Left alone, glibc raises its thresholds to the largest block it has seen freed, and what
        # staged the largest tensor stays with the process: 15 MiB more than the plan (docs/log.md).
        "MALLOC_MMAP_THRESHOLD_": _LARGE_BLOCK,
        "MALLOC_TRIM_THRESHOLD_": _LARGE_BLOCK,
    }
    if min_batch is not None:
        ours["GGML_OP_OFFLOAD_MIN_BATCH"] = str(min_batch)  # read once, when the library loads
    return passed | ours


def spawn_worker(build: EngineBuild, min_batch: int | None) -> Spawned:
    """Start a worker. It lives no longer than the calling thread: PR_SET_PDEATHSIG says so."""
    _compile_ctypes_layer(build)
    ours, theirs = socket.socketpair()
    log_read, log_write = os.pipe()
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # never import from the current folder
                "-m",
                "loadmaster.engine.worker",
                f"--fd={theirs.fileno()}",
                f"--parent={os.getpid()}",
                f"--target={build.target}",
            ],
            env=worker_environment(build, min_batch),
            stdin=subprocess.DEVNULL,
            stdout=log_write,
            stderr=log_write,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's
        )
    except BaseException:
        ours.close()
        os.close(log_read)
        raise
    finally:
        theirs.close()
        os.close(log_write)
    os.set_blocking(log_read, False)
    return Spawned(process=process, connection=ours, log_fd=log_read)


def _compile_ctypes_layer(build: EngineBuild) -> None:
    """5,400 lines take 0.4 s to compile, and the worker may not write the result."""
    for name in ("llama_cpp.py", "_ctypes_extensions.py"):
        source = build.python_dir / "llama_cpp" / name
        with contextlib.suppress(OSError, py_compile.PyCompileError):
            if source.exists() and not Path(importlib.util.cache_from_source(source)).exists():
                py_compile.compile(str(source), doraise=True, quiet=1)
