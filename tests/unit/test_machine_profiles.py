"""Profiles: the shipped ones, files, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.machine.detect import detect_machine
from loadmaster.machine.profiles import load_profile, profile_names, save_profile
from loadmaster.machine.rules import RULES
from loadmaster.machine.target import for_target
from loadmaster.units import MIB


def test_the_shipped_names() -> None:
    assert profile_names() == (
        "a100-40g", "a100-80g", "a100-80g-x4", "cpu-64g", "h100-80g", "h100-80g-x8", "h200-141g",
        "jetson-orin-64g", "m2max-64g", "m2ultra-192g", "m3max-128g", "m4max-128g", "rtx3060-12g",
        "rtx3060-12g-ram64g", "rtx3060-12g-ram96g", "rtx3090", "rtx3090-x2", "rtx4060ti-16g",
        "rtx4080-16g", "rtx4090-24g", "rtx4090-x2", "rtx4090-x8", "rtx5090-32g", "rx7900xtx-24g",
    )  # fmt: skip


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile(name: str, tmp_path: Path) -> None:
    machine = load_profile(name)
    assert machine.name == name
    assert machine.ram.bandwidth_bytes_s
    assert all(gpu.bandwidth_bytes_s and gpu.link_bytes_s for gpu in machine.gpus)
    assert all(gpu.rules == RULES[gpu.backend] for gpu in machine.gpus)
    save_profile(machine, tmp_path / "again.json", sources=("copied",))
    assert load_profile(str(tmp_path / "again.json")) == machine


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_names_its_sources(name: str) -> None:
    folder = Path(sys.modules["loadmaster.machine.profiles"].__file__ or "").parent / "profiles"
    assert json.loads((folder / f"{name}.json").read_text("utf-8"))["sources"]


def test_the_4090() -> None:
    machine = load_profile("rtx4090-24g")
    assert [gpu.total_bytes for gpu in machine.gpus] == [24564 * MIB]
    assert machine.gpu("gpu:0").compute_capability == (8, 9)


def test_this_machine_round_trips(tmp_path: Path) -> None:
    machine = detect_machine()
    save_profile(machine, tmp_path / "here.json")
    assert load_profile(str(tmp_path / "here.json")) == machine


def changed(tmp_path: Path, change: Any) -> str:
    """A profile file after `change` has been at its content."""
    path = tmp_path / "changed.json"
    save_profile(load_profile("rtx3090-x2"), path)
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["machine"]["gpus"][1].update(vram=1), "Machine.gpus[1].vram: unknown key"),
        (lambda c: c["machine"]["cpu"].pop("isa"), "Machine.cpu.isa: missing"),
        (lambda c: c["machine"]["gpus"][0].update(vendor="acme"), "Machine.gpus[0].vendor"),
        (lambda c: c["machine"]["ram"].update(total_bytes="64GiB"), "Machine.ram.total_bytes"),
        (lambda c: c["machine"]["gpus"][1].update(id="gpu:0"), "Machine.gpus[1].id is 'gpu:0'"),
        (lambda c: c["machine"]["gpus"][0].update(total_bytes=0), "not above 0"),
        (lambda c: c["machine"]["gpus"][0].update(free_bytes=1 << 50), "bytes are free of"),
        (lambda c: c["machine"]["gpus"][0]["rules"].update(alignment_bytes=96), "power of two"),
        (lambda c: c["machine"]["gpus"][0].update(total_bytes=-1), "not above 0"),
        (lambda c: c["machine"]["gpus"][0].update(bandwidth_bytes_s=0), "bandwidth_bytes_s is 0"),
        (lambda c: c["machine"]["gpus"][1].update(link_bytes_s=-5), "gpus[1].link_bytes_s is -5"),
        (lambda c: c["machine"]["gpus"][0]["rules"].update(row_padding=-1), "row_padding is -1"),
        (lambda c: c["machine"]["ram"].update(bandwidth_bytes_s=0), "ram.bandwidth_bytes_s is 0"),
        (lambda c: c["machine"]["ram"].update(available_bytes=1 << 50), "bytes are free of"),
        (lambda c: c["machine"]["ram"].update(swap_free_bytes=1), "of swap are free of 0"),
        (lambda c: c["machine"]["cpu"].update(physical_cores=0), "physical_cores is 0"),
        (lambda c: c.update(comment="x"), "comment: unknown key"),
        (lambda c: c.update(schema_version=2), "schema_version 2"),
        (lambda c: c.pop("machine"), "it has no `machine`"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_place(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_profile(changed(tmp_path, change))
    assert words in refusal.value.message
    assert "changed.json" in refusal.value.message


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_not_a_profile(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a machine profile"):
        load_profile(str(path))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(UsageError, match="not a machine profile"):
        load_profile(str(path))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(NotFoundError) as refusal:
        load_profile("rtx4090-24gb")
    assert "rtx4090-24g" in (refusal.value.hint or "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        save_profile(load_profile("cpu-64g"), tmp_path / "no" / "file.json")


# --- what a build drives


def test_a_cpu_build_drives_no_gpu() -> None:
    assert for_target(load_profile("rtx3090-x2"), "cpu").gpus == ()


def test_a_cuda_build_drives_nvidia() -> None:
    machine = load_profile("rtx3090-x2")
    assert for_target(machine, "cuda") == machine
    assert for_target(machine, "rocm").gpus == ()


def test_a_vulkan_build_has_its_own_rules() -> None:
    gpu = for_target(load_profile("rtx3090"), "vulkan").gpus[0]
    assert (gpu.backend, gpu.rules) == ("vulkan", RULES["vulkan"])


def test_looking_at_the_machine_imports_nothing_heavy() -> None:
    code = (
        "import sys, loadmaster.machine.detect as d; d.detect_machine();"
        "print(*[m for m in ('torch', 'numpy', 'llama_cpp', 'psutil', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
