"""The values of serving: what a server offers, what it was told, and what happened to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loadmaster.tasks.planning import PlanOptions
from loadmaster.units import Bytes

_FOR_GOOD_S = 10 * 365 * 86_400.0  # a time beyond this is none: a model stays

ModelState = Literal["unloaded", "loading", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that may be asked for: the id that clients send, and what `run` would be given."""

    id: str
    model: str
    embeds: bool = False  # to be opened for vectors, even where its header names no pooling
    n_ctx: int | None = None  # tokens of one request of this model; None: as `--ctx` says


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the user said about serving; placement is in `plan`."""

    plan: PlanOptions
    n_parallel: int = 4  # sequences of one model at a time
    queue_cap: int = 64  # requests of one model that wait
    keep_alive_s: float = 300.0  # infinite: a model stays until another needs its memory
    drain_s: float = 30.0  # how long requests may go on once the server is to end
    job_patience_s: float = 300.0  # a job may take the place of what nobody used for so long
    probe_s: float = 30.0  # an idle model decodes a token after so long without; 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEvent:
    """Something that happened to a model."""

    id: int
    time_s: float  # seconds since 1970
    kind: str  # `loading`, `ready`, `unloaded`, `evicted`, `crashed`, `refused`, `failed`, `note`
    model: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model as `ps` shows it."""

    id: str
    state: ModelState
    n_ctx: int | None  # tokens of one sequence
    n_parallel: int | None
    n_running: int
    n_waiting: int
    planned_bytes: Mapping[str, Bytes]  # per device
    idle_s: float | None  # None while requests run
    expires_s: float | None  # seconds until it is unloaded; None: not by itself
    reason: str | None = None  # why it failed
    n_items: int = 0  # requests of a job that are with the worker


def parse_keep_alive(text: str) -> float:
    """`5m`, `90s`, `1h`, `0`, `-1` (for good), or seconds.

    Raises:
        ValueError: it is none of these.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    seconds = float(number) * unit
    if math.isnan(seconds):
        raise ValueError(text)
    return math.inf if seconds < 0 or seconds > _FOR_GOOD_S else seconds
