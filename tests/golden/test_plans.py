"""Plans of a fixed grid, kept as a file: a change of a rule shows as a change of its plans."""

import json

import pytest

from loadmaster.model.types import ModelSpec
from tests.golden.grid import MACHINES, MODELS, PLANS, models, questions, summary

KEPT = json.loads(PLANS.read_text())


@pytest.fixture(scope="module")
def specs() -> dict[str, ModelSpec]:
    return models()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_plans_are_as_kept(machine: str, name: str, specs: dict[str, ModelSpec]) -> None:
    for question in questions(machine):
        assert summary(specs[name], machine, question) == KEPT[f"{machine} · {name} · {question}"]


def test_the_kept_file_has_every_cell_and_no_other() -> None:
    wanted = {f"{m} · {n} · {q}" for m in MACHINES for n in MODELS for q in questions(m)}
    assert set(KEPT) == wanted
