"""What is asked of the transformers engine: splits by layer, kernels that GPUs lack, and hints that
work when they are typed."""

from dataclasses import replace
from typing import Any

import pytest

from loadmaster.errors import UsageError
from loadmaster.interfaces.cli.render_hf import layers_text, settings_flags
from loadmaster.machine.profiles import load_profile
from loadmaster.model.checkpoint import Stored
from loadmaster.plan.types import DoesNotFit, Plan, TransformersSettings
from tests import checkpoint_parts as parts


def engine(plan: Plan) -> TransformersSettings:
    assert isinstance(plan.engine, TransformersSettings)
    return plan.engine


@pytest.mark.parametrize(
    ("split", "n_gpu_layers", "hint"),
    [
        ((1, 1), None, "add `-ngl 2` to keep 30 on the CPU"),  # llama.cpp's halves
        ((16, 17), None, "let their sum be 32"),
        ((8, 8, 16), None, "as many numbers as there are GPUs"),
        ((16, 16), 20, "that of `-ngl`: 20"),
    ],
)
def test_layers_that_a_split_leaves_out_are_not_the_cpus_unasked(
    split: tuple[int, ...], n_gpu_layers: int | None, hint: str
) -> None:
    given: dict[str, Any] = {
        "layers_per_device": split, "n_gpu_layers": n_gpu_layers, "quantize": "nf4",
    }  # fmt: skip
    with pytest.raises(UsageError, match="`-ts ") as caught:
        parts.plan(parts.shape(), "rtx3090-x2", **given)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("given", [((16, 16), None), ((10, 12), 22), ((20, 12), 99)])
def test_a_split_that_names_every_layer_is_kept(given: tuple[tuple[int, ...], int | None]) -> None:
    split, n_gpu_layers = given
    plan = parts.fitting(
        parts.shape(), "rtx3090-x2", layers_per_device=split, n_gpu_layers=n_gpu_layers,
        quantize="nf4",
    )  # fmt: skip
    devices = [device for name, device in engine(plan).device_map if ".layers." in name]
    assert (devices.count("gpu:0"), devices.count("gpu:1")) == split
    assert f"-ts {split[0]},{split[1]}" in " ".join(settings_flags(engine(plan)))


def test_a_single_layer_is_no_range() -> None:
    plan = parts.fitting(parts.shape(), "rtx3090", n_gpu_layers=1, quantize="nf4")
    assert layers_text(engine(plan), 32) == "layers 0-30 on cpu, 31 on gpu:0"


def test_flags_lead_back_to_the_cpu() -> None:
    plan = parts.fitting(parts.shape(), "rtx3090", n_gpu_layers=0, quantize="nf4")
    assert "-ngl 0" in settings_flags(engine(plan))
    assert "-ngl 0" not in settings_flags(engine(parts.fitting(parts.shape(), quantize="nf4")))


def test_layers_that_keep_their_bits_on_the_cpu_are_not_called_unquantized() -> None:
    said = {
        quantize: next(
            note
            for note in parts.fitting(
                parts.shape(), "rtx3090", n_gpu_layers=20, quantize=quantize
            ).notes
            if "stay on the CPU" in note
        )
        for quantize in ("nf4", "fp8")
    }
    assert "(unquantized, " in said["nf4"]
    assert "unquantized" not in said["fp8"]
    stored = replace(parts.shape(), stored=Stored(method="fbgemm-fp8", label="FP8"))
    notes = parts.fitting(stored, "rtx3090", n_gpu_layers=20).notes
    assert not any("(unquantized" in note for note in notes)


@pytest.mark.parametrize("quantize", ["nf4", "int8", None])
def test_bitsandbytes_has_no_kernels_for_old_gpus(quantize: Any) -> None:
    machine = load_profile("rtx3090-x2")
    old = replace(machine.gpus[1], compute_capability=(5, 2))
    machine = replace(machine, gpus=(machine.gpus[0], old))
    nf4 = Stored(method="bnb4", label="NF4")
    model = replace(parts.shape(), stored=None if quantize else nf4)
    with pytest.raises(
        UsageError, match=r"needs compute capability 6\.0.*\(gpu:1\) has 5\.2"
    ) as no:
        parts.plan(model, machine, quantize=quantize)
    assert "; `--vram 0=100%` leaves it out" in (no.value.hint or "")
    parts.fitting(model, machine, quantize=quantize, vram="0=100%")
    parts.fitting(model, machine, quantize=quantize, n_gpu_layers=0)


def test_hints_for_old_gpus_work_there() -> None:
    machine = load_profile("rtx3060-12g")
    old = replace(machine, gpus=(replace(machine.gpus[0], compute_capability=(5, 2)),))
    for found, proposes in ((machine, True), (old, False)):
        outcome = parts.plan(parts.shape(), found)
        assert isinstance(outcome, DoesNotFit)
        proposed = {flag for one in outcome.nearest for flag in one.flags}
        assert ("--quantize" in proposed) is proposes


def test_experts_that_stay_large_have_a_smaller_format() -> None:
    mixtral = parts.shape("mixtral-8x7b")
    outcome = parts.plan(mixtral, "a100-80g", quantize="nf4", vram="60GiB")
    assert isinstance(outcome, DoesNotFit)
    assert outcome.nearest[0].flags == ("--quantize", "fp8")
    parts.fitting(mixtral, "a100-80g", quantize="fp8", vram="60GiB")
