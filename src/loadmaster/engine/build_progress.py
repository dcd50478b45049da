"""What a build tells while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Step = Literal["fetch", "unpack", "configure", "compile", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """A step of a build; `done` of `total` pieces of it are finished."""

    step: Step
    done: int
    total: int


Report = Callable[[BuildProgress], None]


def ignore(progress: BuildProgress) -> None:
    """Report nothing."""
