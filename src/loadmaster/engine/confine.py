"""What keeps a worker in its place, applied by the worker to itself before it reads any input.

Each protection reports whether this machine grants it; none of them is a condition for running.
A model file is untrusted input to native code: the worker may not open connections, write files,
dump its memory or outlive its parent.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loadmaster
from loadmaster.machine.types import Confinement
from loadmaster.schema import from_json
from loadmaster.units import Bytes

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
_PROBE_TIMEOUT_S = 10.0
_Confinements: Any = tuple[Confinement, ...]
OOM_SCORE_ADJ = 500  # the kernel takes the worker before the parent


class _NotGrantedError(Exception):
    """This machine does not grant a protection."""


def confine_worker(*, target: str, parent_pid: int) -> tuple[Confinement, ...]:
    """Confine this process, for good. Call it before any thread is started.

    `target` is the build's: a GPU driver needs to write its caches, a CPU build needs nothing.
    """
    return (
        _attempt("dies with its parent", lambda: _die_with_parent(parent_pid)),
        _attempt("no core dumps", _no_core_dumps),
        _attempt("first to be killed when memory runs out", _raise_oom_score),
        _attempt("no new privileges", lambda: _no_new_privileges(target)),
        _attempt("no network", _no_network),
        _attempt("no file writes", lambda: _no_file_writes(target)),
    )


def confine_renderer(limit_bytes: Bytes) -> tuple[Confinement, ...]:
    """Confine this process, which renders templates of models: it needs nothing but its pipes."""
    return (
        _attempt("no core dumps", _no_core_dumps),
        _attempt("no new privileges", lambda: _no_new_privileges("cpu")),
        _attempt("no network", _no_network),
        _attempt("no file writes", lambda: _no_file_writes("cpu")),
        cap_data(limit_bytes),
    )


def confine_server() -> tuple[Confinement, ...]:
    """Confine this process, which answers over HTTP: prompts are in its memory."""
    return (_attempt("no core dumps", _no_core_dumps),)


def cap_data(limit_bytes: Bytes) -> Confinement:
    """Cap private memory by RLIMIT_DATA, where no cgroup can be made.

    Not RLIMIT_AS: CUDA reserves far more address space than it uses.
    """

    def apply() -> str:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        return f"RLIMIT_DATA {limit_bytes}"

    return _attempt("memory cap", apply)


def _attempt(name: str, apply: Callable[[], str]) -> Confinement:
    try:
        return Confinement(name=name, active=True, detail=apply())
    except _NotGrantedError as refusal:
        return Confinement(name=name, active=False, detail=str(refusal))
    except (OSError, ValueError) as error:
        return Confinement(name=name, active=False, detail=str(error))


def _libc() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise _NotGrantedError(f"not on {sys.platform}")
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int | ctypes.c_void_p) -> None:
    padded = [*arguments, *([0] * (4 - len(arguments)))]
    converted = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]
    if _libc().prctl(ctypes.c_int(option), *converted) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _die_with_parent(parent_pid: int) -> str:
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent_pid:  # it died before the call
        os._exit(0)
    return "PR_SET_PDEATHSIG"


def _no_core_dumps() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return "RLIMIT_CORE 0"


def _raise_oom_score() -> str:
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    return f"oom_score_adj {OOM_SCORE_ADJ}"


def _no_new_privileges(target: str) -> str:
    # libcuda makes a missing /dev/nvidia-uvm through a setuid helper.
    if target == "cuda" and not Path("/dev/nvidia-uvm").exists():
        raise _NotGrantedError("the NVIDIA driver has yet to make /dev/nvidia-uvm")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return "PR_SET_NO_NEW_PRIVS"


# -- seccomp: no socket but the kernel's own kinds

_AF_UNIX, _AF_NETLINK = 1, 16
# (AUDIT_ARCH, socket, io_uring_setup); io_uring could open sockets unseen.
_SYSCALLS = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
_LOAD, _EQUAL, _GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def _filter_program(arch: int, socket: int, io_uring: int) -> bytes:
    """Classic BPF over `struct seccomp_data` (number, architecture, …, first argument at 16)."""
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, 9, arch),
        (_LOAD, 0, 0, 0),
        (_GREATER_EQUAL, 7, 0, 0x40000000),  # the x32 ABI
        (_EQUAL, 6, 0, io_uring),
        (_EQUAL, 0, 3, socket),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 1, 0, _AF_UNIX),
        (_EQUAL, 0, 1, _AF_NETLINK),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def _no_network() -> str:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise _NotGrantedError(f"no seccomp filter for {platform.machine()}")
    program = _filter_program(*numbers)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    holder = ctypes.create_string_buffer(header, len(header))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(holder)))
    return "seccomp: AF_UNIX and AF_NETLINK only"


# -- Landlock: no file is written, made or removed

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION_FLAG = 1
_WRITE_FILE = 1 << 1
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # remove and make
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # from version 2, 3


def _no_file_writes(target: str) -> str:
    libc = _libc()
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION_FLAG)
    if version < 1:
        raise _NotGrantedError("the kernel has no Landlock")
    handled = _CHANGES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("@Q", handled)
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        for folder in _writable(target):
            _allow_beneath(libc, ruleset, folder, handled & ~_REFER)
        if libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(ruleset)
    return f"Landlock version {version}"


def _writable(target: str) -> list[Path]:
    """Devices; for a GPU build the driver's kernel caches and its notes in /proc, too."""
    if target == "cpu":
        return [Path("/dev")]
    home = Path(os.environ.get("HOME", "/nonexistent"))
    with contextlib.suppress(OSError):  # without it, CUDA compiles its kernels at every start
        (home / ".nv").mkdir(exist_ok=True)
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108
    return [Path("/dev"), Path("/proc/self"), home / ".nv", home / ".cache", temporary]


def _allow_beneath(libc: ctypes.CDLL, ruleset: int, folder: Path, access: int) -> None:
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rule = struct.pack("=Qi", access, descriptor)
        libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
    finally:
        os.close(descriptor)


def probe() -> tuple[Confinement, ...]:
    """What a worker of a CPU build would be granted here; asked of a process of its own."""
    command = [sys.executable, "-P", "-m", "loadmaster.engine.worker", "--confinements"]
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(loadmaster.__file__).parents[1])}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=True, env=environment
        )
        granted: tuple[Confinement, ...] = from_json(_Confinements, json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    return granted
