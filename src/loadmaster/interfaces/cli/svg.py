"""The scatter plot as an SVG file of its own: no script, no font, legible on light and dark."""

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor

from loadmaster.interfaces.cli.scatter import FLOOR_KL, Axis, Point, axis, quality_of

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 20, 50
_STYLE = (
    "text{font:12px sans-serif;fill:#444}.line{stroke:#8886}.point{fill:#2a6fb0}"
    ".beaten{fill:#9998}.picked{fill:#c4460f}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


def scatter_svg(points: Sequence[Point]) -> str:
    """Decode rate to the right, KL divergence downwards, both logarithmic."""
    x = axis([p.speed or 1.0 for p in points] or [1.0])
    y = axis([quality_of(p) for p in points] or [FLOOR_KL])
    body = [*_grid(x, y), *(part for point in points for part in _point(point, x, y))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>Decode rate and KL divergence of {len(points)} plans</title>"
        f"<style>{_STYLE}</style>{''.join(body)}</svg>\n"
    )


def _across(x: Axis, value: float) -> float:
    return _LEFT + x.at(value) * (_WIDTH - _LEFT - _RIGHT)


def _down(y: Axis, value: float) -> float:
    return _TOP + y.at(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in _ticks(x):
        at = _across(x, value)
        yield f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
    for value in _ticks(y):
        at = _down(y, value)
        yield f'<line class="line" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
    yield f'<text x="{_LEFT}" y="{_HEIGHT - 10}">decode, tok/s</text>'
    yield f'<text x="8" y="{_TOP - 6}">KL divergence</text>'


def _ticks(one: Axis) -> Iterator[float]:
    """1, 2 and 5 of each decade inside the axis."""
    for power in range(floor(one.low), ceil(one.high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if 0 <= one.at(value) <= 1:
                yield value


def _point(point: Point, x: Axis, y: Axis) -> Iterator[str]:
    across, down = _across(x, point.speed or 1.0), _down(y, quality_of(point))
    kind = "picked" if point.picked else "beaten" if point.beaten else "point"
    label = escape(point.label)
    yield f'<circle class="{kind}" cx="{across:.1f}" cy="{down:.1f}" r="5"/>'
    yield f'<text x="{across + 8:.1f}" y="{down + 4:.1f}">{label}</text>'
