"""The probes, on captured machines: files below a folder, and an NVML of our own."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadmaster.machine.detect import detect_machine
from loadmaster.machine.host import Host, this_host
from loadmaster.units import GIB, MIB
from tests.machine_parts import CAPTURES, FakeNvml, captured, card, only_gpu, unpack, with_cards

# --- this machine


def test_this_machine_is_seen_in_150_ms() -> None:
    took: list[float] = []
    while not took or min(took) > 0.15:  # the fastest: other programs run on this machine too
        assert len(took) < 200, min(took)
        start = time.perf_counter()
        machine = detect_machine()
        took.append(time.perf_counter() - start)
    assert machine.ram.total_bytes > machine.ram.free_bytes > 0
    assert machine.cpu.logical_cores >= (machine.cpu.physical_cores or 1)


def test_a_missing_source_is_none() -> None:
    machine = detect_machine(Host(root=Path("/nowhere"), disk_path=Path("/nowhere")))
    assert machine.gpus == ()
    assert machine.cpu.name is None
    assert machine.cpu.physical_cores is None
    assert machine.ram.cgroup_limit_bytes is None
    assert machine.ram.bandwidth_bytes_s is None


def test_disk_space_is_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    host = this_host(tmp_path / "not" / "yet")
    found = host.disk_free()
    assert found is not None
    assert found[0] == str(tmp_path)
    assert found[1] > 0


# --- host


def test_desktop(tmp_path: Path) -> None:
    machine = with_cards(tmp_path, card(), cpus=(0, 1, 16, 17), mlock_limit=8 * MIB)
    assert machine.os == "Linux 6.8.0-45-generic (Ubuntu 24.04.1 LTS)"
    assert machine.wsl is None
    assert machine.container is None
    assert machine.cpu.name == "AMD Ryzen 9 7950X 16-Core Processor"
    assert (machine.cpu.physical_cores, machine.cpu.logical_cores) == (2, 4)
    assert machine.cpu.isa[-4:] == ("avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16")
    assert machine.ram.total_bytes == 65771212 * 1024
    assert machine.ram.free_bytes == 58223912 * 1024
    assert machine.ram.swap_total_bytes == 8388604 * 1024
    assert machine.ram.cgroup_version == 2
    assert machine.ram.cgroup_limit_bytes is None
    assert machine.ram.mlock_limit_bytes == 8 * MIB
    assert machine.warnings == ()


def test_affinity_limits_cores(tmp_path: Path) -> None:
    assert with_cards(tmp_path, card(), cpus=(0, 16)).cpu.physical_cores == 1


def test_v2_takes_the_ancestor_that_leaves_less_room(tmp_path: Path) -> None:
    ram = captured("container-v2", tmp_path).ram
    assert ram.cgroup_version == 2
    # Its own limit is lower, 8 GiB with 7 GiB of room; the pod has 2 GiB left of 12.
    assert ram.cgroup_limit_bytes == 12 * GIB
    assert ram.free_bytes == 2 * GIB


def test_v2_quota_limits_cores(tmp_path: Path) -> None:
    root = unpack("container-v2", tmp_path)
    for number in (0, 1):
        core = root / f"sys/devices/system/cpu/cpu{number}/topology/core_id"
        core.parent.mkdir(parents=True)
        core.write_text(f"{number}\n")
    machine = detect_machine(Host(root=root, cpus=(0, 1), disk_path=root))
    assert machine.cpu.physical_cores == 1
    assert machine.container == "kubernetes"
    assert machine.warnings == ("the cgroup grants 1.5 of 2 CPUs: threads are planned for that",)


def test_half_of_avx512_is_no_kernel_set(tmp_path: Path) -> None:
    isa = captured("container-v2", tmp_path).cpu.isa  # its flags lack avx512vl
    assert "avx512" not in isa
    assert "amx_int8" in isa


def test_v1_in_a_container(tmp_path: Path) -> None:
    machine = captured("container-v1", tmp_path)
    assert machine.container == "docker"
    assert machine.ram.cgroup_version == 1
    assert machine.ram.cgroup_limit_bytes == 6 * GIB  # told by hierarchical_memory_limit
    assert machine.ram.cgroup_used_bytes == 2 * GIB  # less 1 GiB of inactive file pages
    assert machine.ram.free_bytes == 4 * GIB


def test_wsl2_with_another_vendors_gpu(tmp_path: Path) -> None:
    broken = FakeNvml(broken="NVML Shared Library Not Found")
    machine = captured("wsl2", tmp_path, nvml=lambda: broken)
    assert machine.wsl == 2
    assert machine.gpus == ()
    assert machine.warnings == ()


# --- NVIDIA


def test_nvidia_card(tmp_path: Path) -> None:
    gpu = only_gpu(with_cards(tmp_path, card()))
    assert (gpu.id, gpu.vendor, gpu.backend, gpu.driver) == ("gpu:0", "nvidia", "cuda", "560.35.03")
    assert (gpu.total_bytes, gpu.free_bytes) == (24564 * MIB, 23000 * MIB)
    assert gpu.free_source == "nvml"
    assert gpu.compute_capability == (8, 9)
    assert (gpu.pcie_gen, gpu.pcie_gen_now, gpu.pcie_width) == (4, 1, 16)
    assert gpu.pci_bus_id == "0000:01:00.0"
    assert gpu.bandwidth_bytes_s == 1008 * 10**9
    assert gpu.link_bytes_s == 25_203_200_000  # from gen 4: an idle card shows gen 1
    assert (gpu.rules.alignment_bytes, gpu.rules.row_padding) == (128, 512)


def test_cards_are_numbered_by_pci_bus(tmp_path: Path) -> None:
    cards = [card("00000000:41:00.0", Name="NVIDIA A"), card("00000000:01:00.0", Name="NVIDIA B")]
    machine = with_cards(tmp_path, *cards)
    assert [(gpu.id, gpu.name) for gpu in machine.gpus] == [
        ("gpu:0", "NVIDIA B"),
        ("gpu:1", "NVIDIA A"),
    ]


def test_cuda_visible_devices(tmp_path: Path) -> None:
    cards = [card("00000000:01:00.0"), card("00000000:41:00.0", Name="NVIDIA L4")]
    machine = with_cards(tmp_path, *cards, environ={"CUDA_VISIBLE_DEVICES": "GPU-41"})
    assert only_gpu(machine).name == "NVIDIA L4"
    assert machine.warnings == ("CUDA_VISIBLE_DEVICES hides 1 of 2 NVIDIA GPUs",)


def test_processes_are_listed_once_with_names(tmp_path: Path) -> None:
    compute = [SimpleNamespace(pid=5555, usedGpuMemory=900 * MIB)]
    graphics = [
        SimpleNamespace(pid=4321, usedGpuMemory=300 * MIB),
        SimpleNamespace(pid=5555, usedGpuMemory=None),
    ]
    gpu = only_gpu(
        with_cards(
            tmp_path,
            card(ComputeRunningProcesses=compute, GraphicsRunningProcesses=graphics),
        )
    )
    seen = [(process.pid, process.name, process.used_bytes) for process in gpu.processes]
    assert seen == [(4321, "Xorg", 300 * MIB), (5555, "python3", 900 * MIB)]


def test_unknown_card_takes_its_bus(tmp_path: Path) -> None:
    gpu = only_gpu(
        with_cards(tmp_path, card(Name="NVIDIA New", MemoryBusWidth=512, MaxClockInfo=14001))
    )
    assert gpu.bandwidth_bytes_s == 1_792_128_000_000


def test_what_nvml_does_not_tell_is_none(tmp_path: Path) -> None:
    bare = {"Name": "NVIDIA Odd", "MemoryInfo": SimpleNamespace(total=GIB, free=GIB, used=0)}
    gpu = only_gpu(with_cards(tmp_path, bare))
    assert gpu.compute_capability is None
    assert gpu.bandwidth_bytes_s is None
    assert gpu.link_bytes_s is None
    assert gpu.processes == ()


def test_unified_memory_card_takes_the_hosts_figures(tmp_path: Path) -> None:
    machine = with_cards(tmp_path, card(Name="NVIDIA GB10", MemoryInfo=None))
    gpu = only_gpu(machine)
    assert gpu.unified_memory
    assert (gpu.free_bytes, gpu.free_source) == (machine.ram.available_bytes, "meminfo")
    assert "page cache" in machine.warnings[0]


def test_mig_shows_the_first_instance(tmp_path: Path) -> None:
    part = {"MemoryInfo": SimpleNamespace(total=20 * GIB, free=19 * GIB, used=GIB)}
    split = card(Name="NVIDIA A100-SXM4-80GB", MigMode=[1, 1], MaxMigDeviceCount=7)
    split["mig_parts"] = [part]
    machine = with_cards(tmp_path, split)
    gpu = only_gpu(machine)
    assert gpu.total_bytes == 20 * GIB
    assert gpu.bandwidth_bytes_s is None
    assert "MIG" in machine.warnings[0]


def test_card_without_a_driver_is_reported(tmp_path: Path) -> None:
    broken = FakeNvml(broken="Driver Not Loaded")
    machine = captured("desktop-nvidia", tmp_path, nvml=lambda: broken)
    assert machine.gpus == ()
    assert machine.warnings == (
        "NVIDIA GPU at 0000:01:00.0, and its driver does not answer: Driver Not Loaded",
    )


def test_nvml_is_not_loaded_without_a_sign_of_nvidia(tmp_path: Path) -> None:
    def load() -> Any:
        raise AssertionError("loading NVML takes 30 ms")

    assert captured("amd-desktop", tmp_path, nvml=load).gpus[0].vendor == "amd"


def test_jetson_without_nvml(tmp_path: Path) -> None:
    machine = captured("jetson", tmp_path, architecture="aarch64")
    gpu = only_gpu(machine)
    assert gpu.unified_memory
    assert gpu.bandwidth_bytes_s == 204 * 10**9
    assert machine.cpu.isa == ("neon", "fp16", "dotprod")


# --- AMD, Intel, Apple


def test_amd_card(tmp_path: Path) -> None:
    gpu = only_gpu(captured("amd-desktop", tmp_path))
    assert (gpu.name, gpu.backend) == ("AMD Radeon RX 7900 XTX", "rocm")
    assert (gpu.total_bytes, gpu.free_bytes) == (25753026560, 24_000_000_000)
    assert gpu.free_source == "sysfs"
    assert gpu.bandwidth_bytes_s == 960 * 10**9
    # The link inside the card says x16; the slot has four lanes.
    assert (gpu.pcie_gen, gpu.pcie_gen_now) == (4, 1)
    assert (gpu.pcie_width, gpu.pcie_width_max) == (4, 16)
    assert gpu.pci_bus_id == "0000:03:00.0"


def test_amd_card_without_kfd_is_driven_by_vulkan(tmp_path: Path) -> None:
    root = unpack("amd-desktop", tmp_path)
    (root / "dev/kfd").unlink()
    gpu = only_gpu(detect_machine(Host(root=root, disk_path=root)))
    assert gpu.backend == "vulkan"
    assert gpu.rules.row_padding == 0


def test_apu_counts_the_ram_it_may_map(tmp_path: Path) -> None:
    machine = captured("strix-halo", tmp_path)
    gpu = only_gpu(machine)
    assert gpu.unified_memory
    assert gpu.total_bytes == 536870912 + 118111600640
    assert gpu.free_bytes == 400_000_000 + machine.ram.available_bytes
    assert gpu.name == "AMD GPU 1586"
    assert any("shares the host's RAM" in text for text in machine.warnings)


def test_apu_with_a_large_carve_out_is_a_card(tmp_path: Path) -> None:
    root = unpack("strix-halo", tmp_path)
    device = root / "sys/devices/pci0000:00/0000:00:08.1/0000:c5:00.0"
    (device / "mem_info_vram_total").write_text("103079215104\n")
    (device / "mem_info_gtt_total").write_text("16000000000\n")
    gpu = only_gpu(detect_machine(Host(root=root, disk_path=root)))
    assert not gpu.unified_memory
    assert gpu.total_bytes == 103079215104


def test_intel_card_and_graphics(tmp_path: Path) -> None:
    machine = captured("intel-arc", tmp_path)
    gpu = only_gpu(machine)
    assert (gpu.vendor, gpu.backend, gpu.name) == ("intel", "vulkan", "Intel GPU 56a0")
    assert (gpu.total_bytes, gpu.free_bytes) == (17070817280, 16070817280)
    assert (gpu.pcie_gen, gpu.pcie_width, gpu.pcie_width_max) == (4, 8, 16)
    assert machine.warnings == (
        "Intel graphics of the processor at 0000:00:02.0: "
        "no memory of its own in sysfs, not planned for",
    )


def test_mac() -> None:
    answers = {
        "sysctl": (CAPTURES / "mac-sysctl.txt").read_text("utf-8"),
        "vm_stat": (CAPTURES / "mac-vm_stat.txt").read_text("utf-8"),
    }
    machine = detect_machine(
        Host(
            root=Path("/nowhere"),
            system="Darwin",
            architecture="arm64",
            run=lambda arguments: answers.get(arguments[0]),
        )
    )
    gpu = only_gpu(machine)
    assert machine.os == "macOS 15.1"
    assert machine.cpu.isa == ("neon", "fp16", "dotprod", "i8mm", "sme")
    assert machine.ram.available_bytes == 1_530_000 * 16384
    assert machine.ram.swap_free_bytes == 1022 * MIB + MIB // 4
    assert gpu.total_bytes == 48 * GIB  # three quarters of 64 GiB
    assert gpu.free_bytes == machine.ram.available_bytes
    assert gpu.bandwidth_bytes_s == 410 * 10**9
    assert not gpu.rules.pinned_host


@pytest.mark.parametrize(
    ("limit_mb", "expected"), [("0", 48 * GIB), ("57344", 56 * GIB), ("999999", 64 * GIB)]
)
def test_mac_working_set(limit_mb: str, expected: int) -> None:
    text = (CAPTURES / "mac-sysctl.txt").read_text("utf-8")
    text = text.replace("wired_limit_mb: 0", f"wired_limit_mb: {limit_mb}")
    host = Host(root=Path("/nowhere"), system="Darwin", run=lambda arguments: text)
    assert only_gpu(detect_machine(host)).total_bytes == expected
