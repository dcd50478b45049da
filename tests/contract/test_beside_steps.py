"""What a worker answers while a step runs, and how its texts travel."""

from pathlib import Path

import pytest

from loadmaster.engine.process import Engine
from loadmaster.engine.types import DoneEvent, EngineBuild
from tests.engine_parts import load_request, request

pytestmark = pytest.mark.engine


def test_a_text_becomes_tokens_while_a_step_runs(
    engine_build: EngineBuild, demo_model: Path
) -> None:
    """Its request would come a step late otherwise, and the one after it two steps."""
    options = {"step_s": {"at_step": 1, "seconds": 600.0}}
    with Engine.start(engine_build, backend="fake", options=options) as engine:
        engine.load(load_request(demo_model))
        events = engine.generate(request("long", engine.tokenize("a long step")))
        assert engine.tokenize("and") == list(b"and")
        assert engine.tokenize_many([("a", False), ("b", True)]) == [[97], [98]]
        engine.cancel("long")
        assert [type(event) for event in events] == [DoneEvent]
