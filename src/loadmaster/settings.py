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
URL = Variable(
    name="LOADMASTER_URL",
    meaning="address of the server that `ps`, `stop` and `launch` talk of",
)
HF_TOKEN = Variable(
    name="HF_TOKEN", meaning="token for the Hub; it is sent to `HF_ENDPOINT` and nowhere else"
)
HF_TOKEN_PATH = Variable(
    name="HF_TOKEN_PATH", meaning="file with the token, in place of the one of `hf auth login`"
)
HF_ENDPOINT = Variable(
    name="HF_ENDPOINT", meaning="address of the Hub or of a mirror, default https://huggingface.co"
)
HF_HOME = Variable(
    name="HF_HOME", meaning="folder of the Hub's client, default `~/.cache/huggingface`"
)
HF_HUB_CACHE = Variable(
    name="HF_HUB_CACHE", meaning="folder of models from the Hub, default `hub` in `HF_HOME`"
)
HF_HUB_OFFLINE = Variable(
    name="HF_HUB_OFFLINE", meaning="1: only models that are on this machine, no network"
)
OLLAMA_MODELS = Variable(
    name="OLLAMA_MODELS", meaning="folder of Ollama's models, default `~/.ollama/models`"
)
XDG_CACHE_HOME = Variable(name="XDG_CACHE_HOME", meaning="in place of `~/.cache`")
VARIABLES = (
    HOME, ENGINE, URL, HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
    OLLAMA_MODELS, XDG_CACHE_HOME,
)  # fmt: skip


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
