"""Host RAM for the states of preempted sequences: planned, and what the worker may use."""

from dataclasses import replace

import pytest

from loadmaster.plan.ledger import with_states
from loadmaster.plan.types import CPU, DevicePlan, EngineSettings, Knobs, MemoryItem, Plan, Workload
from loadmaster.tasks.measurement import compare
from loadmaster.tasks.proving import open_session
from loadmaster.units import MIB, Bytes
from tests.cli_parts import Heard, ScriptedEngine, opening, report
from tests.toy import plan_toy, toy_machine, toy_model
from tests.unit.test_measurement import report_of


def planned(n_seq_max: int = 4, **knobs: object) -> Plan:
    workload = Workload(n_ctx=512, n_seq_max=n_seq_max)
    plan = plan_toy(
        toy_model(), toy_machine(), workload=workload, knobs=Knobs(**knobs)  # type: ignore[arg-type]
    )  # fmt: skip
    assert isinstance(plan, Plan)
    return plan


def host(*, kv_mib: int, cap_mib: int, mapped_mib: int = 0) -> DevicePlan:
    kv = MemoryItem(device=CPU, kind="kv", bytes=Bytes(kv_mib * MIB), source="header", why="")
    return DevicePlan(
        id=CPU, name="host RAM", budget_bytes=Bytes(cap_mib * MIB), budget_origin="", items=(kv,),
        mapped_bytes=Bytes(mapped_mib * MIB),
    )  # fmt: skip


def states_mib(device: DevicePlan, settings: EngineSettings) -> float:
    [found] = with_states([device], settings)
    return found.of("cache") / MIB


def test_many_sequences_have_room_for_as_much_as_their_caches() -> None:
    plan = planned()
    caches = sum(device.of("kv") for device in plan.devices)
    [item] = [item for item in plan.device(CPU).items if item.kind == "cache"]
    assert item.bytes == caches > 0
    assert "preempted" in item.why
    assert plan.device(CPU).planned_bytes <= plan.device(CPU).budget_bytes


def test_nothing_is_planned_where_nothing_can_be_preempted() -> None:
    assert planned(n_seq_max=1).device(CPU).of("cache") == 0
    assert planned(pooling="mean").device(CPU).of("cache") == 0


def test_half_of_what_is_left_stays_free_and_a_mapped_file_comes_first() -> None:
    settings = planned().llamacpp
    assert states_mib(host(kv_mib=10, cap_mib=16), settings) == 3
    assert states_mib(host(kv_mib=10, cap_mib=16, mapped_mib=4), settings) == 1
    assert states_mib(host(kv_mib=10, cap_mib=16, mapped_mib=8), settings) == 0
    assert states_mib(host(kv_mib=10, cap_mib=100), settings) == 10
    assert states_mib(host(kv_mib=10, cap_mib=10), settings) == 0


@pytest.mark.parametrize("n_seq_max", [1, 4])
def test_the_worker_may_keep_what_is_planned_and_no_more(n_seq_max: int) -> None:
    plan = planned(n_seq_max)
    engine = ScriptedEngine(report(plan))
    open_session(plan, opening(engine), Heard()).close()
    [load] = engine.loads
    assert load.state_bytes == plan.device(CPU).of("cache")


def test_what_may_be_preempted_is_not_held_against_a_load() -> None:
    """A fresh worker has no states yet: the row stands by itself, unmeasured."""
    plan = planned()
    report = replace(report_of(plan, 0), process_bytes=plan.device(CPU).needed_bytes)
    rows = {row.kind: row for row in compare(plan, report, parent_bytes=Bytes(0))}
    assert rows["cache"].planned_bytes == plan.device(CPU).of("cache")
    assert rows["cache"].measured_bytes is None
    assert not any("cache+" in kind for kind in rows)
