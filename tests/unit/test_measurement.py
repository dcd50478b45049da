"""Planned beside measured: buffers are exact, mapped weights are not."""

from loadmaster.engine.types import MemoryReport
from loadmaster.plan.types import CPU, BufferSizes, Knobs, Plan, Workload
from loadmaster.tasks.measurement import compare, excess_by_device
from loadmaster.units import MIB, Bytes
from tests.toy import plan_toy, toy_machine, toy_model


def plan_of(load_mode: str) -> Plan:
    knobs = Knobs(load_mode=load_mode)  # type: ignore[arg-type]
    plan = plan_toy(toy_model(), toy_machine(), workload=Workload(n_ctx=512), knobs=knobs)
    assert isinstance(plan, Plan)
    return plan


def report_of(plan: Plan, extra_model_bytes: int) -> MemoryReport:
    host = plan.device(CPU)
    row = BufferSizes(
        device=CPU,
        model_bytes=Bytes(host.of("model") + host.mapped_bytes + extra_model_bytes),
        context_bytes=host.of("kv"),
        compute_bytes=host.of("compute"),
    )
    return MemoryReport(
        buffers=(row,), process_bytes=host.planned_bytes, process_peak_bytes=host.planned_bytes,
        mapped_bytes=host.mapped_bytes, device_used_bytes={}, device_peak_bytes={},
        device_denied={},
    )  # fmt: skip


def test_a_wider_mapping_is_no_excess() -> None:
    plan = plan_of("mmap")
    assert plan.device(CPU).mapped_bytes > 0
    rows = compare(plan, report_of(plan, MIB), parent_bytes=Bytes(0))
    assert excess_by_device(rows) == {}


def test_a_larger_buffer_is_an_excess() -> None:
    plan = plan_of("none")
    assert excess_by_device(compare(plan, report_of(plan, 0), parent_bytes=Bytes(0))) == {}
    rows = compare(plan, report_of(plan, MIB), parent_bytes=Bytes(0))
    assert excess_by_device(rows) == {CPU: MIB}
