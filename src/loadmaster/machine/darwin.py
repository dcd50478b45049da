"""A Mac, through `sysctl` and `vm_stat`. Written from their documented output, not run on one."""

from loadmaster.machine import parse
from loadmaster.machine.bandwidth import gpu_bandwidth
from loadmaster.machine.host import Found, Host
from loadmaster.machine.rules import RULES
from loadmaster.machine.types import Cpu, Gpu, Ram
from loadmaster.units import GIB, MIB, Bytes

_NAMES = (
    "hw.memsize", "hw.physicalcpu", "hw.logicalcpu", "machdep.cpu.brand_string",
    "machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional.arm64",
    "hw.optional.arm.FEAT_FP16", "hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_I8MM",
    "hw.optional.arm.FEAT_SME", "iogpu.wired_limit_mb", "vm.swapusage", "kern.osproductversion",
)  # fmt: skip


def sysctl(host: Host) -> dict[str, str]:
    """The values this module reads; names the system does not know are missing."""
    return parse.key_values(host.run(["sysctl", *_NAMES]) or "")


def os_name(values: dict[str, str]) -> str:
    version = values.get("kern.osproductversion")
    return f"macOS {version}" if version else "macOS"


def cpu(host: Host, values: dict[str, str]) -> Cpu:
    return Cpu(
        name=values.get("machdep.cpu.brand_string") or None,
        architecture=host.architecture,
        physical_cores=_number(values, "hw.physicalcpu"),
        logical_cores=_number(values, "hw.logicalcpu") or len(host.cpus),
        isa=parse.darwin_isa(values),
    )


def ram(host: Host, values: dict[str, str]) -> Ram:
    total = Bytes(_number(values, "hw.memsize") or 0)
    swap_total, swap_free = parse.swap_usage(values.get("vm.swapusage", "")) or (0, 0)
    return Ram(
        total_bytes=total,
        available_bytes=parse.vm_stat(host.run(["vm_stat"]) or "") or Bytes(0),
        swap_total_bytes=Bytes(swap_total),
        swap_free_bytes=Bytes(swap_free),
        cgroup_version=None,
        cgroup_limit_bytes=None,
        cgroup_used_bytes=None,
        mlock_limit_bytes=parse.mlock_limit(host.mlock_limit, None),
        bandwidth_bytes_s=gpu_bandwidth(values.get("machdep.cpu.brand_string", "")),
    )


def gpu(values: dict[str, str], memory: Ram) -> Found:
    """The GPU of an Apple chip; Intel Macs have none that Metal's kernels are written for."""
    name = values.get("machdep.cpu.brand_string", "")
    if not name.startswith("Apple"):
        return Found()
    limit = working_set(memory.total_bytes, _number(values, "iogpu.wired_limit_mb"))
    card = Gpu(
        id="",
        name=name,
        vendor="apple",
        backend="metal",
        total_bytes=limit,
        free_bytes=Bytes(min(limit, memory.available_bytes)),
        free_source="vm_stat",
        unified_memory=True,
        rules=RULES["metal"],
        bandwidth_bytes_s=memory.bandwidth_bytes_s,
    )
    warning = f"{name} shares its RAM between CPU and GPU: their budgets are parts of one memory"
    return Found(gpus=(card,), warnings=(warning,))


def working_set(total_bytes: int, limit_mb: int | None) -> Bytes:
    """Metal's recommendedMaxWorkingSetSize, which only Metal itself can be asked for.

    macOS grants two thirds of RAM up to 36 GiB and three quarters above it, unless
    `iogpu.wired_limit_mb` is set; the engine's own figure replaces this when a build is there.
    """
    if limit_mb:
        return Bytes(min(total_bytes, limit_mb * MIB))
    return Bytes(total_bytes * 2 // 3 if total_bytes <= 36 * GIB else total_bytes * 3 // 4)


def _number(values: dict[str, str], name: str) -> int | None:
    text = values.get(name, "")
    return int(text) if text.isdigit() else None
