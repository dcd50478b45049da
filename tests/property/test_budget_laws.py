"""Laws of the budget, over drawn machines."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import UsageError
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Machine
from loadmaster.plan.budget import make_budget
from loadmaster.units import GIB, Bytes

_BASE = load_profile("rtx3090")
_CARD = _BASE.gpus[0]


@st.composite
def machines(draw: st.DrawFn, *, min_gpus: int = 0) -> Machine:
    """Up to three GPUs, any part of everything in use, cgroups, and memory shared with the host."""
    total = draw(st.integers(1, 256 * GIB))
    free = draw(st.integers(0, total))
    limit = draw(st.none() | st.integers(1, 256 * GIB))
    used = draw(st.integers(0, limit)) if limit else None
    ram = replace(
        _BASE.ram,
        total_bytes=Bytes(total),
        available_bytes=Bytes(free),
        cgroup_limit_bytes=None if limit is None else Bytes(limit),
        cgroup_used_bytes=None if used is None else Bytes(used),
    )
    gpus = []
    for index in range(draw(st.integers(min_gpus, 3))):
        size = draw(st.integers(1, 80 * GIB))
        gpu_free = draw(st.none() | st.integers(0, size))
        gpus.append(
            replace(
                _CARD,
                id=f"gpu:{index}",
                total_bytes=Bytes(size),
                free_bytes=None if gpu_free is None else Bytes(gpu_free),
                unified_memory=draw(st.booleans()),
            )
        )
    return replace(_BASE, ram=ram, gpus=tuple(gpus))


def percents() -> st.SearchStrategy[str]:
    return st.integers(1, 10_000).map(lambda parts: f"{parts / 100:.2f}%")


@given(machines(), st.none() | percents(), st.none() | percents())
def test_no_cap_is_above_what_is_free(machine: Machine, vram: str | None, ram: str | None) -> None:
    try:
        budget = make_budget(machine, vram if machine.gpus else None, ram)
    except UsageError:
        return  # a percentage of a few bytes is 0, or a shared memory was given away twice
    for gpu in machine.gpus:
        free = gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes
        assert 0 <= budget.cap(gpu.id) <= free
    assert 0 <= budget.cap("cpu") <= machine.ram.free_bytes
    assert set(budget.caps) == set(budget.origin) == {"cpu", *(gpu.id for gpu in machine.gpus)}


@given(machines())
def test_shared_memory_is_given_once(machine: Machine) -> None:
    budget = make_budget(machine)
    shared = [gpu.id for gpu in machine.gpus if gpu.unified_memory]
    together = sum(budget.cap(device) for device in (*shared, "cpu"))
    assert together <= machine.ram.free_bytes


@given(machines(), st.integers(0, 16 * GIB))
def test_more_free_memory_never_gives_a_smaller_budget(machine: Machine, more: int) -> None:
    plain = replace(machine, gpus=tuple(replace(gpu, unified_memory=False) for gpu in machine.gpus))
    grown = replace(
        plain,
        gpus=tuple(
            replace(gpu, free_bytes=Bytes(min(gpu.total_bytes, (gpu.free_bytes or 0) + more)))
            for gpu in plain.gpus
            if gpu.free_bytes is not None
        ),
    )
    before, after = make_budget(plain), make_budget(grown)
    assert all(after.cap(gpu.id) >= before.cap(gpu.id) for gpu in grown.gpus)


@given(machines(min_gpus=1), st.integers(0, 80 * GIB))
def test_a_size_in_bytes_is_kept_to_the_byte(machine: Machine, size: int) -> None:
    gpu = machine.gpus[0]
    if size > gpu.total_bytes:
        with pytest.raises(UsageError) as refusal:
            make_budget(machine, f"0={size}B")
        assert refusal.value.numbers["asked_bytes"] == size
        return
    budget = make_budget(machine, f"0={size}B")
    free = gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes
    assert budget.cap("gpu:0") == min(size, free)
    assert all(budget.cap(other.id) == 0 for other in machine.gpus[1:])


@given(machines(), st.text(max_size=12))
def test_any_text_is_a_budget_or_one_line(machine: Machine, text: str) -> None:
    for vram, ram in ((text, None), (None, text)):
        with suppress(UsageError):  # any other error fails the test
            make_budget(machine, vram, ram)
