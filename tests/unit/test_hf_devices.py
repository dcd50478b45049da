"""What of a checkpoint's plan depends on the cards: where the CPU's layers are computed and what
that takes, types that older ones lack, and a torch that drives none of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.engine.types import EngineBuild
from loadmaster.errors import UsageError
from loadmaster.machine.profiles import load_profile
from loadmaster.plan.hf_ledger import streaming_gpu
from loadmaster.plan.types import Quantize, Workload
from loadmaster.tasks import checkpoints, planner
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanOptions
from tests import checkpoint_parts as parts

MATRIX = 2 * 4096 * 14336  # in BF16, as bitsandbytes leaves those of the CPU


def compute_bytes(n_gpu_layers: int, quantize: Quantize = "none", name: str = "llama-3-8b") -> int:
    plan = parts.plan(
        parts.shape(name), "a100-80g", quantize=quantize, n_gpu_layers=n_gpu_layers,
        workload=Workload(n_ctx=512), n_ubatch=64,
    )  # fmt: skip
    return plan.devices[0].of("compute")


def test_a_gpu_has_room_for_the_matrix_that_the_cpu_sends_it() -> None:
    assert compute_bytes(20) - compute_bytes(32) == MATRIX
    assert compute_bytes(20, "int8") > compute_bytes(32, "int8")
    # One of its own in four bits is written out as large, and not at the same time.
    assert compute_bytes(20, "nf4") == compute_bytes(32, "nf4") > MATRIX


def test_experts_are_sent_by_the_layer() -> None:
    sent = compute_bytes(24, name="mixtral-8x7b") - compute_bytes(32, name="mixtral-8x7b")
    assert sent == 8 * 3 * MATRIX


def test_one_gpu_computes_for_the_cpu() -> None:
    layers = (("model.layers.0", "cpu"), ("model.layers.1", "gpu:1"), ("model.layers.2", "gpu:0"))
    assert streaming_gpu(replace(parts.SETTINGS, device_map=layers)) == "gpu:0"
    assert streaming_gpu(parts.SETTINGS) is None
    plan = parts.fitting(parts.shape(), "rtx3090-x2", n_gpu_layers=24, vram="12GiB")
    first, second, _ = plan.devices
    assert first.of("compute") - second.of("compute") == MATRIX


@pytest.mark.parametrize(("machine", "copies"), [("a100-80g", 2), ("cpu-64g", 1)])
def test_a_mask_is_there_as_bits_and_as_numbers(machine: str, copies: int) -> None:
    """Of long prompts it is the largest thing in attention; CUDA's kernels read a copy of it."""
    model, n_ctx, n_ubatch = parts.shape("llama-3.2-1b"), 65536, 256
    short, long = (
        parts.plan(model, machine, n_ubatch=n_ubatch, workload=Workload(n_ctx=n))
        for n in (n_ctx, 2 * n_ctx)
    )
    grown = long.devices[0].of("compute") - short.devices[0].of("compute")
    assert grown == n_ubatch * n_ctx * (1 + 2 * copies)


def test_a_plan_says_that_bf16_became_f16() -> None:
    card = load_profile("rtx4090-24g")
    old = replace(card, gpus=(replace(card.gpus[0], compute_capability=(7, 5)),))
    for machine, said in ((card, False), (old, True)):
        notes = parts.fitting(parts.shape(), machine, quantize="nf4").notes
        assert any("computed in F16" in note for note in notes) is said


# -- a torch without the GPU's libraries

BUILD = EngineBuild(
    id="transformers-5", target="cpu", version="torch 2.13.0+cpu, more", root=Path("/nonexistent")
)


def test_a_torch_without_cuda_is_told_of_where_a_card_is() -> None:
    card = load_profile("rtx4090-24g")
    said = checkpoints.undriven(card, BUILD) or ""
    assert "torch 2.13.0+cpu is built without CUDA" in said
    assert "pip install --force-reinstall torch" in said
    assert checkpoints.undriven(card, replace(BUILD, target="cuda")) is None
    assert checkpoints.undriven(load_profile("cpu-64g"), BUILD) is None


def test_a_plan_and_a_budget_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = load_profile("rtx4090-24g")
    monkeypatch.setattr(planner, "machine_beside", lambda _: card)
    monkeypatch.setattr(planner, "find_engine", lambda _: BUILD)
    folder = str(parts.write_checkpoint(tmp_path))
    plan = Planner(folder, PlanOptions()).plan()
    assert any("built without CUDA" in note for note in getattr(plan, "notes", ()))
    with pytest.raises(UsageError, match="there is no GPU here") as refusal:
        Planner(folder, PlanOptions(vram="8GiB"))
    assert "built without CUDA" in (refusal.value.hint or "")
