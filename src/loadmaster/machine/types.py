"""What is here: the facts of a machine. Unknown is None, never a guess."""

from dataclasses import dataclass
from typing import Literal

from loadmaster.machine.measurements import Measurements
from loadmaster.units import Bytes

Vendor = Literal["nvidia", "amd", "intel", "apple", "virtual"]
GpuBackend = Literal["cuda", "rocm", "vulkan", "metal", "sycl", "virtual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingRules:
    """How an engine backend lays out buffers on a device; a virtual device is made from it."""

    alignment_bytes: int
    row_padding: int  # quantized rows are padded to this many elements; 0: not padded
    offload_min_batch: int  # from this many tokens on, host weights are streamed to the device
    pinned_host: bool  # CPU-resident weights lie in page-locked memory
    # Flash attention copies a layer's cache to f16 in the compute buffer when it has another type.
    f16_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """Another program that holds memory on a GPU."""

    pid: int
    name: str | None
    used_bytes: Bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator; `id` is ours (`gpu:0`), in the order the engine enumerates them."""

    id: str
    name: str
    vendor: Vendor
    backend: GpuBackend  # what the engine would drive it with
    total_bytes: Bytes
    free_bytes: Bytes | None
    free_source: str | None  # where `free_bytes` is from: `nvml`, `sysfs`, `engine`, `profile`
    unified_memory: bool  # shares the host's RAM (Apple, Jetson, APU)
    rules: SizingRules
    driver: str | None = None
    compute_capability: tuple[int, int] | None = None
    pcie_gen: int | None = None  # the highest that card and slot both support
    pcie_gen_now: int | None = None  # an idle card drops to gen 1 and comes back under load
    pcie_width: int | None = None  # lanes in use
    pcie_width_max: int | None = None  # lanes that card and slot both support
    pci_bus_id: str | None = None  # `0000:01:00.0`
    bandwidth_bytes_s: int | None = None  # memory bandwidth from the table, not measured
    link_bytes_s: int | None = None  # host to device, usable
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    name: str | None
    architecture: str  # `x86_64`, `aarch64`
    physical_cores: int | None
    logical_cores: int
    isa: tuple[str, ...]  # extensions that ggml has kernels for: `avx2`, `avx512_vnni`, `amx_int8`


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    total_bytes: Bytes
    available_bytes: Bytes
    swap_total_bytes: Bytes
    swap_free_bytes: Bytes
    cgroup_version: Literal[1, 2] | None
    cgroup_limit_bytes: Bytes | None  # None: no limit below the machine's RAM
    cgroup_used_bytes: Bytes | None  # less the file pages that the kernel can drop
    mlock_limit_bytes: Bytes | None  # None: unlimited
    bandwidth_bytes_s: int | None  # from the table, not measured

    @property
    def free_bytes(self) -> Bytes:
        """What a new process may take now: available memory, inside the cgroup's limit."""
        if self.cgroup_limit_bytes is None:
            return self.available_bytes
        room = self.cgroup_limit_bytes - (self.cgroup_used_bytes or 0)
        return Bytes(max(0, min(self.available_bytes, room)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """A protection of the worker process, and whether this machine grants it."""

    name: str
    active: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything the planner and `doctor` know about one machine."""

    name: str
    os: str  # `Linux 6.1 (Debian 12)`
    wsl: Literal[1, 2] | None
    container: str | None = None  # `docker`, `podman`, `kubernetes`, `lxc`
    cpu: Cpu
    ram: Ram
    gpus: tuple[Gpu, ...]
    disk_free_bytes: Bytes | None = None  # where models and engines are kept
    disk_path: str | None = None
    confinements: tuple[Confinement, ...] = ()
    warnings: tuple[str, ...] = ()  # what a probe could not find out, and why it matters
    measured: Measurements | None = None  # by `doctor --measure`; None: tables are all there is

    def gpu(self, device_id: str) -> Gpu:
        """The GPU with this id; KeyError when there is none."""
        for gpu in self.gpus:
            if gpu.id == device_id:
                return gpu
        raise KeyError(device_id)
