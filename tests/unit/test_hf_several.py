"""Plans over several GPUs: balance, who waits, links, and the server for who outgrows them."""

from dataclasses import replace

import pytest

from loadmaster.interfaces.cli import render
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_vllm import server_note, tensor_parallel
from loadmaster.plan.types import DoesNotFit, Plan, Quantize, Workload
from loadmaster.tasks.planning import PlanRefusedError, require_plan
from tests import checkpoint_parts as parts

NAME = "meta-llama/Llama-3.1-405B-Instruct"


@pytest.fixture(scope="module")
def large() -> CheckpointSpec:
    return parts.shape("llama-3.1-405b")


def planned(
    model: CheckpointSpec,
    machine: Machine | str,
    quantize: Quantize = "nf4",
    *,
    vram: str | None = None,
    n_gpu_layers: int | None = None,
    kv: tuple[str | None, str | None] = (None, None),
) -> Plan:
    return parts.fitting(
        model, machine, vram=vram, quantize=quantize, n_gpu_layers=n_gpu_layers,
        workload=Workload(n_ctx=4096), alternatives=False, type_k=kv[0], type_v=kv[1],
    )  # fmt: skip


def noted(plan: Plan, model: CheckpointSpec, machine: str, vram: str | None = None) -> str:
    found = load_profile(machine)
    note = server_note(NAME, model, found, plan, make_budget(found, vram, None))
    assert note is not None
    return note


@pytest.mark.parametrize("machine", ["a100-80g-x4", "h100-80g-x8"])
def test_405b_in_nf4_takes_three_of_80_gb_evenly(large: CheckpointSpec, machine: str) -> None:
    plan = planned(large, machine)
    stages = plan.predicted.stages
    assert [stage.device for stage in stages] == ["gpu:0", "gpu:1", "gpu:2"]
    assert sum(stage.n_layers for stage in stages) == 126
    assert max(s.decode_s for s in stages) < 1.1 * min(s.decode_s for s in stages)
    assert plan.predicted.decode_tok_s is not None
    whole = sum(stage.decode_s for stage in stages)
    assert whole == pytest.approx(1 / plan.predicted.decode_tok_s, rel=0.01)
    notes = "\n".join(plan.notes)
    assert "2 of 3 wait at any moment (a pipeline bubble of 67 %)" in notes
    assert "filled evenly: 90 to 91 % of their budgets" in notes
    assert "32.00 KiB pass for a token" in notes
    assert "so no link bounds it" in notes


def test_a_share_of_the_cpu_is_bound_by_its_link(large: CheckpointSpec) -> None:
    plan = planned(large, "rtx4090-x8", n_gpu_layers=98)
    assert plan.predicted.bound_by == "link"
    assert any("and bounds it" in note for note in plan.notes)
    assert any("28 layers stay on the CPU (unquantized, 166.25 GiB)" in note for note in plan.notes)
    note = noted(plan, large, "rtx4090-x8")
    assert "no way out: 200.80 GiB of weights are too much for the 184.29 GiB" in note
    assert "vllm serve" not in note


def test_whose_turn_takes_how_long_is_shown(large: CheckpointSpec) -> None:
    text = render.plan_text(planned(large, "a100-80g-x4"))
    block = text.split("one GPU after another\n")[1].split("\n\n")[0]
    assert [line.split()[:3] for line in block.splitlines()] == [
        ["gpu:0", "41", "layers"],
        ["gpu:1", "44", "layers"],
        ["gpu:2", "41", "layers"],
    ]
    assert "91 % of its budget" in block


def test_layers_of_the_cpu_are_told_from_those_that_a_gpu_holds(large: CheckpointSpec) -> None:
    text = render.plan_text(planned(large, "rtx4090-x8", n_gpu_layers=98))
    assert "gpu:0  10 layers and 28 of the CPU   98 % of its budget" in text
    assert "-ngl 98 -ts 10,13,13,13,13,13,13,10" in text


def test_what_ram_does_not_hold_is_not_left_on_the_disk(large: CheckpointSpec) -> None:
    outcome = parts.plan(large, "rtx4090-x8", n_gpu_layers=20, workload=Workload(n_ctx=4096))
    assert isinstance(outcome, DoesNotFit)
    assert [short.device for short in outcome.shortfalls] == ["cpu"]
    with pytest.raises(PlanRefusedError) as refused:
        require_plan(outcome)
    assert "nothing is left on the disk" in str(refused.value.hint)


def test_one_gpu_has_no_stages_and_no_server(large: CheckpointSpec) -> None:
    model, machine = parts.shape(), load_profile("rtx3060-12g")
    plan = planned(model, machine)
    assert plan.predicted.stages == ()
    assert not any("one after another" in note for note in plan.notes)
    assert server_note(NAME, model, machine, plan, make_budget(machine, None, None)) is None


def test_unequal_gpus_are_filled_by_speed_and_say_so() -> None:
    machine = load_profile("rtx3090-x2")
    fast = replace(machine.gpus[1], bandwidth_bytes_s=2 * (machine.gpus[0].bandwidth_bytes_s or 1))
    plan = planned(parts.shape("llama-3-70b"), replace(machine, gpus=(machine.gpus[0], fast)))
    assert any("faster are filled first" in note for note in plan.notes)
    text = render.settings_text(plan)
    assert "-ts" not in text, "it begins at gpu:0, and this plan at gpu:1"
    assert "-ts 40,40" in render.settings_text(planned(parts.shape("llama-3-70b"), machine))


def test_the_command_has_the_budget_the_context_and_the_quantization(
    large: CheckpointSpec,
) -> None:
    plan = planned(large, "a100-80g-x4")
    note = noted(plan, large, "a100-80g-x4")
    share = min(d.budget_bytes / 85899345920 for d in plan.devices if d.id != "cpu")
    assert note.endswith(
        f"`vllm serve {NAME} --tensor-parallel-size 4 --gpu-memory-utilization "
        f"{int(share * 100) / 100:.2f} --max-model-len 4096 --quantization bitsandbytes "
        "--kv-cache-dtype auto`"
    )
    assert "252 sums of 32.00 KiB" in note


def test_the_smallest_budget_counts_also_of_a_gpu_that_the_plan_leaves_free() -> None:
    model, vram = parts.shape("llama-3-70b"), "0=70GiB,1=70GiB,2=60GiB,3=50GiB"
    plan = planned(model, "a100-80g-x4", vram=vram)
    assert sum(device.id != "cpu" for device in plan.devices) == 1
    note = noted(plan, model, "a100-80g-x4", vram)
    assert "--tensor-parallel-size 4 --gpu-memory-utilization 0.62" in note


def test_gpus_without_a_budget_are_hidden_from_the_server() -> None:
    model, vram = parts.shape("llama-3-70b"), "1=70GiB,3=70GiB"
    plan = planned(model, "a100-80g-x4", "none", vram=f"{vram},0=0GiB,2=0GiB")
    note = noted(plan, model, "a100-80g-x4", f"{vram},0=0GiB,2=0GiB")
    assert "`CUDA_VISIBLE_DEVICES=1,3 vllm serve" in note
    assert "--tensor-parallel-size 2" in note
    assert "--quantization" not in note


def test_groups_in_a_row_where_heads_do_not_divide() -> None:
    machine = load_profile("h100-80g-x8")
    three = replace(machine, gpus=machine.gpus[:3])
    model = parts.shape("llama-3-70b")
    assert tensor_parallel(model, 3) == [2, 1]
    plan = planned(model, three, "none")
    note = server_note(NAME, model, three, plan, make_budget(three, None, None))
    assert note is not None
    assert "--tensor-parallel-size 2" in note or "--pipeline-parallel-size 3" in note


def test_eight_bits_become_fp8_where_the_hardware_has_it() -> None:
    model = parts.shape("llama-3-70b")
    on_hopper = noted(planned(model, "h100-80g-x8", "int8"), model, "h100-80g-x8")
    assert on_hopper.endswith("--quantization fp8 --kv-cache-dtype auto`"), "cells as planned"
    on_ampere = noted(planned(model, "a100-80g-x4", "int8"), model, "a100-80g-x4")
    assert on_ampere.endswith("--max-model-len 4096 --kv-cache-dtype auto`"), "BF16 fits there"
    on_two = noted(planned(model, "rtx3090-x2", "nf4"), model, "rtx3090-x2")
    assert "--quantization bitsandbytes" in on_two


@pytest.mark.parametrize(
    ("machine", "kv", "flag", "said"),
    [
        ("h100-80g-x8", ("q8_0", "q8_0"), "int8_per_token_head", "before 0.25.1 has `fp8`"),
        ("a100-80g-x4", ("q8_0", "q8_0"), "int8_per_token_head", "on these GPUs: `auto`"),
        ("h100-80g-x8", ("q4_0", "q4_0"), "int4_per_token_head", "where q4_0 has one for each 32"),
        ("h100-80g-x8", ("q8_0", "q4_0"), "int8_per_token_head", "both are as wide as q8_0"),
        ("a100-80g-x4", ("bf16", "q8_0"), "auto", "both are as wide as bf16"),
    ],
)
def test_small_cells_get_the_nearest_of_the_server_and_what_differs(
    large: CheckpointSpec, machine: str, kv: tuple[str, str], flag: str, said: str
) -> None:
    note = noted(planned(large, machine, kv=kv), large, machine)
    assert f"--kv-cache-dtype {flag}`; " in note
    assert said in note
