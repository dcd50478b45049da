"""`--vram` and `--ram` to caps."""

from dataclasses import replace

import pytest

from loadmaster.errors import UsageError
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Gpu, Machine
from loadmaster.plan.budget import headroom, make_budget
from loadmaster.units import GIB, MIB, Bytes

ONE = load_profile("rtx4090-24g")  # 24564 MiB, 24080 free; 64 GiB of RAM, 60 free
TWO = load_profile("rtx3090-x2")  # 24576 MiB each, 24123 free
NONE = load_profile("cpu-64g")


def caps(machine: Machine, vram: str | None = None, ram: str | None = None) -> dict[str, int]:
    return dict(make_budget(machine, vram, ram).caps)


def limited(machine: Machine, limit: int, used: int) -> Machine:
    ram = replace(machine.ram, cgroup_version=2, cgroup_limit_bytes=Bytes(limit),
                  cgroup_used_bytes=Bytes(used))  # fmt: skip
    return replace(machine, ram=ram)


def unified(total: int = 32 * GIB, free: int = 28 * GIB) -> Machine:
    ram = replace(NONE.ram, total_bytes=Bytes(total), available_bytes=Bytes(free))
    gpu: Gpu = replace(
        ONE.gpus[0], unified_memory=True, total_bytes=Bytes(24 * GIB), free_bytes=Bytes(24 * GIB)
    )
    return replace(NONE, ram=ram, gpus=(gpu,))


def test_default_is_what_is_free_less_a_headroom() -> None:
    budget = make_budget(ONE)
    assert budget.cap("gpu:0") == 24080 * MIB - 24564 * MIB * 2 // 100
    assert budget.cap("cpu") == 60 * GIB - 64 * GIB * 5 // 100
    assert budget.origin["gpu:0"] == "23.52 GiB free, less 491.28 MiB headroom"


@pytest.mark.parametrize(
    ("total", "free", "kept"),
    [
        (4 * GIB, 4 * GIB, 256 * MIB),  # the floor
        (80 * GIB, 80 * GIB, 80 * GIB * 2 // 100),  # the percentage
        (24 * GIB, 400 * MIB, 100 * MIB),  # a quarter of what is free
        (24 * GIB, 0, 0),
    ],
)
def test_headroom(total: int, free: int, kept: int) -> None:
    assert headroom(total, free, 256 * MIB, 2) == kept


def test_unknown_free_takes_the_total() -> None:
    machine = replace(ONE, gpus=(replace(ONE.gpus[0], free_bytes=None),))
    budget = make_budget(machine)
    assert budget.cap("gpu:0") == 24564 * MIB - 24564 * MIB * 2 // 100
    assert "free unknown" in budget.origin["gpu:0"]
    assert make_budget(machine, "23GiB").cap("gpu:0") == 23 * GIB


def test_one_size_is_for_each_gpu() -> None:
    assert caps(TWO, "8GiB") | {"cpu": 0} == {"gpu:0": 8 * GIB, "gpu:1": 8 * GIB, "cpu": 0}


@pytest.mark.parametrize(
    "text", ["0=8GiB,1=6GiB", " 1 = 6GiB , 0 = 8GiB ", "gpu:0=8GiB,gpu:1=6GiB"]
)
def test_sizes_by_number(text: str) -> None:
    found = caps(TWO, text)
    assert (found["gpu:0"], found["gpu:1"]) == (8 * GIB, 6 * GIB)


def test_a_gpu_that_is_not_named_gets_nothing() -> None:
    budget = make_budget(TWO, "1=6GiB")
    assert (budget.cap("gpu:0"), budget.cap("gpu:1")) == (0, 6 * GIB)
    assert budget.origin["gpu:0"] == "not named in `--vram 1=6GiB`"


def test_percent_is_of_the_total() -> None:
    assert caps(ONE, "50%", "12.5%") == {"gpu:0": 12282 * MIB, "cpu": 8 * GIB}


@pytest.mark.parametrize("text", ["0", "0GiB", "0%", "0=0"])
def test_vram_0_is_cpu_only(text: str) -> None:
    assert caps(ONE, text)["gpu:0"] == 0


def test_vram_0_on_a_machine_without_a_gpu() -> None:
    assert set(caps(NONE, "0")) == {"cpu"}


def test_a_cap_above_what_is_free_is_lowered() -> None:
    budget = make_budget(TWO, "24GiB", "62GiB")
    assert budget.cap("gpu:1") == 24123 * MIB
    assert budget.origin["gpu:1"] == "`--vram 24GiB`, but 23.56 GiB is free"
    assert budget.cap("cpu") == 60 * GIB


def test_a_cgroup_is_the_machine() -> None:
    machine = limited(NONE, 16 * GIB, 4 * GIB)
    assert caps(machine)["cpu"] == 12 * GIB - GIB
    assert caps(machine, ram="50%")["cpu"] == 8 * GIB
    with pytest.raises(UsageError, match=r"more than the cgroup of this process has: 16\.00 GiB"):
        make_budget(machine, ram="17GiB")


@pytest.mark.parametrize(
    ("machine", "vram", "ram", "words", "hint"),
    [
        (ONE, "6G", None, "`--vram 6G`: `6G` is not a size", "write `6GiB`"),
        (ONE, "6", None, "`6` is not a size", "units are"),
        (ONE, "-1", None, "`-1` is not a size", "--vram 90%"),
        (ONE, "-8GiB", None, "`-8GiB` is not a size", "--vram 90%"),
        (ONE, "", None, "`` is not a size", "--vram 90%"),
        (ONE, "-5%", None, "`-5%` is not a size", "--vram 90%"),
        (ONE, "101%", None, "more than NVIDIA GeForce RTX 4090 has", "--vram 24564MiB"),
        (ONE, "24GiB", None, "more than NVIDIA GeForce RTX 4090 has: 23.99 GiB", "24564MiB"),
        (TWO, "0=8GiB,2=1GiB", None, "there is no gpu:2", "gpu:1 (NVIDIA GeForce RTX 3090)"),
        (TWO, "0=8GiB,0=1GiB", None, "names gpu:0 twice", None),
        (TWO, "8GiB,1=1GiB", None, "`8GiB` names no GPU", "0=8GiB,1=6GiB"),
        (TWO, "8GiB,6GiB", None, "does not say which GPU", "--vram 0=8GiB,1=6GiB"),
        (TWO, "0=6G", None, "`6G` is not a size", "write `6GiB`"),
        (NONE, "8GiB", None, "there is no GPU here", "loadmaster doctor"),
        (NONE, "6G", None, "`6G` is not a size", "write `6GiB`"),
        (NONE, "0=8GiB", None, "there is no gpu:0", "leave `--vram` out"),
        (ONE, None, "0", "`--ram 0` leaves no memory", "--ram 8GiB"),
        (ONE, None, "0GiB", "leaves no memory", "--ram 8GiB"),
        (ONE, None, "0%", "leaves no memory", "--ram 8GiB"),
        (ONE, None, "48", "`48` is not a size", "--ram 90%"),
        (ONE, None, "-1", "`-1` is not a size", "--ram 90%"),
        (ONE, None, "100GiB", "more than this machine has: 64.00 GiB", "--ram 65536MiB"),
        (ONE, None, "0=8GiB", "`0=8GiB` is not a size", "--ram 90%"),
    ],
)
def test_refused(
    machine: Machine, vram: str | None, ram: str | None, words: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as refusal:
        make_budget(machine, vram, ram)
    assert words in refusal.value.message
    assert (hint or "") in (refusal.value.hint or "")
    assert refusal.value.exit_code == 2


def test_the_numbers_are_in_the_error() -> None:
    with pytest.raises(UsageError) as refusal:
        make_budget(ONE, "30GiB")
    assert refusal.value.numbers == {"asked_bytes": 30 * GIB, "total_bytes": 24564 * MIB}


# --- one memory for GPU and host


def test_shared_memory_is_divided() -> None:
    budget = make_budget(unified())
    pool = 28 * GIB - 32 * GIB * 5 // 100
    assert budget.cap("cpu") + budget.cap("gpu:0") == pool
    assert budget.cap("cpu") == pool // 8
    assert "shares it" in budget.origin["cpu"]


def test_what_is_named_of_a_shared_memory_leaves_the_rest() -> None:
    pool = 28 * GIB - 32 * GIB * 5 // 100
    assert caps(unified(), vram="20GiB")["cpu"] == pool - 20 * GIB
    assert caps(unified(), ram="10GiB")["gpu:0"] == pool - 10 * GIB
    assert caps(unified(), vram="0")["cpu"] == pool


def test_shared_memory_is_not_given_twice() -> None:
    assert caps(unified(), "20GiB", "8GiB") == {"gpu:0": 20 * GIB, "cpu": 8 * GIB}
    with pytest.raises(UsageError, match=r"20\.00 GiB and 9\.00 GiB are more than") as refusal:
        make_budget(unified(), "20GiB", "9GiB")
    assert "`--vram 19456MiB`" in (refusal.value.hint or "")


def test_the_gpus_own_limit_holds_on_a_shared_memory() -> None:
    machine = unified(total=128 * GIB, free=120 * GIB)
    assert caps(machine)["gpu:0"] == 24 * GIB
