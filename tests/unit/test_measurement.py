"""Planned beside measured: buffers are exact, mapped weights are not."""

from dataclasses import replace

from loadmaster.engine.types import MemoryReport
from loadmaster.interfaces.cli.render import memory_table
from loadmaster.plan.types import CPU, BufferSizes, Knobs, Plan, Workload
from loadmaster.tasks.measurement import compare, excess_by_device
from loadmaster.units import MIB, Bytes
from tests.checkpoint_parts import fitting, shape
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


def test_what_torch_drops_after_every_step_is_not_called_measured() -> None:
    plan = fitting(shape(), "cpu-64g", quantize="nf4")
    host = plan.device(CPU)
    row = BufferSizes(
        device=CPU, model_bytes=host.of("model"), context_bytes=host.of("kv"),
        compute_bytes=Bytes(0),
    )  # fmt: skip
    report = replace(report_of(plan, 0), buffers=(row,))
    rows = {row.kind: row for row in compare(plan, report, parent_bytes=Bytes(0))}
    assert rows["compute"].measured_bytes is None
    assert rows["compute"].planned_bytes == host.of("compute") > 0
    assert "dropped" in memory_table([rows["compute"]])
    assert rows["overhead"].measured_bytes == host.of("compute", "overhead")
