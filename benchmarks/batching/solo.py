"""How far below the best every token was that a batch chose: fed again alone, by `forced.py`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadmaster.engine.types import EngineBuild


def token_gaps(
    build: EngineBuild, model: Path, n_ctx: int, requests: Sequence[Mapping[str, Any]]
) -> list[list[float]]:
    """A list for each of `requests`, which have a `prompt` and an `output`, both tokens."""
    environment = {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": str(build.lib_dir),
        "PYTHONPATH": str(build.python_dir),
    }
    forced = Path(__file__).with_name("forced.py")
    found = subprocess.run(
        [sys.executable, str(forced), str(model), str(n_ctx), "1"],
        input=json.dumps(requests), env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    gaps: list[list[float]] = json.loads(found.stdout.splitlines()[-1])
    return gaps
