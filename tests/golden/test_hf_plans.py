"""Plans of checkpoints over a fixed grid, kept as a file: a change of a rule shows in them."""

import json

import pytest

from tests.checkpoint_parts import shape
from tests.golden.hf_grid import MACHINES, MODELS, PLANS, QUANTIZE, cells, summary

KEPT = json.loads(PLANS.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_as_kept(name: str) -> None:
    model = shape(name)
    for machine in MACHINES:
        for quantize in QUANTIZE:
            assert summary(model, machine, quantize) == KEPT[f"{machine} · {name} · {quantize}"]


def test_the_kept_file_has_every_cell_and_no_other() -> None:
    assert set(KEPT) == {f"{m} · {n} · {q}" for m, n, q in cells()}
