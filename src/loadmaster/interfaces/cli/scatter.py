"""Decode rate against KL divergence, as a plot in characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

WIDTH, HEIGHT = 60, 12
# The lowest KL divergence that is drawn apart: exact weights have 0, which has no logarithm.
FLOOR_KL = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One candidate in the plot."""

    letter: str
    label: str
    speed: float | None
    kl: float | None
    beaten: bool
    picked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A logarithmic axis over some values, with a little room at both ends."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """The place of a value, 0 to 1."""
        return (log10(value) - self.low) / (self.high - self.low)


def axis(values: Sequence[float]) -> Axis:
    """An axis that holds the values; one of them alone gets half a decade on each side."""
    low, high = log10(min(values)), log10(max(values))
    room = max((high - low) * 0.05, 0.05 if high > low else 0.5)
    return Axis(low=low - room, high=high + room)


def quality_of(point: Point) -> float:
    assert point.kl is not None
    return max(point.kl, FLOOR_KL)


def scatter_text(points: Sequence[Point]) -> str:
    """Faster to the right, better upwards; a dot beside a letter marks one that is beaten."""
    if len(points) < 2:
        return ""
    x, y = axis([p.speed or 1.0 for p in points]), axis([quality_of(p) for p in points])
    grid = [[" "] * (WIDTH + 1) for _ in range(HEIGHT)]
    for point in points:
        column = min(WIDTH - 1, int(x.at(point.speed or 1.0) * WIDTH))
        row = min(HEIGHT - 1, int(y.at(quality_of(point)) * HEIGHT))
        cells = grid[row]
        taken = cells[column] not in (" ", ".")
        cells[column] = "+" if taken else point.letter
        if not taken and point.beaten and cells[column + 1] == " ":
            cells[column + 1] = "."
    best, worst = min(map(quality_of, points)), max(map(quality_of, points))
    slow = min(p.speed or 1.0 for p in points)
    fast = max(p.speed or 1.0 for p in points)
    lines = [f"  KL divergence, {best:.4f} at the top to {worst:.4f}  (. beaten, + several)"]
    lines += ["  |" + "".join(cells).rstrip() for cells in grid]
    lines.append("  +" + "-" * WIDTH)
    left, right = f"{slow:.3g} tok/s", f"{fast:.3g} tok/s decode"
    lines.append("   " + left + right.rjust(WIDTH - len(left)))
    return "\n".join(lines)
