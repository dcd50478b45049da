"""From `--vram` and `--ram` to hard caps per device. Pure.

A cap is on the process total of one device: what the user allowed, or what is free now less a
headroom, and in no case more than is free now.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from loadmaster.errors import UsageError
from loadmaster.machine.types import Gpu, Machine, Ram
from loadmaster.plan.types import CPU, Budget
from loadmaster.units import GIB, MIB, Bytes, format_size, parse_size, to_flag

# Left free on a GPU when the user named no figure. Two readings of an idle card differ by up to
# 190 MiB while other programs come and go, and a desktop takes more as windows open.
GPU_HEADROOM_BYTES = 256 * MIB
GPU_HEADROOM_PERCENT = 2
# Left free in RAM: the rest of the system grows too, and below about 5 % the kernel starts to drop
# the file pages of running programs.
RAM_HEADROOM_BYTES = 1 * GIB
RAM_HEADROOM_PERCENT = 5
# A headroom is never more than this part of what is free, so that a small machine can be used.
HEADROOM_SHARE_OF_FREE = 4
# Of a memory that GPU and host share, the host keeps an eighth (embeddings, buffers, the program
# itself), at least 2 GiB, at most half.
HOST_SHARE = 8
HOST_SHARE_BYTES = 2 * GIB

_PERCENT = re.compile(r"(\d+)(?:\.(\d+))?\s*%")
_NAMED = re.compile(r"(?:gpu:)?(\d+)\s*=\s*(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """One memory with a cap: how big it is, what is free of it, and how it is called."""

    device: str
    flag: str  # `--vram` or `--ram`
    what: str
    total_bytes: int
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cap:
    size_bytes: int
    origin: str


def make_budget(machine: Machine, vram: str | None = None, ram: str | None = None) -> Budget:
    """The caps of every GPU and of the host.

    `vram` is one figure for each GPU (`11.5GiB`, `90%` of its total), or figures by number
    (`0=8GiB,1=6GiB`), where a GPU without one gets nothing; `0` keeps everything on the CPU. `ram`
    is one figure. A cap above what is free now is lowered to that, and its origin says so.

    Raises:
        UsageError: no unit, below or above what the device has, a GPU that is not there, no RAM,
            or more than is free of a memory that GPU and host share.
    """
    host = _ram_pool(machine.ram)
    named = None if ram is None else _ram_from_flag(host, ram)
    gpu_caps = _default_gpus(machine, named) if vram is None else _gpus_from_flag(machine, vram)
    shared = sum(gpu_caps[gpu.id].size_bytes for gpu in machine.gpus if gpu.unified_memory)
    if named is not None and shared + named.size_bytes > machine.ram.free_bytes:
        raise _too_much_shared(machine, shared, named)
    if named is None:
        named = _default(host, RAM_HEADROOM_BYTES, RAM_HEADROOM_PERCENT)
        if shared:
            named = _rest_of_shared(named, shared)
    caps = {**gpu_caps, CPU: named}
    return Budget(
        caps={device: Bytes(cap.size_bytes) for device, cap in caps.items()},
        origin={device: cap.origin for device, cap in caps.items()},
    )


def headroom(total_bytes: int, free_bytes: int, least_bytes: int, percent: int) -> Bytes:
    """Bytes to leave free of `free_bytes`: a floor or a percentage of the device."""
    wanted = max(least_bytes, total_bytes * percent // 100)
    return Bytes(min(wanted, free_bytes // HEADROOM_SHARE_OF_FREE))


# --- what is free, when the user named no figure


def _default_gpus(machine: Machine, host: _Cap | None) -> dict[str, _Cap]:
    n_shared = sum(gpu.unified_memory for gpu in machine.gpus)
    return {
        gpu.id: _shared_gpu(machine, gpu, n_shared, host)
        if gpu.unified_memory
        else _default(_gpu_pool(gpu), GPU_HEADROOM_BYTES, GPU_HEADROOM_PERCENT)
        for gpu in machine.gpus
    }


def _default(pool: _Pool, least_bytes: int, percent: int) -> _Cap:
    free = pool.total_bytes if pool.free_bytes is None else pool.free_bytes
    kept = headroom(pool.total_bytes, free, least_bytes, percent)
    known = "free" if pool.free_bytes is not None else "in all, free unknown"
    return _Cap(
        size_bytes=free - kept,
        origin=f"{format_size(free)} {known}, less {format_size(kept)} headroom",
    )


def _shared_gpu(machine: Machine, gpu: Gpu, n_shared: int, host: _Cap | None) -> _Cap:
    """A GPU that lives in the host's RAM: what the host does not keep of the free memory."""
    pool = _default(_ram_pool(machine.ram), RAM_HEADROOM_BYTES, RAM_HEADROOM_PERCENT).size_bytes
    kept = _host_part(pool) if host is None else host.size_bytes
    free = gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes
    size = min(max(0, pool - kept) // n_shared, gpu.total_bytes, free)
    return _Cap(
        size_bytes=size,
        origin=f"{format_size(size)} of {format_size(pool)} free RAM, shared with the host",
    )


def _host_part(pool_bytes: int) -> int:
    return min(max(HOST_SHARE_BYTES, pool_bytes // HOST_SHARE), pool_bytes // 2)


def _rest_of_shared(host: _Cap, shared_bytes: int) -> _Cap:
    """What GPUs in the host's RAM leave to the host, so that together they stay inside it."""
    return _Cap(
        size_bytes=max(0, host.size_bytes - shared_bytes),
        origin=f"{host.origin} and {format_size(shared_bytes)} for the GPU, which shares it",
    )


def _too_much_shared(machine: Machine, shared_bytes: int, host: _Cap) -> UsageError:
    free = machine.ram.free_bytes
    left = _whole_mib(max(MIB, free - host.size_bytes))
    return UsageError(
        f"GPU and host share one memory: {format_size(shared_bytes)} and "
        f"{format_size(host.size_bytes)} are more than the {format_size(free)} that is free",
        hint=f"`--vram {left}` goes with that `--ram`",
        numbers={"asked_bytes": shared_bytes + host.size_bytes, "free_bytes": free},
    )


# --- what the user named


def _gpus_from_flag(machine: Machine, text: str) -> dict[str, _Cap]:
    pools = {gpu.id: _gpu_pool(gpu) for gpu in machine.gpus}
    if "=" in text:
        return _named_gpus(pools, text)
    if "," in text:
        raise UsageError(
            f"`--vram {text}` does not say which GPU gets what",
            hint=f"number them: `--vram {_numbered(text)}`",
        )
    if not pools:
        if _amount("--vram", text)(0):
            raise UsageError(
                f"`--vram {text}`: there is no GPU here",
                hint="leave `--vram` out; `loadmaster doctor` shows what was found",
            )
        return {}
    return {device: _cap(pool, text) for device, pool in pools.items()}


def _named_gpus(pools: dict[str, _Pool], text: str) -> dict[str, _Cap]:
    caps: dict[str, _Cap] = {}
    for part in text.split(","):
        match = _NAMED.fullmatch(part.strip())
        if match is None:
            raise UsageError(
                f"`--vram {text}`: `{part.strip()}` names no GPU",
                hint="write `--vram 0=8GiB,1=6GiB`, or one size for every GPU",
            )
        device = f"gpu:{int(match[1])}"
        if device not in pools:
            raise UsageError(f"`--vram {text}`: there is no {device}", hint=_gpu_hint(pools))
        if device in caps:
            raise UsageError(f"`--vram {text}` names {device} twice")
        caps[device] = _cap(pools[device], match[2])
    unnamed = _Cap(size_bytes=0, origin=f"not named in `--vram {text}`")
    return {device: caps.get(device, unnamed) for device in pools}


def _ram_from_flag(pool: _Pool, text: str) -> _Cap:
    cap = _cap(pool, text)
    if not _amount("--ram", text)(pool.total_bytes):
        raise UsageError(
            f"`--ram {text}` leaves no memory to run in",
            hint="leave `--ram` out to use what is free, or name a size: `--ram 8GiB`",
        )
    return cap


def _cap(pool: _Pool, text: str) -> _Cap:
    """The user's figure for one device, never above what is free there."""
    wanted = _amount(pool.flag, text)(pool.total_bytes)
    if wanted > pool.total_bytes:
        raise UsageError(
            f"`{pool.flag} {text}` is more than {pool.what} has: {format_size(pool.total_bytes)}",
            hint=f"`{pool.flag} {_whole_mib(pool.total_bytes)}` is all of it; "
            f"leave `{pool.flag}` out to use what is free",
            numbers={"asked_bytes": wanted, "total_bytes": pool.total_bytes},
        )
    if pool.free_bytes is not None and wanted > pool.free_bytes:
        return _Cap(
            size_bytes=pool.free_bytes,
            origin=f"`{pool.flag} {text}`, but {format_size(pool.free_bytes)} is free",
        )
    return _Cap(size_bytes=wanted, origin=f"`{pool.flag} {text}`")


def _amount(flag: str, text: str) -> Callable[[int], int]:
    """What `text` stands for on a device of so many bytes."""
    stripped = text.strip()
    percent = _PERCENT.fullmatch(stripped)
    if percent:
        # Integer arithmetic, so that 90% of a total is the same everywhere.
        parts = int(percent[1] + (percent[2] or ""))
        scale = 100 * 10 ** len(percent[2] or "")
        return lambda total: total * parts // scale
    if stripped == "0":
        return lambda total: 0
    try:
        size = parse_size(stripped)
    except UsageError as error:
        raise UsageError(f"`{flag} {text}`: {error.message}", hint=_hint(flag, error)) from None
    return lambda total: size


def _hint(flag: str, error: UsageError) -> str:
    return f"{error.hint}; or a part of the device, `{flag} 90%`"


def _numbered(text: str) -> str:
    return ",".join(f"{index}={part.strip()}" for index, part in enumerate(text.split(",")))


def _gpu_hint(pools: dict[str, _Pool]) -> str:
    if not pools:
        return "there is no GPU here: leave `--vram` out"
    return "the GPUs are " + ", ".join(f"{device} ({pool.what})" for device, pool in pools.items())


def _whole_mib(size_bytes: int) -> str:
    """The largest flag that is not above `size_bytes`."""
    return to_flag(size_bytes // MIB * MIB if size_bytes >= MIB else size_bytes)


def _gpu_pool(gpu: Gpu) -> _Pool:
    return _Pool(
        device=gpu.id,
        flag="--vram",
        what=gpu.name,
        total_bytes=gpu.total_bytes,
        free_bytes=gpu.free_bytes,
    )


def _ram_pool(ram: Ram) -> _Pool:
    limit = ram.cgroup_limit_bytes
    if limit is not None and limit < ram.total_bytes:
        return _Pool(
            device=CPU,
            flag="--ram",
            what="the cgroup of this process",
            total_bytes=limit,
            free_bytes=ram.free_bytes,
        )
    return _Pool(
        device=CPU,
        flag="--ram",
        what="this machine",
        total_bytes=ram.total_bytes,
        free_bytes=ram.free_bytes,
    )
