"""`docs/machines.md`, from the profiles that ship."""

from loadmaster.machine.profiles import load_profile, profile_names, profile_sources
from loadmaster.machine.types import Machine
from loadmaster.units import GIB

_HEADER = """# Machines

`loadmaster plan MODEL --machine NAME` plans for a machine that is not here. These profiles ship; a file that
`loadmaster doctor --save-machine FILE` wrote works as well. A profile with a missing or impossible value is refused
with the value's path.

Written from the profiles by `python -m scripts.guides`; change those, not this page. Bandwidths are nominal, in 10⁹ bytes
per second; what is free is what a plan may take before its headroom.

| name | GPU | VRAM, free | GPU GB/s | link GB/s | RAM, free | RAM GB/s | CPU, cores |
|---|---|---|---|---|---|---|---|
"""


def machines_page() -> str:
    """The whole page."""
    machines = [load_profile(name) for name in profile_names()]
    rows = "\n".join(map(_row, machines))
    sources = "\n".join(_sources(machine.name) for machine in machines)
    return f"{_HEADER}{rows}\n\n## Sources\n\n{sources}\n"


def _row(machine: Machine) -> str:
    ram, cpu = machine.ram, machine.cpu
    cells = [f"`{machine.name}`", *_gpu_cells(machine)]
    cells += [f"{ram.total_bytes / GIB:.0f}, {ram.available_bytes / GIB:.0f} GiB"]
    cells += [_gb(ram.bandwidth_bytes_s), f"{cpu.name}, {cpu.physical_cores}"]
    return f"| {' | '.join(cells)} |"


def _gpu_cells(machine: Machine) -> list[str]:
    if not machine.gpus:
        return ["none", "", "", ""]
    gpu = machine.gpus[0]
    count = f"{len(machine.gpus)} × " if len(machine.gpus) > 1 else ""
    free = gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes
    memory = f"{gpu.total_bytes / GIB:.1f}, {free / GIB:.1f} GiB"
    shared = " of the RAM" if gpu.unified_memory else ""
    link = "one memory" if gpu.unified_memory else _gb(gpu.link_bytes_s)
    return [f"{count}{gpu.name}", memory + shared, _gb(gpu.bandwidth_bytes_s), link]


def _gb(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e9:.4g}"


def _sources(name: str) -> str:
    return f"`{name}`\n\n" + "\n".join(f"- {source}" for source in profile_sources(name)) + "\n"
