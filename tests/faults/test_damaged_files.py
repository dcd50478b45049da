"""Every hand-made damaged file is refused with its own code, in words a person can act on."""

import time
from pathlib import Path

import pytest

from benchmarks.damaged_corpus import CASES, Case
from loadmaster.errors import LoadmasterError
from loadmaster.model.source import read_model


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.name}")
def test_each_damage_is_refused_by_its_name(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    started = time.process_time()
    error = _refusal(path)
    assert time.process_time() - started < 2
    assert (error.code if error else None) == case.code
    if error is not None:
        assert error.exit_code in (4, 65)
        assert error.message.isprintable()
        assert error.hint
        assert len(error.message) < 2500


def _refusal(path: Path) -> LoadmasterError | None:
    try:
        read_model(path)
    except LoadmasterError as error:
        return error
    return None


def test_the_corpus_is_wide_enough() -> None:
    groups = {case.group for case in CASES}
    assert groups >= {"header", "key-values", "tensor table", "architecture", "tokenizer", "files"}
    assert sum(case.code is not None for case in CASES) >= 60
