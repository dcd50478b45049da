"""CPU and RAM of a Linux host, from /proc and /sys."""

from loadmaster.machine import parse, parse_gpu
from loadmaster.machine.host import Host
from loadmaster.machine.types import Cpu, Ram
from loadmaster.units import Bytes


def cpu(host: Host) -> Cpu:
    """Cores that this process may use: its affinity and its cgroup's quota are counted in."""
    cpuinfo = host.text("/proc/cpuinfo") or ""
    cores = _physical_cores(host)
    quota = cpu_quota(host)
    if cores is not None and quota is not None:
        cores = max(1, min(cores, int(quota)))
    return Cpu(
        name=parse.cpu_name(cpuinfo),
        architecture=host.architecture,
        physical_cores=cores,
        logical_cores=len(host.cpus),
        isa=parse.cpu_isa(cpuinfo),
    )


def _physical_cores(host: Host) -> int | None:
    """Cores behind `host.cpus`, two hyper-threads being one; None without a topology."""
    cores = set()
    for number in host.cpus:
        folder = f"/sys/devices/system/cpu/cpu{number}/topology"
        core = host.integer(f"{folder}/core_id")
        if core is None:
            return None
        cores.add((host.integer(f"{folder}/physical_package_id"), core))
    return len(cores)


def cpu_quota(host: Host) -> float | None:
    """CPUs granted by the tightest cgroup v2 quota; None when there is none."""
    texts = (host.text(f"{folder}/cpu.max") for folder in _folders(host, version=2))
    quotas = [quota for quota in map(parse.cpu_quota, texts) if quota is not None]
    return min(quotas, default=None)


def ram(host: Host) -> Ram:
    """Memory now; a cgroup's limit is given when it is below the machine's RAM."""
    table = parse.meminfo(host.text("/proc/meminfo") or "")
    total = table.get("MemTotal", Bytes(0))
    version, level = _cgroup(host, total)
    modules = parse_gpu.memory_modules(host.data("/sys/firmware/dmi/tables/DMI") or b"")
    return Ram(
        total_bytes=total,
        # Kernels before 3.14 have no MemAvailable; MemFree is never above it.
        available_bytes=table.get("MemAvailable", table.get("MemFree", Bytes(0))),
        swap_total_bytes=table.get("SwapTotal", Bytes(0)),
        swap_free_bytes=table.get("SwapFree", Bytes(0)),
        cgroup_version=version,
        cgroup_limit_bytes=None if level is None else Bytes(level.limit_bytes or 0),
        cgroup_used_bytes=None if level is None else Bytes(level.used_bytes),
        mlock_limit_bytes=parse.mlock_limit(host.mlock_limit, host.text("/proc/self/status")),
        bandwidth_bytes_s=parse_gpu.modules_bandwidth(modules),
    )


def _cgroup(
    host: Host, total_bytes: int
) -> tuple[parse.CgroupVersion | None, parse.CgroupLevel | None]:
    """Version of the hierarchy that has the memory controller, and its tightest level."""
    for version in (1, 2):
        files = [_level(host, folder, version) for folder in _folders(host, version=version)]
        levels = [level for level in files if level is not None]
        if levels:
            return version, parse.tightest(levels, total_bytes)
    return None, None


def _folders(host: Host, *, version: parse.CgroupVersion) -> tuple[str, ...]:
    """The process's own cgroup and those above it."""
    path = parse.cgroup_path(host.text("/proc/self/cgroup") or "", version)
    for mount in parse.cgroup_mounts(host.text("/proc/self/mountinfo") or ""):
        if mount.version == version and path is not None:
            return parse.cgroup_folders(mount, path)
    return ()


def _level(host: Host, folder: str, version: parse.CgroupVersion) -> parse.CgroupLevel | None:
    """None where the folder has no memory controller, as the root of v2."""

    def text(name: str) -> str | None:
        return host.text(f"{folder}/{name}")

    if version == 2:
        if text("memory.current") is None:
            return None
        return parse.cgroup_v2_level(
            text("memory.max"), text("memory.high"), text("memory.current"), text("memory.stat")
        )
    if text("memory.usage_in_bytes") is None:
        return None
    return parse.cgroup_v1_level(
        text("memory.limit_in_bytes"), text("memory.usage_in_bytes"), text("memory.stat")
    )
