"""From findings to what a person can do about them, with the command to type. Pure."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loadmaster.engine.toolchain import TARGETS, Target
from loadmaster.engine.types import DeviceFacts
from loadmaster.machine.types import Gpu, Machine, Ram
from loadmaster.units import GIB, MIB, format_size

# Below these a finding is worth a line.
LOW_DISK_BYTES = 10 * GIB  # less than one 7B model at 8 bits and its download
SMALL_MLOCK_BYTES = GIB  # no model of use can be locked in less
SWAPPED_BYTES = 256 * MIB  # idle daemons are swapped out on any machine
CROWDED_SHARE = 4  # another program holds more than a quarter of a card

Engines = Mapping[str, tuple[str, bool, tuple[DeviceFacts, ...] | None]]  # id → target, used, GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One finding; `command` is what mends it, where one command does."""

    code: str
    what: str
    command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacles:
    """What stands between this user and a GPU."""

    closed_files: tuple[str, ...] = ()  # device files that this user may not open
    silent_nvidia: tuple[str, ...] = ()  # PCI addresses of cards whose driver does not answer
    engines_fault: str | None = None  # why the installed engines could not be listed


def advise(
    machine: Machine, found: Obstacles, engines: Engines, mend: Callable[[Target], str]
) -> tuple[Advice, ...]:
    """Everything worth a line, the engine first; `mend` is the command that builds a target."""
    return (
        *_engine(machine, found, engines, mend),
        *_access(machine, found),
        *_wsl(machine),
        *_cgroup(machine),
        *_ram(machine.ram),
        *_disk(machine),
        *(line for gpu in machine.gpus for line in _card(gpu)),
    )


def _engine(
    machine: Machine, found: Obstacles, engines: Engines, mend: Callable[[Target], str]
) -> Iterator[Advice]:
    if found.engines_fault is not None:
        yield Advice(code="engine_unreadable", what=found.engines_fault)
    if not engines:
        target = _target(machine)
        command = mend(target) if target else "loadmaster engine build"
        yield Advice(code="no_engine", what="no engine is built yet", command=command)
        return
    used = next((id_ for id_, (_, in_use, _) in engines.items() if in_use), None)
    if used is None:
        what = "no engine is in use: the one named is not there, or of another loadmaster"
        yield Advice(code="no_engine_in_use", what=what, command="loadmaster engine list")
        return
    built_for, _, devices = engines[used]
    if built_for == "cpu":
        yield from _without_gpu(machine, engines, mend)
    elif devices == ():
        what = f"the engine `{used}` sees no GPU: its driver is missing or older than the build"
        yield Advice(code="engine_sees_no_gpu", what=what, command=f"loadmaster engine test {used}")


def _without_gpu(
    machine: Machine, engines: Engines, mend: Callable[[Target], str]
) -> Iterator[Advice]:
    target = _target(machine)
    if target is None:
        return
    names = ", ".join(dict.fromkeys(gpu.name for gpu in machine.gpus))
    other = next((id_ for id_, (built_for, _, _) in engines.items() if built_for == target), None)
    yield Advice(
        code="cpu_only_engine",
        what=f"the engine in use was built without GPU support (`BLAS = 0`), and {names} is here",
        command=f"loadmaster engine use {other}" if other else mend(target),
    )


def _target(machine: Machine) -> Target | None:
    """The build that would drive the first GPU."""
    backend = machine.gpus[0].backend if machine.gpus else None
    return next((target for target in TARGETS if target == backend), None)


def _access(machine: Machine, found: Obstacles) -> Iterator[Advice]:
    if found.closed_files:
        yield Advice(
            code="no_permission",
            what=f"this user may not open {', '.join(found.closed_files)}; "
            "after the command, log in again",
            command='sudo usermod -aG video,render "$USER"',
        )
    if not found.silent_nvidia or "/dev/nvidiactl" in found.closed_files:
        return
    where = ", ".join(found.silent_nvidia)
    if machine.container in ("docker", "podman"):
        flag = "--gpus all" if machine.container == "docker" else "--device nvidia.com/gpu=all"
        what = f"the NVIDIA GPU at {where} is not passed into this container"
        command = f"{machine.container} run {flag} …"
    else:
        what = f"the driver of the NVIDIA GPU at {where} is missing or does not answer"
        command = _driver_command(machine.os)
    yield Advice(code="no_driver", what=what, command=command)


def _driver_command(os_name: str) -> str:
    if "Ubuntu" in os_name:
        return "sudo ubuntu-drivers install"
    if "Debian" in os_name:
        return "sudo apt-get install nvidia-driver"
    return "nvidia-smi"


def _wsl(machine: Machine) -> Iterator[Advice]:
    if machine.wsl == 1:
        what = "WSL1 has no GPU and no memory limits; WSL2 has"
        yield Advice(code="wsl1", what=what, command="wsl --set-version DISTRIBUTION 2")
    if machine.wsl == 2:
        yield Advice(
            code="wsl2_paging",
            what="WSL2: the Windows driver moves VRAM into system RAM when it runs short, without "
            "an error; a sudden drop of tok/s is the only sign",
        )
        yield Advice(
            code="wsl2_metering",
            what="WSL2: the driver tells no memory per process, so VRAM is checked by the card's "
            "total; RAM is half of Windows', unless `memory=` in %UserProfile%\\.wslconfig says so",
        )


def _cgroup(machine: Machine) -> Iterator[Advice]:
    limit, total = machine.ram.cgroup_limit_bytes, machine.ram.total_bytes
    if limit is None or limit > total // 2:
        return
    commands = {
        "docker": "docker update --memory SIZE --memory-swap SIZE CONTAINER",
        "podman": "podman update --memory SIZE CONTAINER",
    }
    yield Advice(
        code="cgroup_limit",
        what=f"a cgroup limits this process to {format_size(limit)} of {format_size(total)} RAM",
        command=commands.get(machine.container or ""),
    )


def _ram(ram: Ram) -> Iterator[Advice]:
    if ram.mlock_limit_bytes is not None and ram.mlock_limit_bytes < SMALL_MLOCK_BYTES:
        yield Advice(
            code="mlock_limit",
            what=f"{format_size(ram.mlock_limit_bytes)} may be locked: `--load-mode mlock` would "
            "lock no model (a higher limit needs a line in /etc/security/limits.conf)",
            command="ulimit -l unlimited",
        )
    swapped = ram.swap_total_bytes - ram.swap_free_bytes
    if swapped >= SWAPPED_BYTES:
        yield Advice(
            code="swap_in_use",
            what=f"{format_size(swapped)} of swap is in use: memory has been short, and what is "
            "swapped of a model is read back at disk speed",
            command="sudo swapoff -a && sudo swapon -a",
        )


def _disk(machine: Machine) -> Iterator[Advice]:
    if machine.disk_free_bytes is not None and machine.disk_free_bytes < LOW_DISK_BYTES:
        yield Advice(
            code="disk_low",
            what=f"{format_size(machine.disk_free_bytes)} are free at {machine.disk_path}, "
            "where engines and models are kept",
            command="export LOADMASTER_HOME=/path/on/a/larger/disk",
        )


def _card(gpu: Gpu) -> Iterator[Advice]:
    width, most = gpu.pcie_width, gpu.pcie_width_max
    if width is not None and most is not None and width < most:
        yield Advice(
            code="narrow_link",
            what=f"{gpu.id} uses {width} of {most} PCIe lanes: weights that are streamed to it "
            f"move at {width}/{most} of the speed",
        )
    for process in gpu.processes:
        if (process.used_bytes or 0) * CROWDED_SHARE > gpu.total_bytes:
            yield Advice(
                code="gpu_in_use",
                what=f"{process.name or 'a program'} (pid {process.pid}) holds "
                f"{format_size(process.used_bytes or 0)} of {gpu.id}",
            )
