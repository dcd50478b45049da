"""Rows that blocks of 64 do not divide: the library restores them wrongly on the CPU."""

from dataclasses import replace

import pytest

from loadmaster.errors import UsageError
from loadmaster.model.checkpoint import CheckpointSpec, Stored
from loadmaster.plan.types import DoesNotFit, Quantize
from tests import checkpoint_parts as parts


def with_rows_of(width: int) -> CheckpointSpec:
    """Llama 3 8B with one matrix of another width."""
    model = parts.shape()
    tensors = list(model.tensors)
    at = next(i for i, tensor in enumerate(tensors) if tensor.role == "linear")
    tensors[at] = replace(tensors[at], shape=(4096, width))
    return replace(model, tensors=tuple(tensors))


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_four_bits_of_them_are_refused_on_the_cpu(quantize: Quantize) -> None:
    with pytest.raises(UsageError, match="rows of 80 weights") as caught:
        parts.plan(with_rows_of(80), "cpu-64g", quantize=quantize)
    assert "--quantize int8" in (caught.value.hint or "")
    parts.fitting(with_rows_of(128), "cpu-64g", quantize=quantize)


def test_eight_bits_and_gpus_are_not() -> None:
    parts.fitting(with_rows_of(80), "cpu-64g", quantize="int8")
    parts.fitting(with_rows_of(80), "rtx3060-12g", quantize="nf4")


def test_a_checkpoint_that_comes_so_is_judged_by_its_config() -> None:
    stored = Stored(method="bnb4", label="NF4", double_quant=True)
    model = replace(parts.shape(), stored=stored, n_ff=14320)
    with pytest.raises(UsageError, match="rows of 14320"):
        parts.plan(model, "cpu-64g")


def test_no_gpu_layer_means_the_cpu() -> None:
    with pytest.raises(UsageError, match="rows of 80"):
        parts.plan(with_rows_of(80), "rtx3060-12g", quantize="nf4", n_gpu_layers=0)


def test_nobody_is_advised_to_take_them() -> None:
    outcome = parts.plan(with_rows_of(80), "cpu-64g", ram="10GiB")
    assert isinstance(outcome, DoesNotFit)
    advised = [near.flags for near in outcome.nearest]
    assert ("--quantize", "int8") in advised
    assert ("--quantize", "nf4") not in advised
