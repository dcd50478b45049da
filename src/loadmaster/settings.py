"""The environment variables loadmaster reads, and the folders that they move."""

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """An environment variable and what it does; an empty value counts as unset."""

    name: str
    meaning: str

    @property
    def value(self) -> str | None:
        return os.environ.get(self.name) or None


HOME = Variable(
    name="LOADMASTER_HOME",
    meaning="one folder for engines, models and caches, in place of the user's own folders",
)
ENGINE = Variable(
    name="LOADMASTER_ENGINE",
    meaning="id of the engine build to use, in place of the one set by `loadmaster engine use`",
)
VARIABLES = (HOME, ENGINE)


def data_folder() -> Path:
    """Where engines and calibrations are kept; it may not exist yet."""
    if HOME.value:
        return Path(HOME.value)
    return platformdirs.user_data_path("loadmaster", appauthor=False)


def cache_folder() -> Path:
    """Where downloads and compilations are kept; everything in it can be made again."""
    if HOME.value:
        return Path(HOME.value) / "cache"
    return platformdirs.user_cache_path("loadmaster", appauthor=False)


def state_folder() -> Path:
    """Where a person's own traces are kept: the history of the chat."""
    if HOME.value:
        return Path(HOME.value) / "state"
    return platformdirs.user_state_path("loadmaster", appauthor=False)
