"""What a probe may look at. Tests hand in a captured tree; `this_host` is the real one."""

import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadmaster import settings
from loadmaster.machine.types import Gpu
from loadmaster.units import Bytes

COMMAND_TIMEOUT_S = 5.0  # `sysctl` answers in milliseconds; a probe never hangs a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a probe saw: GPUs without our ids yet, and what it could not find out."""

    gpus: tuple[Gpu, ...] = ()
    warnings: tuple[str, ...] = ()


def _no_command(arguments: Sequence[str]) -> str | None:
    return None


def _no_library() -> Any:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Files below `root`, the environment, commands and NVML. Missing is None everywhere."""

    root: Path
    system: str = "Linux"  # as platform.system() spells it
    architecture: str = "x86_64"
    environ: Mapping[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] = (0,)  # those this process may run on
    mlock_limit: int | None = None  # RLIMIT_MEMLOCK; None: unlimited
    run: Callable[[Sequence[str]], str | None] = _no_command
    nvml: Callable[[], Any] = _no_library  # the pynvml module, not yet initialised
    disk_path: Path = Path("/")

    def path(self, path: str) -> Path:
        """Where `path` of the host is to be found."""
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str | None:
        """The content of a file; None when it is missing, unreadable or empty of text."""
        try:
            return self.path(path).read_text("utf-8", errors="replace")
        except OSError:
            return None

    def data(self, path: str) -> bytes | None:
        try:
            return self.path(path).read_bytes()
        except OSError:
            return None

    def integer(self, path: str) -> int | None:
        """A file that holds one number, decimal or 0x hexadecimal."""
        try:
            return int((self.text(path) or "").strip(), 0)
        except ValueError:
            return None

    def exists(self, path: str) -> bool:
        return self.path(path).exists()

    def can_open(self, path: str) -> bool:
        """Whether this user may read and write a device file."""
        return os.access(self.path(path), os.R_OK | os.W_OK)

    def glob(self, pattern: str) -> list[str]:
        """Matching paths of the host, sorted."""
        found = self.root.glob(pattern.lstrip("/"))
        return sorted("/" + str(path.relative_to(self.root)) for path in found)

    def disk_free(self) -> tuple[str, Bytes] | None:
        """The nearest existing folder above `disk_path` and the bytes free in it."""
        for folder in (self.disk_path, *self.disk_path.parents):
            try:
                return str(folder), Bytes(shutil.disk_usage(folder).free)
            except OSError:
                continue
        return None


def this_host(data_folder: Path | None = None) -> Host:
    """The machine this runs on; `data_folder` is where models and engines are kept."""
    return Host(
        root=Path("/"),
        system=platform.system(),
        architecture=platform.machine(),
        environ=os.environ,
        cpus=_own_cpus(),
        mlock_limit=_memlock(),
        run=_command_output,
        nvml=_pynvml,
        disk_path=data_folder or settings.data_folder(),
    )


def _own_cpus() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _memlock() -> int | None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _command_output(arguments: Sequence[str]) -> str | None:
    """stdout, also of a command that failed: `sysctl` fails for one unknown name of many."""
    import subprocess

    try:
        done = subprocess.run(
            list(arguments), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
