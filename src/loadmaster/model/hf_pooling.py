"""How a checkpoint's vectors are made: what sentence-transformers wrote beside the weights.

`modules.json` lists what a text goes through after the model; `1_Pooling/config.json` says how its
tokens' vectors become one. A folder without them is of a model that writes text, if its weights
have an output.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster.errors import DamagedFileError
from loadmaster.model.damage import refused
from loadmaster.model.types import Pooling

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
MAX_POOLING_BYTES = 1 << 16
UNNAMED: Pooling = "mean"  # of a model that makes vectors alone and does not say how
_MODES: tuple[tuple[str, Pooling], ...] = (
    ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_lasttoken", "last"),
    ("pooling_mode_cls_token", "cls"),
)
_NAMES: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What is known of a checkpoint's vectors."""

    pooling: Pooling | None = None
    dense: bool = False  # they go through a matrix of their own


TEXT = Vectors()


def read_pooling(folder: Path) -> Vectors:
    """What a folder says.

    Raises:
        DamagedFileError: it pools in a way that is not known.
    """
    config = _read(folder / POOLING)
    if not isinstance(config, dict):
        return TEXT
    modules = _read(folder / MODULES)
    rows = modules if isinstance(modules, list) else []
    kinds = [str(row.get("type", "")) for row in rows if isinstance(row, dict)]
    dense = any(kind.rpartition(".")[2] == "Dense" for kind in kinds)
    return Vectors(pooling=pooling_of(config), dense=dense)


def pooling_of(config: dict[str, Any]) -> Pooling:
    """The one way of pooling that a config names.

    Raises:
        DamagedFileError: it names another one, or several.
    """
    named = config.get("pooling_mode")
    found = [pooling for key, pooling in _MODES if config.get(key) is True]
    if isinstance(named, str):
        found = [_NAMES[named]] if named in _NAMES else []
    others = [
        key
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True and key not in dict(_MODES)
    ]
    if len(found) != 1 or others:
        raise _unknown(others[0] if others else str(named))
    return found[0]


def _unknown(what: str) -> DamagedFileError:
    return refused(
        "unknown_pooling",
        f"{POOLING} pools in a way that is not known: {what[:40]!r}",
        hint="mean, last and first token are known; take a GGUF of the model",
    )


def _read(path: Path) -> Any:
    """A JSON value; None where there is none that can be read."""
    try:
        if path.stat().st_size > MAX_POOLING_BYTES:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
