"""Looks at the machine: one call, about 50 ms, no CUDA context, no allocation on a GPU."""

from dataclasses import replace

from loadmaster.machine import darwin, drm, linux, nvidia, parse
from loadmaster.machine.host import Found, Host, this_host
from loadmaster.machine.types import Gpu, Machine


def detect_machine(host: Host | None = None) -> Machine:
    """The facts of this machine, or of the captured one in `host`."""
    host = host or this_host()
    return _darwin(host) if host.system == "Darwin" else _linux(host)


def _linux(host: Host) -> Machine:
    found = _join(nvidia.probe(host), drm.probe(host))
    disk = host.disk_free()
    return Machine(
        name="this machine",
        os=parse.os_name(host.text("/proc/sys/kernel/osrelease"), host.text("/etc/os-release")),
        wsl=parse.wsl(host.text("/proc/version")),
        container=parse.container(
            host.text("/proc/self/cgroup"),
            (path for path in ("/.dockerenv", "/run/.containerenv") if host.exists(path)),
        ),
        cpu=linux.cpu(host),
        ram=linux.ram(host),
        gpus=_numbered(found.gpus),
        disk_free_bytes=disk[1] if disk else None,
        disk_path=disk[0] if disk else None,
        warnings=(*found.warnings, *_quota_warning(host), *_order_warning(host, found.gpus)),
    )


def _darwin(host: Host) -> Machine:
    values = darwin.sysctl(host)
    memory = darwin.ram(host, values)
    found = darwin.gpu(values, memory)
    disk = host.disk_free()
    return Machine(
        name="this machine",
        os=darwin.os_name(values),
        wsl=None,
        cpu=darwin.cpu(host, values),
        ram=memory,
        gpus=_numbered(found.gpus),
        disk_free_bytes=disk[1] if disk else None,
        disk_path=disk[0] if disk else None,
        warnings=found.warnings,
    )


def _join(*parts: Found) -> Found:
    return Found(
        gpus=tuple(gpu for part in parts for gpu in part.gpus),
        warnings=tuple(text for part in parts for text in part.warnings),
    )


def _numbered(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Ids in the engine's order: integrated GPUs are used only where there is no other.

    llama.cpp does the same (src/llama.cpp:281); a Jetson's or an Apple chip's GPU is the only one.
    """
    cards = [gpu for gpu in gpus if not gpu.unified_memory] or list(gpus)
    return tuple(replace(gpu, id=f"gpu:{index}") for index, gpu in enumerate(cards))


def _quota_warning(host: Host) -> tuple[str, ...]:
    quota = linux.cpu_quota(host)
    if quota is None or quota >= len(host.cpus):
        return ()
    return (f"the cgroup grants {quota:g} of {len(host.cpus)} CPUs: threads are planned for that",)


def _order_warning(host: Host, gpus: tuple[Gpu, ...]) -> tuple[str, ...]:
    """With different cards, indices in CUDA_VISIBLE_DEVICES mean another card in another order."""
    chosen = host.environ.get("CUDA_VISIBLE_DEVICES", "")
    order = host.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    names = {gpu.name for gpu in gpus if gpu.vendor == "nvidia"}
    if not chosen[:1].isdigit() or order == "PCI_BUS_ID" or len(names) < 2:
        return ()
    return (
        f"CUDA_VISIBLE_DEVICES={chosen} is read in PCI bus order, as with "
        "CUDA_DEVICE_ORDER=PCI_BUS_ID; other programs may read it fastest card first",
    )
