"""Why a worker died, in one clear line."""

import signal
from dataclasses import dataclass
from pathlib import Path

from loadmaster.engine.logtail import LogTail
from loadmaster.errors import EngineCrashedError, EngineError, ModelChangedError
from loadmaster.model.stamp import check_unchanged
from loadmaster.units import Bytes, format_size

_HINT = "the model is not loaded any more: run it again; `--debug` shows the engine's log"
_MEMORY_HINT = "lower `--ctx` or `-ngl`, or give it more memory: `--vram`, `--ram`"
_OUT_OF_MEMORY = ("out of memory", "bad_alloc", "failed to allocate", "cudaMalloc failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """What is known about the end of a worker."""

    status: int  # as `Popen.returncode`: negative for a signal
    doing: str
    oom_kills: int  # by the kernel, in the worker's cgroup or else on the machine, meanwhile
    ram_cap_bytes: Bytes | None
    files: tuple[Path, ...]
    stamp: str


def explain(death: Death, log: LogTail) -> EngineError:
    """The error that every open call and request ends with."""
    changed = _model_changed(death) if death.status == -signal.SIGBUS else None
    if changed is not None:
        return changed
    name = _signal_name(death.status)
    how = f"was killed by {name}" if name else f"ended with status {death.status}"
    numbers = {"signal": name, "exit_status": None if name else death.status}
    if death.status == -signal.SIGKILL and death.oom_kills:
        cap = death.ram_cap_bytes
        limit = f", its cap is {format_size(cap)}" if cap is not None else ""
        return EngineCrashedError(
            f"the engine ran out of memory while {death.doing}: the kernel killed it{limit}",
            hint=_MEMORY_HINT,
            numbers=numbers | {"ram_cap_bytes": cap},
        )
    last = log.last_error()
    said = f": {last}" if last else ""
    hint = _MEMORY_HINT if last and log.mentions(*_OUT_OF_MEMORY) else _HINT
    return EngineCrashedError(
        f"the engine {how} while {death.doing}{said}", hint=hint, numbers=numbers
    )


def _signal_name(status: int) -> str | None:
    if status >= 0:
        return None
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _model_changed(death: Death) -> ModelChangedError | None:
    """A mapped file that got shorter kills its reader by SIGBUS."""
    if not death.files or not death.stamp:
        return None
    try:
        check_unchanged(death.files, death.stamp)
    except ModelChangedError as error:
        return ModelChangedError(
            f"{error.message}, and the engine was killed by SIGBUS while {death.doing}",
            hint=error.hint,
        )
    return None


def machine_oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
