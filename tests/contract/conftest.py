"""Models that many tests open, each written once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hf_parts import write_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with a random model of a family, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder
