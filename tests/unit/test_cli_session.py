"""Opening a session: the measurement agrees with the plan, or a smaller plan, or nothing runs."""

from dataclasses import replace

import pytest

from loadmaster.engine.types import DoneEvent, GenerateRequest, SamplingParams
from loadmaster.errors import (
    ContextLengthError,
    EngineCrashedError,
    EngineError,
    EngineRefusedError,
    OverBudgetError,
)
from loadmaster.plan.types import CPU, Plan
from loadmaster.tasks.measurement import compare, excess_by_device, rows_to_json
from loadmaster.tasks.proving import open_session
from loadmaster.units import MIB, Bytes
from tests import cli_parts as parts


def test_a_true_plan_opens_at_once() -> None:
    plan, heard = parts.plan(), parts.Heard()
    engine = parts.ScriptedEngine(parts.report(plan))
    session = open_session(plan, parts.opening(engine), heard)
    assert session.plan == plan
    assert heard.fractions == [0.5, 1.0]
    assert heard.lines == []
    session.close()
    assert engine.closed


def test_the_worker_is_capped_at_the_ram_budget_less_our_own_process() -> None:
    plan = parts.plan()
    engine = parts.ScriptedEngine(parts.report(plan))
    own = Bytes(4 * MIB)
    open_session(plan, parts.opening(engine, parent_bytes=lambda: own), parts.Heard())
    assert engine.loads[0].ram_cap_bytes == 296 * MIB
    assert engine.loads[0].model_stamp == "stamp"


def test_rows_show_planned_beside_measured_by_kind() -> None:
    plan = parts.plan()
    rows = compare(plan, parts.report(plan), parent_bytes=Bytes(0))
    gpu = {row.kind: row for row in rows if row.device == parts.GPU}
    assert gpu["model"].measured_bytes == gpu["model"].planned_bytes == 80 * MIB
    assert gpu["overhead"].measured_bytes == 5 * MIB
    assert gpu["total"].cap_bytes == 200 * MIB
    assert excess_by_device(rows) == {}
    assert {"device", "kind", "planned_bytes", "measured_bytes"} < rows_to_json(rows)[0].keys()


def test_mapped_weights_are_no_excess() -> None:
    plan = parts.plan()
    host = replace(
        parts.device(CPU, 300, kv=20, compute=10, output=1, overhead=100),
        mapped_bytes=Bytes(80 * MIB),
    )
    measured = parts.report(plan)
    resident = Bytes(host.planned_bytes)
    measured = replace(measured, process_bytes=resident, process_peak_bytes=resident)
    rows = compare(replace(plan, devices=(plan.devices[0], host)), measured, parent_bytes=Bytes(0))
    assert excess_by_device(rows) == {}
    [rest] = [row for row in rows if row.device == CPU and row.kind == "output+overhead"]
    assert rest.measured_bytes == 101 * MIB


@pytest.mark.parametrize("more", [1, 7 * MIB])
def test_one_byte_above_the_plan_takes_a_smaller_plan(more: int) -> None:
    plan, heard = parts.plan(), parts.Heard()
    measured = parts.report(plan)
    gpu = measured.buffers[0]
    swollen = replace(gpu, compute_bytes=Bytes(gpu.compute_bytes + more))
    first = parts.ScriptedEngine(replace(measured, buffers=(swollen, measured.buffers[1])))
    smaller = parts.plan(engine=parts.settings(n_gpu_layers=4, layers_per_device=(4,)))
    second = parts.ScriptedEngine(parts.report(smaller))
    engines = [first, second]
    asked: list[dict[str, Bytes]] = []

    def replan(caps: dict[str, Bytes], _: str) -> Plan:
        asked.append(caps)
        return smaller

    opening = parts.opening(first, start_engine=lambda _: engines.pop(0), replan=replan)
    session = open_session(plan, opening, heard)
    assert first.closed
    assert not second.closed
    assert session.plan == smaller
    assert asked == [{parts.GPU: 140 * MIB - more}]
    [line] = heard.lines
    assert "n_gpu_layers 5 → 4" in line
    assert "above the plan on gpu:0" in line


def test_without_a_smaller_plan_the_error_stands_and_nothing_runs() -> None:
    plan = parts.plan()
    measured = replace(parts.report(plan), process_peak_bytes=Bytes(301 * MIB))
    engine = parts.ScriptedEngine(measured)
    with pytest.raises(OverBudgetError, match=r"1.00 MiB above the plan on cpu") as caught:
        open_session(plan, parts.opening(engine), parts.Heard())
    assert caught.value.exit_code == 7
    assert engine.closed


def test_a_machine_that_never_agrees_is_not_tried_for_ever() -> None:
    plan = parts.plan()
    engine = parts.ScriptedEngine(replace(parts.report(plan), process_bytes=Bytes(999 * MIB)))
    opening = parts.opening(engine, replan=lambda _caps, _why: plan)
    with pytest.raises(OverBudgetError):
        open_session(plan, opening, parts.Heard())
    assert len(engine.loads) == 3


def test_less_free_than_planned_is_found_before_loading() -> None:
    plan = parts.plan()
    engine = parts.ScriptedEngine(parts.report(plan))
    free = {parts.GPU: Bytes(100 * MIB)}
    opening = parts.opening(engine, free_bytes=free.get)
    with pytest.raises(OverBudgetError, match=r"gpu:0 has 100.00 MiB free, .* takes 140.00 MiB"):
        open_session(plan, opening, parts.Heard())
    assert engine.loads == []


def test_a_refused_allocation_makes_room_on_the_gpu() -> None:
    plan = parts.plan()
    engine = parts.ScriptedEngine(parts.report(plan))
    engine.load_error = EngineRefusedError("cannot allocate 30 MiB on gpu:0")
    asked: list[dict[str, Bytes]] = []

    def replan(caps: dict[str, Bytes], _: str) -> Plan:
        asked.append(caps)
        engine.load_error = None
        return plan

    open_session(plan, parts.opening(engine, replan=replan), parts.Heard())
    assert [list(caps) for caps in asked] == [[parts.GPU]]


def test_a_dead_worker_is_closed_and_told() -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()))
    engine.load_error = EngineCrashedError("the worker died of signal 9")
    with pytest.raises(EngineCrashedError) as caught:
        open_session(parts.plan(), parts.opening(engine), parts.Heard())
    assert engine.closed
    assert caught.value.__notes__ == ["engine: ggml: out of words"]


def test_bos_is_not_doubled() -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()))
    session = parts.chat(engine).session
    assert session.tokens("<s> a b") == (3, 1, 1)
    assert session.tokens("a b") == (1, 1, 1)


@pytest.mark.parametrize(("n_prompt", "refused"), [(509, False), (511, False), (512, True)])
def test_a_prompt_that_fills_n_ctx_is_refused_with_both_numbers(
    n_prompt: int, refused: bool
) -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()))
    session = parts.chat(engine).session
    if not refused:
        list(session.generate([5] * n_prompt, sampling=SamplingParams()))
        assert len(engine.requests[0].prompt) == n_prompt
        return
    with pytest.raises(ContextLengthError) as caught:
        session.generate([5] * n_prompt, sampling=SamplingParams())
    assert caught.value.numbers == {"n_prompt": n_prompt, "n_ctx": 512}
    assert engine.requests == []


def test_leaving_an_answer_early_cancels_it() -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()), ["one two three"])
    events = parts.chat(engine).session.generate([5], sampling=SamplingParams())
    first = next(events)
    assert engine.cancelled == []
    events.close()
    assert engine.cancelled == [first.request_id]


def test_cancel_reaches_the_answer_under_way_and_no_other() -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()), ["one two"])
    session = parts.chat(engine).session
    session.cancel()
    events = session.generate([5], sampling=SamplingParams())
    first = next(events)
    session.cancel()
    list(events)
    session.cancel()
    assert engine.cancelled == [first.request_id]


def test_a_failed_answer_is_an_error() -> None:
    class Failing(parts.ScriptedEngine):
        def done(self, request: GenerateRequest, n_generated: int) -> DoneEvent:
            event = super().done(request, n_generated)
            return replace(event, finish_reason="failed", error="CUDA error 700")

    failing = Failing(parts.report(parts.plan()), ["a b", "c"])
    session = parts.chat(failing).session
    with pytest.raises(EngineError, match="after 2 tokens: CUDA error 700"):
        list(session.generate([5], sampling=SamplingParams()))
    failing.failure = EngineCrashedError("the worker died of signal 11")
    with pytest.raises(EngineCrashedError, match="signal 11"):
        list(session.generate([5], sampling=SamplingParams()))
