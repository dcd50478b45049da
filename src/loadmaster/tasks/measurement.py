"""Planned memory beside measured memory, by the kinds of the ledger. Pure.

Two proofs, kept apart: the engine's buffers equal the plan to the byte (`exact` rows), and the
process total on each device stays at or under its cap (`total` rows).
"""

from dataclasses import dataclass

from loadmaster.engine.types import MemoryReport
from loadmaster.plan.types import CPU, BufferSizes, DevicePlan, EngineSettings, Kind, Plan
from loadmaster.units import Bytes

TOTAL = "total"
_CONTEXT: tuple[Kind, ...] = ("kv", "recurrent")
_BUFFERS: tuple[tuple[tuple[Kind, ...], str], ...] = (
    (("model",), "model_bytes"),
    (_CONTEXT, "context_bytes"),
    (("compute",), "compute_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One kind on one device. `cap_bytes` is set on the total rows alone."""

    device: str
    kind: str
    planned_bytes: Bytes
    measured_bytes: Bytes | None
    exact: bool = False  # measured must equal planned
    cap_bytes: Bytes | None = None
    note: str = ""

    @property
    def excess_bytes(self) -> Bytes:
        """How far the measurement is above what it may be; 0 when it is not."""
        if self.measured_bytes is None:
            return Bytes(0)
        allowed = self.planned_bytes if self.exact else self.cap_bytes
        return Bytes(0 if allowed is None else max(0, self.measured_bytes - allowed))


def compare(plan: Plan, report: MemoryReport, *, parent_bytes: Bytes) -> tuple[MemoryRow, ...]:
    """Rows for every device of the plan; `parent_bytes` is our own process, which the RAM cap
    covers beside the worker."""
    rows: list[MemoryRow] = []
    for device in plan.devices:
        measured = _buffers(report, device.id)
        rows += _buffer_rows(device, measured, kept=isinstance(plan.engine, EngineSettings))
        total = _process_total(device.id, report, parent_bytes)
        rows += _other_rows(device, measured, _drafted(report, device.id), total)
        rows += _draft_rows(device, report)
        rows += _state_rows(device)
        rows.append(_total_row(device, total))
    return tuple(rows)


def rows_to_json(rows: tuple[MemoryRow, ...]) -> list[dict[str, object]]:
    """The rows for programs, `null` where nothing could be measured."""
    return [
        {
            "device": row.device,
            "kind": row.kind,
            "planned_bytes": row.planned_bytes,
            "measured_bytes": row.measured_bytes,
            "cap_bytes": row.cap_bytes,
        }
        for row in rows
    ]


def over_plan(rows: tuple[MemoryRow, ...]) -> tuple[MemoryRow, ...]:
    """The rows whose measurement is above what the plan or the cap allows."""
    return tuple(row for row in rows if row.excess_bytes > 0)


def excess_by_device(rows: tuple[MemoryRow, ...]) -> dict[str, Bytes]:
    """Per device, the largest amount by which the next plan must be smaller."""
    excess: dict[str, Bytes] = {}
    for row in over_plan(rows):
        excess[row.device] = Bytes(max(excess.get(row.device, 0), row.excess_bytes))
    return excess


def _buffers(report: MemoryReport, device: str) -> BufferSizes | None:
    return next((row for row in report.buffers if row.device == device), None)


def _buffer_rows(
    device: DevicePlan, measured: BufferSizes | None, *, kept: bool
) -> list[MemoryRow]:
    """`kept`: the engine keeps a compute buffer; torch makes one in every step and drops it."""
    rows = []
    for kinds, field in _BUFFERS:
        if "compute" in kinds and not kept:
            rows += _dropped_rows(device)
            continue
        mapped = device.mapped_bytes if device.id == CPU and "model" in kinds else Bytes(0)
        planned = Bytes(device.of(*kinds) + mapped)
        found: int = getattr(measured, field) if measured else 0
        if planned or found:
            name = next((k for k in kinds if device.of(k)), kinds[0])
            rows.append(
                MemoryRow(
                    device=device.id,
                    kind=name,
                    planned_bytes=planned,
                    measured_bytes=Bytes(found),
                    # The engine maps the file from the first to the last tensor that it needs, and
                    # with GPUs there are others in between.
                    exact=not mapped,
                    note="the span of the file that is mapped" if mapped else "",
                )
            )
    return rows


def _dropped_rows(device: DevicePlan) -> list[MemoryRow]:
    planned = device.of("compute")
    if not planned:
        return []
    return [
        MemoryRow(
            device=device.id,
            kind="compute",
            planned_bytes=planned,
            measured_bytes=None,
            note="made and dropped in every step; the total has its peak",
        )
    ]


def _sum(row: BufferSizes | None) -> int:
    return 0 if row is None else row.model_bytes + row.context_bytes + row.compute_bytes


def _drafted(report: MemoryReport, device: str) -> int:
    return sum(_sum(row) for row in report.draft_buffers if row.device == device)


def _draft_rows(device: DevicePlan, report: MemoryReport) -> list[MemoryRow]:
    """The draft model's buffers, all in one line."""
    planned, found = device.of("draft"), _drafted(report, device.id)
    if not planned and not found:
        return []
    return [
        MemoryRow(
            device=device.id,
            kind="draft",
            planned_bytes=planned,
            measured_bytes=Bytes(found),
            exact=True,
        )
    ]


def _other_rows(
    device: DevicePlan, measured: BufferSizes | None, drafted: int, total: Bytes | None
) -> list[MemoryRow]:
    """What no breakdown of the engine has: together it is the total less the buffers."""
    kinds = {item.kind for item in device.items}
    kinds -= {"model", "compute", "cache", "draft", "headroom", *_CONTEXT}
    planned = device.of(*kinds)
    if not planned:
        return []
    inside = drafted + _sum(measured)
    # Mapped weights are in the engine's model buffer and not in the process total.
    resident = inside - (device.mapped_bytes if device.id == CPU else 0)
    rest = None if total is None else Bytes(max(0, total - max(0, resident)))
    return [
        MemoryRow(
            device=device.id,
            kind="+".join(sorted(kinds)),
            planned_bytes=planned,
            measured_bytes=rest,
            note="process total less the buffers above",
        )
    ]


def _state_rows(device: DevicePlan) -> list[MemoryRow]:
    """Room that the worker fills while it runs, if at all."""
    planned = device.of("cache")
    if not planned:
        return []
    return [
        MemoryRow(
            device=device.id,
            kind="cache",
            planned_bytes=planned,
            measured_bytes=None,
            note="fills when sequences are preempted",
        )
    ]


def _process_total(device: str, report: MemoryReport, parent_bytes: Bytes) -> Bytes | None:
    if device == CPU:
        return Bytes(max(report.process_bytes, report.process_peak_bytes) + parent_bytes)
    used, peak = report.device_used_bytes.get(device), report.device_peak_bytes.get(device)
    known = [value for value in (used, peak) if value is not None]
    return Bytes(max(known)) if known else None


def _total_row(device: DevicePlan, total: Bytes | None) -> MemoryRow:
    return MemoryRow(
        device=device.id,
        kind=TOTAL,
        planned_bytes=device.planned_bytes,
        measured_bytes=total,
        cap_bytes=device.budget_bytes,
    )
