"""What is measured of a machine: the RAM cap is for the process total, what we hold already is not
taken from it twice, and a context is what is left beside buffers."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from loadmaster.machine.types import Machine
from loadmaster.tasks import calibration, opening, planner
from loadmaster.units import GIB, MIB, Bytes
from tests import cli_parts
from tests.toy import toy_machine


def machine(*, available: int, limit: int | None = None, used: int | None = None) -> Machine:
    toy = toy_machine(ram_bytes=8 * GIB)
    ram = replace(
        toy.ram,
        available_bytes=Bytes(available),
        cgroup_version=1,
        cgroup_limit_bytes=None if limit is None else Bytes(limit),
        cgroup_used_bytes=None if used is None else Bytes(used),
    )
    return replace(toy, ram=ram)


@pytest.mark.parametrize(
    ("found", "free"),
    [
        (machine(available=4 * GIB), 4 * GIB + 30 * MIB),
        (machine(available=8 * GIB), 8 * GIB),  # never more than there is
        (machine(available=4 * GIB, limit=GIB, used=30 * MIB), GIB),
        (machine(available=4 * GIB, limit=GIB, used=130 * MIB), GIB - 100 * MIB),
        (machine(available=4 * GIB, limit=GIB, used=10 * MIB), GIB),
    ],
)
def test_our_own_memory_counts_as_free(
    monkeypatch: pytest.MonkeyPatch, found: Machine, free: int
) -> None:
    monkeypatch.setattr(planner, "detect_machine", lambda: found)
    assert planner.machine_beside(Bytes(30 * MIB)).ram.free_bytes == free
    assert opening._free_beside(Bytes(30 * MIB))("cpu") == free


@pytest.mark.parametrize(("backend", "kept"), [("llamacpp", 1), ("transformers", 0), ("fake", 0)])
def test_a_context_is_measured_where_buffers_are_told_apart_from_it(
    monkeypatch: pytest.MonkeyPatch, backend: str, kept: int
) -> None:
    records: list[object] = []
    session = mock.Mock()
    monkeypatch.setattr(opening, "open_session", lambda *_: session)
    monkeypatch.setattr(calibration, "record", lambda *found: records.append(found))
    parts: Any = mock.Mock(backend=backend)
    assert opening._open(cli_parts.plan(), parts, mock.Mock()).session is session
    assert len(records) == kept
