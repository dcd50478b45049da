"""`doctor`: the advice for each finding, and what is printed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadmaster.engine.types import DeviceFacts, EngineBuild
from loadmaster.interfaces.cli import doctor as command
from loadmaster.interfaces.cli.doctor import diagnosis_text, portable
from loadmaster.machine.host import Host
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Confinement, GpuProcess, Machine
from loadmaster.tasks import doctor as task
from loadmaster.tasks.advice import Advice, Engines, Obstacles, advise
from loadmaster.tasks.doctor import (
    Answer,
    Diagnosis,
    EngineState,
    Installed,
    diagnosis_json,
    obstacles,
)
from loadmaster.units import GIB, MIB, Bytes

CARD = load_profile("rtx4090-24g")
OLD_CARD = replace(CARD, gpus=(replace(CARD.gpus[0], compute_capability=(7, 5)),))
NONE = load_profile("cpu-64g")
SEEN = (
    DeviceFacts(
        id="gpu:0",
        engine_name="CUDA0",
        description="NVIDIA GeForce RTX 4090",
        total_bytes=Bytes(24080 * MIB),
        free_bytes=Bytes(23000 * MIB),
    ),
)
CPU: Engines = {"0.3.36-cpu": ("cpu", True, ())}
CUDA: Engines = {"0.3.36-cuda": ("cuda", True, SEEN)}


def advice(
    machine: Machine = NONE, engines: Engines = CPU, found: Obstacles | None = None
) -> dict[str, Advice]:
    lines = advise(machine, found or Obstacles(), engines, lambda target: f"build {target}")
    return {line.code: line for line in lines}


def test_nothing_to_mend() -> None:
    assert advice() == {}
    assert advice(CARD, CUDA) == {}


def test_no_engine() -> None:
    assert advice(engines={})["no_engine"].command == "loadmaster engine build"
    assert advice(CARD, {})["no_engine"].command == "build cuda"


def test_an_engine_that_is_not_in_use() -> None:
    assert "no_engine_in_use" in advice(engines={"0.3.35-cpu": ("cpu", False, None)})


def test_cpu_only_engine_on_a_machine_with_a_gpu() -> None:
    line = advice(CARD, CPU)["cpu_only_engine"]
    assert "`BLAS = 0`" in line.what
    assert "NVIDIA GeForce RTX 4090" in line.what
    assert line.command == "build cuda"


def test_a_gpu_engine_that_is_there_is_used_instead_of_built() -> None:
    line = advice(CARD, {**CPU, "0.3.36-cuda": ("cuda", False, SEEN)})["cpu_only_engine"]
    assert line.command == "loadmaster engine use 0.3.36-cuda"


def test_a_gpu_engine_that_sees_nothing() -> None:
    blind: Engines = {"0.3.36-cuda": ("cuda", True, ())}
    assert advice(CARD, blind)["engine_sees_no_gpu"].command == "loadmaster engine test 0.3.36-cuda"


@pytest.mark.parametrize(
    ("os", "container", "command"),
    [
        ("Linux 6.8 (Ubuntu 24.04.1 LTS)", None, "sudo ubuntu-drivers install"),
        ("Linux 6.1 (Debian GNU/Linux 12)", None, "sudo apt-get install nvidia-driver"),
        ("Linux 6.9 (Fedora Linux 40)", None, "nvidia-smi"),
        ("Linux 6.8 (Ubuntu 24.04.1 LTS)", "docker", "docker run --gpus all …"),
        ("Linux 6.8", "podman", "podman run --device nvidia.com/gpu=all …"),
    ],
)
def test_a_card_without_its_driver(os: str, container: str | None, command: str) -> None:
    machine = replace(NONE, os=os, container=container)
    line = advice(machine, found=Obstacles(silent_nvidia=("0000:01:00.0",)))["no_driver"]
    assert "0000:01:00.0" in line.what
    assert line.command == command


def test_a_card_without_permission() -> None:
    found = Obstacles(closed_files=("/dev/nvidiactl",), silent_nvidia=("0000:01:00.0",))
    lines = advice(found=found)
    assert set(lines) == {"no_permission"}
    assert "/dev/nvidiactl" in lines["no_permission"].what
    assert "usermod" in (lines["no_permission"].command or "")


def test_wsl() -> None:
    assert set(advice(replace(NONE, wsl=2))) == {"wsl2_paging", "wsl2_metering"}
    assert set(advice(replace(NONE, wsl=1))) == {"wsl1"}


def ram(**changes: Any) -> Machine:
    return replace(NONE, ram=replace(NONE.ram, **changes))


def test_memory_limits() -> None:
    assert set(advice(ram(cgroup_limit_bytes=Bytes(16 * GIB)))) == {"cgroup_limit"}
    assert advice(ram(cgroup_limit_bytes=Bytes(60 * GIB))) == {}
    assert set(advice(ram(mlock_limit_bytes=Bytes(8 * MIB)))) == {"mlock_limit"}
    assert advice(ram(mlock_limit_bytes=Bytes(64 * GIB))) == {}
    swap = {"swap_total_bytes": Bytes(8 * GIB)}
    assert set(advice(ram(**swap, swap_free_bytes=Bytes(7 * GIB)))) == {"swap_in_use"}
    assert advice(ram(**swap, swap_free_bytes=Bytes(8 * GIB - MIB))) == {}


def test_disk() -> None:
    low = replace(NONE, disk_free_bytes=Bytes(4 * GIB), disk_path="/data")
    assert "4.00 GiB are free at /data" in advice(low)["disk_low"].what
    assert advice(replace(low, disk_free_bytes=Bytes(400 * GIB))) == {}


def test_a_narrow_link_and_a_crowded_card() -> None:
    busy = replace(
        CARD.gpus[0],
        pcie_width=4,
        pcie_width_max=16,
        processes=(
            GpuProcess(pid=7, name="python3", used_bytes=Bytes(12 * GIB)),
            GpuProcess(pid=8, name="Xorg", used_bytes=Bytes(200 * MIB)),
            GpuProcess(pid=9, name=None, used_bytes=None),
        ),
    )
    lines = advise(replace(CARD, gpus=(busy,)), Obstacles(), CUDA, str)
    assert [line.code for line in lines] == ["narrow_link", "gpu_in_use"]
    assert "python3 (pid 7) holds 12.00 GiB of gpu:0" in lines[1].what


def test_obstacles_are_seen_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").write_text("")
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    host = Host(root=tmp_path)
    assert obstacles(host, NONE) == Obstacles(silent_nvidia=("0000:01:00.0",))
    assert obstacles(host, CARD) == Obstacles()


# --- the whole


GRANTED = Confinement(name="no network", active=True, detail="seccomp")
REFUSED = Confinement(name="no file writes", active=False, detail="no Landlock")


def diagnosis(**changes: Any) -> Diagnosis:
    engine = EngineState(
        id="0.3.36-cuda",
        target="cuda",
        version="0.3.36",
        root="/engines/0.3.36-cuda",
        in_use=True,
        devices=SEEN,
    )
    process = GpuProcess(pid=7, name="python3", used_bytes=Bytes(GIB))
    machine = replace(
        CARD,
        gpus=(replace(CARD.gpus[0], processes=(process,)),),
        confinements=(GRANTED, REFUSED),
        warnings=("something is unknown",),
    )
    found = Diagnosis(loadmaster_version="0.1.0", machine=machine, engines=(engine,), advice=())
    return replace(found, **changes)


def test_text() -> None:
    text = diagnosis_text(diagnosis())
    for expected in (
        "60.00 GiB free of 64.00 GiB",
        "23.52 GiB free of 23.99 GiB (profile)",
        "1008 GB/s (table)",
        "PCIe 4.0 x16",
        "compute capability 8.9",
        "python3  1.00 GiB",
        "0.3.36-cuda",
        "CUDA0: NVIDIA GeForce RTX 4090, 22.46 GiB free of 23.52 GiB",
        "no Landlock",
        "something is unknown",
        "nothing to mend",
    ):
        assert expected in text


def test_text_without_a_gpu_or_an_engine() -> None:
    bare = diagnosis(
        machine=NONE, engines=(), advice=(Advice(code="x", what="do it", command="type it"),)
    )
    text = diagnosis_text(bare)
    assert "GPUs" not in text
    assert "  - do it\n      type it" in text


def test_json_is_one_versioned_object() -> None:
    content = json.loads(json.dumps(diagnosis_json(diagnosis())))
    assert content["schema_version"] == 1
    assert content["machine"]["gpus"][0]["processes"][0]["pid"] == 7
    assert content["machine"]["confinements"][1]["active"] is False
    assert content["engines"][0]["devices"][0]["engine_name"] == "CUDA0"


def test_a_saved_machine_has_nothing_of_here_and_now() -> None:
    machine = portable(replace(diagnosis().machine, disk_path="/home/me"))
    assert machine.gpus[0].processes == ()
    assert (machine.disk_path, machine.warnings) == (None, ())


def host(root: Path) -> Host:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    return Host(root=root, disk_path=root)


def test_examine_asks_every_engine(tmp_path: Path) -> None:
    built = tuple(
        EngineBuild(id=f"v-{target}", target=target, version="v", root=tmp_path / target)
        for target in ("cpu", "cuda")
    )

    def ask(build: EngineBuild, machine: Machine) -> Answer:
        if build.target == "cuda":
            return Answer(fault="libcudart is missing")
        return Answer(devices=(), confinements=(GRANTED,))

    installed = Installed(builds=built, used_id="v-cpu")
    found = task.examine(host(tmp_path), installed, ask, helpers=tuple)
    assert [(e.id, e.in_use, e.fault) for e in found.engines] == [
        ("v-cpu", True, None),
        ("v-cuda", False, "libcudart is missing"),
    ]
    assert found.machine.confinements == (GRANTED,)


@pytest.mark.parametrize(
    ("machine", "target", "expected"),
    [
        (CARD, "cuda", "SDPA: FlashAttention-2, and"),
        (CARD, "cpu", "SDPA: its flash kernels for the CPU"),
        (OLD_CARD, "cuda", "has compute capability 7.5, flash wants 8.0"),
    ],
)
def test_the_engine_of_safetensors_says_which_attention_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, target: str, expected: str
) -> None:
    monkeypatch.setattr(task, "detect_machine", lambda _: machine)
    python = EngineBuild(id="transformers-5", target=target, version="torch 2", root=tmp_path)
    found = task.examine(
        host(tmp_path), Installed(python=python), lambda *_: Answer(confinements=(GRANTED,)), tuple
    )
    assert found.safetensors is not None
    assert expected in found.safetensors.attention
    assert expected in diagnosis_text(found)
    told: Any = diagnosis_json(found)["safetensors"]
    assert (told["id"], told["target"]) == ("transformers-5", target)
    assert told["attention"] == found.safetensors.attention


def test_examine_without_an_engine(tmp_path: Path) -> None:
    found = task.examine(
        host(tmp_path),
        Installed(fault="`build.json` cannot be read"),
        lambda build, machine: Answer(confinements=(REFUSED,)),
        helpers=tuple,
    )
    assert found.engines == ()
    assert found.safetensors is None
    assert found.machine.confinements == (REFUSED,)
    codes = [line.code for line in found.advice if line.code != "disk_low"]
    assert codes == ["engine_unreadable", "no_engine"]


def test_no_installed_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path))
    assert replace(task.find_installed(), python=None) == Installed()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "examine", diagnosis)
    saved = tmp_path / "here.json"
    command.doctor.main(["--json", "--save-machine", str(saved)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["loadmaster_version"] == "0.1.0"
    assert load_profile(str(saved)).gpus[0].name == "NVIDIA GeForce RTX 4090"
    command.doctor.main([], standalone_mode=False)
    assert "confinement of workers" in capsys.readouterr().out


def test_a_worker_answers_without_an_engine(tmp_path: Path) -> None:
    machine = replace(NONE, ram=replace(NONE.ram, total_bytes=Bytes(4 * GIB)))
    answer = task.ask_worker(task.NO_BUILD, machine)
    assert answer.fault is None
    assert {c.name for c in answer.confinements} >= {"no network", "no file writes", "memory cap"}


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    build = EngineBuild(id="broken", target="cpu", version="0", root=tmp_path)
    answer = task.ask_worker(build, NONE)
    assert answer.devices is None
    assert answer.fault
