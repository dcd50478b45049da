"""Parsers of captured text, and the bandwidth tables."""

import struct

import pytest

from loadmaster.machine import parse, parse_gpu
from loadmaster.machine.bandwidth import (
    TABLE,
    bus_bandwidth,
    gpu_bandwidth,
    pcie_bandwidth,
    ram_bandwidth,
)
from loadmaster.machine.rules import RULES
from loadmaster.units import GIB, MIB


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com) #1237-Microsoft", 1),
        ("Linux version 5.15.153.1-microsoft-standard-WSL2 (root@941d701f84f1)", 2),
        ("Linux version 6.6.36-custom-WSL2+ (me@home)", 2),
        ("Linux version 6.8.0-45-generic (buildd@lcy02-amd64-115)", None),
        ("Linux version 6.2.0-1019-azure (buildd@microsoft-build)", None),
        (None, None),
    ],
)
def test_wsl(version: str | None, expected: int | None) -> None:
    assert parse.wsl(version) == expected


def test_meminfo_leaves_counts_out() -> None:
    table = parse.meminfo("MemTotal:       16 kB\nHugePages_Total:       7\nnonsense\n")
    assert table == {"MemTotal": 16384}


def test_cap_ipc_lock_lifts_the_mlock_limit() -> None:
    assert parse.mlock_limit(65536, "CapEff:\t0000000000000000\n") == 65536
    assert parse.mlock_limit(65536, "CapEff:\t0000000000004000\n") is None
    assert parse.mlock_limit(None, None) is None


@pytest.mark.parametrize(
    ("text", "quota"),
    [("150000 100000\n", 1.5), ("max 100000", None), ("", None), (None, None), ("5 0", None)],
)
def test_cpu_quota(text: str | None, quota: float | None) -> None:
    assert parse.cpu_quota(text) == quota


def mount(root: str) -> parse.CgroupMount:
    return parse.CgroupMount(version=2, point="/sys/fs/cgroup", root=root)


@pytest.mark.parametrize(
    ("root", "path", "folders"),
    [
        ("/", "/a/b", ("/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup")),
        ("/docker/4f", "/docker/4f/x", ("/sys/fs/cgroup/x", "/sys/fs/cgroup")),
        ("/", "/../other", ("/sys/fs/cgroup",)),
        ("/", "/", ("/sys/fs/cgroup",)),
    ],
)
def test_cgroup_folders(root: str, path: str, folders: tuple[str, ...]) -> None:
    assert parse.cgroup_folders(mount(root), path) == folders


def test_hybrid_hosts_have_the_controller_in_v1() -> None:
    text = "9:name=systemd:/\n4:memory:/api\n0::/\n"
    assert parse.cgroup_path(text, 1) == "/api"
    assert parse.cgroup_path(text, 2) == "/"
    mounts = parse.cgroup_mounts(
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n"
        "broken line\n"
    )
    assert [(m.version, m.point) for m in mounts] == [
        (1, "/sys/fs/cgroup/memory"),
        (2, "/sys/fs/cgroup/unified"),
    ]


def test_memory_high_is_a_limit() -> None:
    level = parse.cgroup_v2_level("8000\n", "6000\n", "5000\n", "inactive_file 1000\n")
    assert (level.limit_bytes, level.used_bytes, level.room_bytes) == (6000, 4000, 2000)


def test_v1_without_a_limit() -> None:
    level = parse.cgroup_v1_level("9223372036854771712", "77", None)
    assert (level.limit_bytes, level.room_bytes) == (None, None)


def test_a_limit_above_the_machines_ram_is_none() -> None:
    level = parse.CgroupLevel(limit_bytes=10, used_bytes=1)
    assert parse.tightest([level], 10) is None
    assert parse.tightest([level], 11) == level


@pytest.mark.parametrize(
    ("cgroup", "markers", "expected"),
    [
        ("0::/\n", ["/.dockerenv"], "docker"),
        ("0::/\n", ["/run/.containerenv"], "podman"),
        ("4:memory:/lxc/web\n", [], "lxc"),
        ("0::/kubepods/burstable/pod1\n", ["/.dockerenv"], "kubernetes"),
        ("0::/user.slice\n", [], None),
        (None, [], None),
    ],
)
def test_container(cgroup: str | None, markers: list[str], expected: str | None) -> None:
    assert parse.container(cgroup, markers) == expected


def test_vm_stat_of_another_shape_is_unknown() -> None:
    assert parse.vm_stat("no pages here") is None
    assert parse.swap_usage("used = 1.00M") is None


def test_intel_mac_flags() -> None:
    values = {
        "machdep.cpu.features": "FPU SSE3 SSSE3 SSE4.2 AVX1.0 FMA F16C",
        "machdep.cpu.leaf7_features": "AVX2 BMI2",
    }
    assert parse.darwin_isa(values) == (
        "sse3", "ssse3", "sse4_2", "avx", "avx2", "f16c", "fma", "bmi2",
    )  # fmt: skip


# --- GPUs


@pytest.mark.parametrize(
    ("text", "generation"),
    [("16.0 GT/s PCIe", 4), ("2.5 GT/s PCIe", 1), ("5 GT/s", 2), ("Unknown", None), (None, None)],
)
def test_pcie_generation(text: str | None, generation: int | None) -> None:
    assert parse_gpu.pcie_generation(text) == generation


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        (None, (0, 1, 2)),
        ("", ()),
        ("2,0", (2, 0)),
        ("1,9,0", (1,)),  # CUDA ends the list at the first that is not there
        ("-1", ()),
        ("GPU-b", (1,)),
        ("GPU-", ()),  # begins more than one
        ("0,0", (0,)),
    ],
)
def test_visible_devices(value: str | None, chosen: tuple[int, ...]) -> None:
    assert parse_gpu.visible_devices(value, ["GPU-a1", "GPU-b2", "GPU-c3"]) == chosen


def test_amdgpu_ids_with_commas_in_names() -> None:
    text = "# comment, with, commas\n1.0.0\n73BF,\tC1,\tAMD Radeon RX 6800 XT, rev 1\n"
    assert parse_gpu.amdgpu_ids(text) == {("73bf", "c1"): "AMD Radeon RX 6800 XT, rev 1"}


def module(locator: str, bank: str, *, speed: int = 5600, size: int = 32) -> bytes:
    """An SMBIOS memory device (type 17, 0x28 bytes) with its strings."""
    body = bytearray(0x28)
    struct.pack_into("<BBHHHHHH", body, 0, 17, 0x28, 0x1100, 0, 0, 72, 64, size)
    struct.pack_into("<BB", body, 0x10, 1, 2)
    struct.pack_into("<H", body, 0x20, speed)
    return bytes(body) + locator.encode() + b"\0" + bank.encode() + b"\0\0"


OTHER = bytes([1, 4, 0, 0]) + b"\0\0"  # a structure without strings
END = bytes([127, 4, 0, 0]) + b"\0\0"


def test_two_channels_of_memory() -> None:
    table = OTHER + module("DIMM 1", "P0 CHANNEL A") + module("DIMM 1", "P0 CHANNEL B") + END
    modules = parse_gpu.memory_modules(table)
    assert [m.speed_mt_s for m in modules] == [5600, 5600]
    assert parse_gpu.modules_bandwidth(modules) == 89_600_000_000


def test_modules_on_one_channel_take_turns() -> None:
    table = b"".join(
        module(f"Controller0-Channel{channel}-DIMM{slot}", "BANK 0", speed=3200 - 400 * slot)
        for channel in "AB"
        for slot in (0, 1)
    )
    # Two channels, each as fast as its slower module.
    assert parse_gpu.modules_bandwidth(parse_gpu.memory_modules(table)) == 44_800_000_000


def test_empty_slots_and_unknown_channels() -> None:
    empty = module("DIMM 1", "P0 CHANNEL B", size=0)
    assert parse_gpu.memory_modules(empty + END) == ()
    assert parse_gpu.modules_bandwidth(()) is None
    unknown = parse_gpu.memory_modules(module("DIMM_A1", "BANK 0"))
    assert parse_gpu.modules_bandwidth(unknown) is None


def test_a_cut_smbios_table_is_read_as_far_as_it_goes() -> None:
    whole = module("DIMM 1", "P0 CHANNEL A")
    for cut in range(len(whole) + 1):
        assert len(parse_gpu.memory_modules(whole + whole[:cut])) in (0, 1, 2)


# --- bandwidths


@pytest.mark.parametrize(
    ("name", "total_gib", "gb_s"),
    [
        ("NVIDIA GeForce RTX 4090", 24, 1008),
        ("Tesla T4", 15, 320),
        ("NVIDIA RTX A6000", 48, 768),
        ("NVIDIA A100-SXM4-80GB", 80, 2039),
        ("NVIDIA H200", 141, 4800),
        ("NVIDIA GeForce RTX 3060", 12, 360),
        ("NVIDIA GeForce RTX 3060", 8, 240),
        ("AMD Radeon RX 7900 XTX", 24, 960),
        ("Intel(R) Arc(TM) B580 Graphics", 12, None),
        ("Apple M2 Ultra", 192, 800),
        ("NVIDIA GeForce RTX 3060 Super Duper", 12, None),
    ],
)
def test_gpu_bandwidth(name: str, total_gib: int, gb_s: int | None) -> None:
    expected = None if gb_s is None else gb_s * 10**9
    assert gpu_bandwidth(name, total_gib * GIB) == expected


def test_reserved_memory_does_not_hide_the_variant() -> None:
    assert gpu_bandwidth("NVIDIA GeForce RTX 3060", 12288 * MIB - 200 * MIB) == 360 * 10**9


def test_tables_agree_with_bus_and_clock() -> None:
    # RTX 3090: 384 bits at 9751 MHz; A100: 5120 at 1593; T4: 256 at 5001.
    for name, bits, mhz in (("rtx 3090", 384, 9751), ("a100-sxm4-80gb", 5120, 1593),
                            ("t4", 256, 5001)):  # fmt: skip
        computed = bus_bandwidth(bits, mhz)
        assert computed is not None
        assert computed == pytest.approx(TABLE[name] * 10**9, rel=0.002)


def test_links_and_ram() -> None:
    assert pcie_bandwidth(4, 16) == 25_203_200_000
    assert pcie_bandwidth(None, 16) is None
    assert pcie_bandwidth(4, 0) is None
    assert bus_bandwidth(None, 1000) is None
    assert ram_bandwidth("DDR5-5600", 2) == 89_600_000_000


def test_every_backend_has_rules() -> None:
    assert set(RULES) == {"cuda", "rocm", "vulkan", "metal", "sycl", "virtual"}
    assert all(rules.alignment_bytes.bit_count() == 1 for rules in RULES.values())
