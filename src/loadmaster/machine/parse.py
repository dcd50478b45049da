"""Captured text to facts about the host. Pure: nothing here reads a file.

Every function takes the text of one source and returns None, or leaves a key out, where the
source does not say.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loadmaster.units import KIB, MIB, Bytes

# cgroup v1 says "no limit" as LONG_MAX rounded down to a page; anything near it is none.
_UNLIMITED = 1 << 60

CgroupVersion = Literal[1, 2]

# Flags of /proc/cpuinfo by the names we print, in the order of ggml's feature list
# (ggml-cpu/arch/x86/cpu-feats.cpp, ggml-cpu.cpp `ggml_backend_cpu_get_features`).
_ISA_X86: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sse3", ("pni",)),
    ("ssse3", ("ssse3",)),
    ("sse4_2", ("sse4_2",)),
    ("avx", ("avx",)),
    ("avx_vnni", ("avx_vnni",)),
    ("avx2", ("avx2",)),
    ("f16c", ("f16c",)),
    ("fma", ("fma",)),
    ("bmi2", ("bmi2",)),
    # One kernel set in ggml, compiled only when all five are there.
    ("avx512", ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw")),
    ("avx512_vbmi", ("avx512vbmi",)),
    ("avx512_vnni", ("avx512_vnni",)),
    ("avx512_bf16", ("avx512_bf16",)),
    ("amx_int8", ("amx_tile", "amx_int8")),
)
_ISA_ARM: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("neon", ("asimd",)),
    ("fp16", ("asimdhp",)),
    ("dotprod", ("asimddp",)),
    ("i8mm", ("i8mm",)),
    ("sve", ("sve",)),
    ("sve2", ("sve2",)),
    ("sme", ("sme",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMount:
    """Where a memory controller is mounted, and which cgroup lies at the mount point."""

    version: CgroupVersion
    point: str
    root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLevel:
    """Limit and use of one cgroup; `limit_bytes` None is no limit."""

    limit_bytes: int | None
    used_bytes: int  # less the inactive file pages, which the kernel drops first

    @property
    def room_bytes(self) -> int | None:
        return None if self.limit_bytes is None else self.limit_bytes - self.used_bytes


def key_values(text: str, separator: str = ":") -> dict[str, str]:
    """`name<separator>value` lines; the first of equal names wins."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, mark, value = line.partition(separator)
        if mark:
            found.setdefault(name.strip(), value.strip())
    return found


def meminfo(text: str) -> dict[str, Bytes]:
    """/proc/meminfo in bytes. Counts of huge pages, which have no unit, are left out."""
    found: dict[str, Bytes] = {}
    for name, value in key_values(text).items():
        number, _, unit = value.partition(" ")
        if unit == "kB" and number.isdigit():
            found[name] = Bytes(int(number) * KIB)
    return found


def os_name(osrelease: str | None, os_release_file: str | None) -> str:
    """`Linux 6.1.0 (Debian GNU/Linux 12 (bookworm))`, as much of it as is known."""
    kernel = f"Linux {osrelease.strip()}" if osrelease else "Linux"
    pretty = key_values(os_release_file or "", "=").get("PRETTY_NAME", "").strip("\"'")
    return f"{kernel} ({pretty})" if pretty else kernel


def wsl(version_file: str | None) -> Literal[1, 2] | None:
    """WSL from /proc/version: WSL1 answers `…-Microsoft`, WSL2 `…-microsoft-standard-WSL2`."""
    text = version_file or ""
    if "microsoft-standard" in text or "WSL2" in text:
        return 2
    return 1 if "-Microsoft" in text else None


def container(cgroup_file: str | None, markers: Iterable[str]) -> str | None:
    """The container engine, from marker files in `/` and the process's cgroup path."""
    present = set(markers)
    if "/run/.containerenv" in present:
        return "podman"
    path = cgroup_file or ""
    if "kubepods" in path:
        return "kubernetes"
    if "/.dockerenv" in present or "/docker" in path:
        return "docker"
    return "lxc" if "/lxc" in path else None


def cpu_name(cpuinfo: str) -> str | None:
    """The model name; ARM kernels give none."""
    return key_values(cpuinfo).get("model name") or None


def cpu_isa(cpuinfo: str) -> tuple[str, ...]:
    """The extensions ggml has kernels for, of those that the kernel lists."""
    fields = key_values(cpuinfo)
    if "flags" in fields:
        return _known(_ISA_X86, fields["flags"].split())
    return _known(_ISA_ARM, fields.get("Features", "").split())


def _known(table: Sequence[tuple[str, tuple[str, ...]]], flags: Iterable[str]) -> tuple[str, ...]:
    present = set(flags)
    return tuple(name for name, needs in table if present.issuperset(needs))


def mlock_limit(limit: int | None, status: str | None) -> Bytes | None:
    """The bytes a process may lock; None when unlimited, as CAP_IPC_LOCK makes it."""
    capabilities = int(key_values(status or "").get("CapEff", "0"), 16)
    cap_ipc_lock = 14
    if limit is None or capabilities >> cap_ipc_lock & 1:
        return None
    return Bytes(limit)


# --- cgroups


def cgroup_path(cgroup_file: str, version: CgroupVersion) -> str | None:
    """The process's own cgroup in the hierarchy of the memory controller."""
    for line in cgroup_file.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if version == 2 and number == "0" and not controllers:
            return path
        if version == 1 and "memory" in controllers.split(","):
            return path
    return None


def cgroup_mounts(mountinfo: str) -> tuple[CgroupMount, ...]:
    """The mounts that may hold memory limits, v1 first: on a hybrid host it has the controller."""
    found: list[CgroupMount] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, types = before.split(), after.split()
        if len(fields) < 5 or len(types) < 3:
            continue
        if types[0] == "cgroup" and "memory" in types[2].split(","):
            found.append(CgroupMount(version=1, point=fields[4], root=fields[3]))
        elif types[0] == "cgroup2":
            found.append(CgroupMount(version=2, point=fields[4], root=fields[3]))
    return tuple(sorted(found, key=lambda mount: mount.version))


def cgroup_folders(mount: CgroupMount, path: str) -> tuple[str, ...]:
    """Folders from the process's own cgroup up to the mount point.

    Inside a container the path may be the host's (`/docker/ab…`) while the mount shows only what
    is below it; the mount's root says how much to cut off.
    """
    inside = path
    if mount.root != "/" and path.startswith(mount.root):
        inside = path[len(mount.root) :]
    parts = [part for part in inside.split("/") if part]
    if ".." in parts:  # a cgroup outside our namespace: only the mount point can be read
        parts = []
    return tuple("/".join([mount.point, *parts[:count]]) for count in range(len(parts), -1, -1))


def cgroup_v2_level(
    max_text: str | None, high_text: str | None, current_text: str | None, stat: str | None
) -> CgroupLevel:
    """One v2 cgroup. `memory.high` counts as a limit: above it every allocation is throttled."""
    limits = [int(text) for text in (max_text, high_text) if text and text.strip().isdigit()]
    return _level(limits, current_text, key_values(stat or "", " ").get("inactive_file"))


def cgroup_v1_level(
    limit_text: str | None, usage_text: str | None, stat: str | None
) -> CgroupLevel:
    """One v1 cgroup; its stat file tells the limit of ancestors that a container cannot see."""
    fields = key_values(stat or "", " ")
    limits = [
        int(text)
        for text in (limit_text, fields.get("hierarchical_memory_limit"))
        if text and text.strip().isdigit()
    ]
    return _level(limits, usage_text, fields.get("total_inactive_file"))


def _level(limits: Sequence[int], usage: str | None, inactive: str | None) -> CgroupLevel:
    real = [limit for limit in limits if limit < _UNLIMITED]
    used = int(usage) if usage and usage.strip().isdigit() else 0
    return CgroupLevel(
        limit_bytes=min(real) if real else None,
        used_bytes=max(0, used - int(inactive or 0)),
    )


def tightest(levels: Iterable[CgroupLevel], total_bytes: int) -> CgroupLevel | None:
    """The level that leaves the least room; None when none is below the machine's RAM.

    An ancestor with a larger limit can be the tighter one: its other children use memory too.
    """
    limited = [
        level
        for level in levels
        if level.limit_bytes is not None and level.limit_bytes < total_bytes
    ]
    return min(limited, key=lambda level: (level.room_bytes or 0, level.limit_bytes), default=None)


def cpu_quota(max_text: str | None) -> float | None:
    """CPUs granted by cgroup v2's `cpu.max` (`200000 100000`); None when unlimited."""
    quota, _, period = (max_text or "").strip().partition(" ")
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


# --- macOS


def vm_stat(text: str) -> Bytes | None:
    """Memory a process may take on macOS: free, inactive, speculative and purgeable pages."""
    size = re.search(r"page size of (\d+) bytes", text)
    if size is None:
        return None
    pages = key_values(text)
    names = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    counts = [pages.get(name, "0").rstrip(".") for name in names]
    return Bytes(sum(int(count) for count in counts if count.isdigit()) * int(size[1]))


def swap_usage(text: str) -> tuple[Bytes, Bytes] | None:
    """Total and free bytes of `vm.swapusage` (`total = 2048.00M  used = …  free = 1022.25M`)."""
    found = dict(re.findall(r"(total|free) = ([\d.]+)M", text))
    if set(found) != {"total", "free"}:
        return None
    total, free = (Bytes(int(float(found[name]) * MIB)) for name in ("total", "free"))
    return total, free


def darwin_isa(sysctl: Mapping[str, str]) -> tuple[str, ...]:
    """ARM extensions of `hw.optional.arm.FEAT_*`, or the flags of an Intel Mac."""
    if sysctl.get("hw.optional.arm64") == "1" or "hw.optional.arm.FEAT_DotProd" in sysctl:
        names = {"fp16": "FP16", "dotprod": "DotProd", "i8mm": "I8MM", "sme": "SME"}
        present = [
            name
            for name, feature in names.items()
            if sysctl.get(f"hw.optional.arm.FEAT_{feature}") == "1"
        ]
        return ("neon", *present)
    flags = (
        f"{sysctl.get('machdep.cpu.features', '')} {sysctl.get('machdep.cpu.leaf7_features', '')}"
    )
    renamed = {"sse3": "pni", "sse4.2": "sse4_2", "avx1.0": "avx"}
    return _known(_ISA_X86, (renamed.get(flag, flag) for flag in flags.lower().split()))
