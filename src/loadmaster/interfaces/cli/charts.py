"""Line charts and rows of marks as SVG: no script, no font, legible on light and dark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import log2, log10

WIDTH = 720
_HEIGHT = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 130, 34, 46
_COLOURS = ("#2a6fb0", "#c4460f", "#3a8a4d", "#8a5fb5", "#a08016")
_STYLE = (
    "text{font:12px sans-serif;fill:#444}.title{font-weight:bold}.grid{stroke:#8886}"
    ".line{fill:none;stroke-width:2}.mark{stroke-width:1.5}.area{fill:#8883}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)

Place = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of a chart, in order, joined."""

    label: str
    points: Sequence[Place]
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One direction of a chart: its ends, the values that are named, and how they lie."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    base: float | None = None  # of a logarithm; None: evenly

    def at(self, value: float) -> float:
        """The place of a value, 0 to 1."""
        low, high, at = (self._bent(one) for one in (self.low, self.high, value))
        return (at - low) / (high - low)

    def _bent(self, value: float) -> float:
        if self.base is None:
            return value
        return log2(value) if self.base == 2 else log10(value)


def line_chart(title: str, x: Scale, y: Scale, lines: Sequence[Line]) -> str:
    """Lines over a grid, each named where it ends."""
    frame = _Frame(x=x, y=y)
    labels = _spread([frame.down(line.points[-1][1]) for line in lines])
    drawn = [
        part
        for line, label_at in zip(lines, labels, strict=True)
        for part in _line(line, frame, label_at)
    ]
    return document(title, _HEIGHT, [*_grid(frame), *drawn])


def document(title: str, height: int, body: Sequence[str]) -> str:
    """An SVG file with its title above."""
    name = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{name}</title><style>{_STYLE}</style>"
        f'<text class="title" x="{_LEFT}" y="18">{name}</text>{"".join(body)}</svg>\n'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    x: Scale
    y: Scale

    def across(self, value: float) -> float:
        return _LEFT + self.x.at(value) * (WIDTH - _LEFT - _RIGHT)

    def down(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - self.y.at(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(frame: _Frame) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in frame.x.ticks:
        at = frame.across(value)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield text(at, bottom + 16, f"{value:g}", "middle")
    for value in frame.y.ticks:
        at = frame.down(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield text(_LEFT - 8, at + 4, f"{value:g}", "end")
    yield text(_LEFT, _HEIGHT - 8, f"{frame.x.label}; upwards: {frame.y.label}")


def _line(line: Line, frame: _Frame, label_at: float) -> Iterator[str]:
    places = " ".join(f"{frame.across(x):.1f},{frame.down(y):.1f}" for x, y in line.points)
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    yield f'<polyline class="line" stroke="{colour(line.colour)}"{dashes} points="{places}"/>'
    at = frame.across(line.points[-1][0]) + 8
    yield text(at, label_at + 4, line.label, fill=colour(line.colour))


def _spread(places: Sequence[float], apart: float = 14) -> list[float]:
    """Labels moved down where they would cover each other."""
    moved = list(places)
    lowest = float("-inf")
    for index in sorted(range(len(moved)), key=lambda i: moved[i]):
        lowest = moved[index] = max(moved[index], lowest + apart)
    return moved


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = "") -> str:
    """A label, of a line in the line's colour."""
    style = f' style="fill:{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def colour(index: int) -> str:
    """One of a few that are told apart on light and dark."""
    return _COLOURS[index % len(_COLOURS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Numbers from -1 to 1 that are marked on a line of their own."""

    label: str
    values: Sequence[float]
    colour: int


def mark_rows(title: str, rows: Sequence[Row], density: Sequence[Place], note: str) -> str:
    """Rows of marks under a curve that says where the weights are."""
    height = _TOP + 90 + 44 * len(rows) + _BOTTOM
    base, peak = _TOP + 80, max(y for _, y in density)
    body = [_area([(_mark_at(x), base - 75 * y / peak) for x, y in density], base)]
    for index, row in enumerate(rows):
        top = base + 20 + 44 * index
        body += _marks(row, top)
    for value in (-1, -0.5, 0, 0.5, 1):
        body.append(text(_mark_at(value), height - _BOTTOM + 12, f"{value:g}", "middle"))
    body.append(text(_LEFT, height - 8, note))
    return document(title, height, body)


def _mark_at(value: float) -> float:
    return _LEFT + (value + 1) / 2 * (WIDTH - _LEFT - _RIGHT)


def _area(places: Sequence[Place], base: float) -> str:
    ends = [(places[0][0], base), *places, (places[-1][0], base)]
    return f'<polygon class="area" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in ends)}"/>'


def _marks(row: Row, top: float) -> Iterator[str]:
    for value in row.values:
        at = _mark_at(value)
        yield (
            f'<line class="mark" stroke="{colour(row.colour)}" x1="{at:.1f}" x2="{at:.1f}" '
            f'y1="{top:.1f}" y2="{top + 26:.1f}"/>'
        )
    yield text(WIDTH - _RIGHT + 10, top + 17, row.label, fill=colour(row.colour))
