"""A vocabulary without its weights gives the tokens that the open model gives."""

from pathlib import Path

import pytest

from loadmaster.engine.process import Engine
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import EngineRefusedError
from tests.engine_parts import load_request, settings

pytestmark = pytest.mark.engine

TEXTS = [("Once upon a time, <|im_start|>user", True), ("", False), ("früh 漢字", False)]


@pytest.mark.parametrize("backend", ["llamacpp", "fake"])
def test_tokens_are_those_of_the_open_model(
    backend: str, engine_build: EngineBuild, demo_model: Path
) -> None:
    with Engine.start(engine_build, backend=backend) as engine:
        vocabulary = engine.open_vocabulary(demo_model)
        before = engine.tokenize_many(TEXTS, parse_special=True)
        loaded = engine.load(load_request(demo_model, settings()))
        assert engine.tokenize_many(TEXTS, parse_special=True) == before
        assert vocabulary.n_vocab == loaded.n_vocab
        assert vocabulary.bos_text == loaded.bos_text
        assert vocabulary.eos_text == loaded.eos_text


def test_a_file_that_is_no_model_is_refused(engine_build: EngineBuild, tmp_path: Path) -> None:
    file = tmp_path / "no.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    with (
        Engine.start(engine_build) as engine,
        pytest.raises(EngineRefusedError, match="vocabulary"),
    ):
        engine.open_vocabulary(file)
