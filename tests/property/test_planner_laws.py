"""The planner's laws, over small models, one to three GPUs and budgets from nothing to plenty."""

import json
from dataclasses import replace
from itertools import combinations

from hypothesis import assume, given
from hypothesis import strategies as st

from loadmaster.model.types import ModelSpec
from loadmaster.plan import memory
from loadmaster.plan.codec import plan_from_json, plan_to_json
from loadmaster.plan.fill import fill
from loadmaster.plan.parts import Piece
from loadmaster.plan.types import CPU, Budget, DoesNotFit, Knobs, Plan, Workload
from loadmaster.units import MIB, Bytes
from tests.toy import plan_toy, toy_budget, toy_machine, toy_model

models = st.builds(
    toy_model,
    n_layer=st.integers(1, 12),
    n_embd=st.sampled_from([256, 512]),
    n_ff=st.sampled_from([512, 768, 2048]),
    n_vocab=st.sampled_from([512, 4096]),
    n_expert=st.sampled_from([0, 0, 4]),
    ffn_types=st.sampled_from([("q4_K",), ("q4_K", "q6_K"), ("q8_0", "q4_K", "q4_K")]),
)
gpu_bytes = st.lists(st.integers(0, 48 * MIB), min_size=1, max_size=3)
workloads = st.builds(
    Workload, n_ctx=st.sampled_from([256, 512, 2048]), n_seq_max=st.sampled_from([1, 1, 4])
)


def _solve(model: ModelSpec, gpus: list[int], workload: Workload) -> Plan | DoesNotFit:
    return plan_toy(model, toy_machine(*gpus), workload=workload)


@given(models, gpu_bytes, st.integers(0, 64 * MIB), workloads)
def test_a_plan_keeps_every_cap(
    model: ModelSpec, gpus: list[int], ram: int, workload: Workload
) -> None:
    machine = toy_machine(*gpus, ram_bytes=ram)
    outcome = plan_toy(model, machine, workload=workload)
    if isinstance(outcome, Plan):
        for device in outcome.devices:
            assert device.planned_bytes == sum(item.bytes for item in device.items)
            assert device.planned_bytes <= device.budget_bytes == toy_budget(machine).cap(device.id)


@given(models, gpu_bytes, workloads)
def test_every_weight_is_placed_once(model: ModelSpec, gpus: list[int], workload: Workload) -> None:
    outcome = _solve(model, gpus, workload)
    assume(isinstance(outcome, Plan))
    assert isinstance(outcome, Plan)
    planned = sum(device.of("model") + device.mapped_bytes for device in outcome.devices)
    placed = memory.device_of_tensor(model, outcome.llamacpp)
    assert set(placed) == {tensor.name for tensor in model.tensors}
    padded = planned - model.weight_bytes
    assert 0 <= padded <= 128 * 8 * len(model.tensors)


@given(models, st.integers(0, 24 * MIB), st.integers(0, 8 * MIB), workloads)
def test_more_vram_is_never_slower(
    model: ModelSpec, vram: int, more: int, workload: Workload
) -> None:
    """Compared at the cost the search minimises; a step of the estimate is its only slack."""
    knobs = Knobs(type_k="f16", type_v="f16")
    less = plan_toy(model, toy_machine(vram), workload=workload, knobs=knobs)
    greater = plan_toy(model, toy_machine(vram + more), workload=workload, knobs=knobs)
    if isinstance(less, Plan):
        assert isinstance(greater, Plan)
        assert _gpu_weights(greater) >= 0.97 * _gpu_weights(less) - MIB / 4


def _gpu_weights(plan: Plan) -> int:
    return sum(device.of("model", "kv") for device in plan.devices if device.id != CPU)


@given(models, gpu_bytes, st.integers(0, 16 * MIB))
def test_a_shortfall_is_honest(model: ModelSpec, gpus: list[int], ram: int) -> None:
    machine = toy_machine(*gpus, ram_bytes=ram)
    knobs = Knobs(n_gpu_layers=model.n_layer + 1)
    refused = plan_toy(model, machine, knobs=knobs)
    assume(isinstance(refused, DoesNotFit))
    assert isinstance(refused, DoesNotFit)
    assert refused.shortfalls
    caps = dict(toy_budget(machine).caps)
    for shortfall in refused.shortfalls:
        assert shortfall.bytes > 0
        caps[shortfall.device] = Bytes(caps[shortfall.device] + shortfall.bytes)
    granted = Budget(caps=caps, origin={})
    again = plan_toy(model, machine, budget=granted, knobs=knobs)
    complaints = (
        {item.device: item.bytes for item in again.shortfalls}
        if isinstance(again, DoesNotFit)
        else {}
    )
    for shortfall in refused.shortfalls:
        assert shortfall.device not in complaints


@given(models, workloads, st.sampled_from(["n_ctx", "n_seq_max", "type"]))
def test_a_larger_workload_never_needs_less(
    model: ModelSpec, workload: Workload, grow: str
) -> None:
    assert workload.n_ctx is not None
    knobs = Knobs(n_gpu_layers=model.n_layer + 1, type_k="q8_0", type_v="q8_0")
    larger, wider = workload, knobs
    if grow == "n_ctx":
        larger = replace(workload, n_ctx=workload.n_ctx * 2)
    elif grow == "n_seq_max":
        larger = replace(workload, n_seq_max=workload.n_seq_max + 1)
    else:
        wider = replace(knobs, type_k="f16", type_v="f16")
    machine = toy_machine(1 << 34, ram_bytes=1 << 36)
    before = plan_toy(model, machine, workload=workload, knobs=knobs)
    after = plan_toy(model, machine, workload=larger, knobs=wider)
    assert isinstance(before, Plan)
    assert isinstance(after, Plan)
    for old in before.devices:
        assert after.device(old.id).planned_bytes >= old.planned_bytes


@given(models, gpu_bytes, workloads)
def test_equal_questions_get_equal_answers(
    model: ModelSpec, gpus: list[int], workload: Workload
) -> None:
    first, second = _solve(model, gpus, workload), _solve(model, gpus, workload)
    assert first == second
    if isinstance(first, Plan):
        text = json.dumps(plan_to_json(first))
        assert plan_from_json(json.loads(text)) == first


@given(models, st.integers(0, 16 * MIB))
def test_printed_hints_work(model: ModelSpec, vram: int) -> None:
    machine = toy_machine(vram)
    outcome = plan_toy(model, machine, alternatives=True, workload=Workload(n_ctx=1024))
    near = outcome.alternatives if isinstance(outcome, Plan) else outcome.nearest
    for alternative in near:
        knobs, workload = _apply(alternative.flags)
        again = plan_toy(model, machine, knobs=knobs, workload=workload)
        assert isinstance(again, Plan), alternative.flags
        for device, freed in alternative.frees_bytes.items():
            before = next(it for it in outcome.devices if it.id == device)
            kinds = before.of("kv", "recurrent", "compute")
            assert kinds - again.device(device).of("kv", "recurrent", "compute") >= freed


def _apply(flags: tuple[str, ...]) -> tuple[Knobs, Workload]:
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    kv = values.get("--kv")
    return Knobs(type_k=kv, type_v=kv), Workload(n_ctx=int(values.get("-c", "1024")))


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    sizes = draw(st.lists(st.integers(1, 700), min_size=1, max_size=3, unique=True))
    chosen = draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=10))
    return [
        Piece(name=f"p{i}", role="ffn_up", gpu_bytes=(s,), host_bytes=s, read_bytes=s)
        for i, s in enumerate(chosen)
    ]


@given(pieces(), st.integers(0, 5000))
def test_filling_is_as_full_as_brute_force(candidates: list[Piece], room: int) -> None:
    taken = sum(piece.gpu_bytes[0] for piece in fill(candidates, room, 0))
    best = max(
        total
        for n in range(len(candidates) + 1)
        for some in combinations(candidates, n)
        if (total := sum(piece.gpu_bytes[0] for piece in some)) <= room
    )
    assert taken == best


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 200_000))
def test_filling_many_pieces_leaves_little(n_small: int, n_large: int, room: int) -> None:
    """Beyond brute force: what is left is under the smallest piece that was not taken."""
    candidates = [
        Piece(
            name=f"{size}-{i}", role="ffn_up", gpu_bytes=(size,), host_bytes=size, read_bytes=size
        )
        for size, n in ((997, n_small), (2003, n_large))
        for i in range(n)
    ]
    taken = fill(candidates, room, 0)
    left = room - sum(piece.gpu_bytes[0] for piece in taken)
    assert left >= 0
    assert len(taken) == len(candidates) or left < 997
