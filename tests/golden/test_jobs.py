"""Plans of a few jobs, kept as a file: a change of a rule shows as a change of its plans."""

import json

import pytest

from loadmaster.plan.types import Quantize
from tests.golden.jobs import CELLS, HF_CELLS, NIGHT, PLANS, hf_summary, summary

KEPT = json.loads(PLANS.read_text())


@pytest.mark.parametrize("cell", CELLS, ids=" · ".join)
def test_plans_of_jobs_are_as_kept(cell: tuple[str, str, str]) -> None:
    assert summary(*cell) == KEPT[" · ".join(cell)]


@pytest.mark.parametrize("cell", HF_CELLS, ids=" · ".join)
def test_plans_of_jobs_on_checkpoints_are_as_kept(cell: tuple[str, str, Quantize, str]) -> None:
    assert hf_summary(*cell) == KEPT[" · ".join(cell)]


def test_a_night_on_24_gb_is_worth_many_at_once() -> None:
    kept = KEPT[f"rtx4090-24g · shape:llama-3-70b@Q4_K_M · {NIGHT}"]
    assert kept["speedup"] > 15
    assert kept["sequences"] >= 128
    assert "kv" not in kept["bytes"]["cpu"], "the cache has VRAM first"
