"""Three plots of the formats: their numbers, their errors, and the bits that they take."""

from collections.abc import Mapping, Sequence

from loadmaster.interfaces.cli.charts import Line, Row, Scale, line_chart, mark_rows
from loadmaster.plan.formats import BLOCKS, FORMATS, Format
from loadmaster.plan.hf_weights import BLOCK
from loadmaster.plan.rounding import density_over_scale

_COLOURS = {"nf4": 0, "fp4": 1, "int4": 2, "int8": 3}
_N_DENSITY = 120  # places at which the curve is drawn


def plots(rows: int, columns: int) -> Mapping[str, str]:
    """SVG files by name, of a matrix of a shape."""
    return {
        "quantization-values.svg": values_plot(),
        "quantization-error.svg": error_plot(columns),
        "quantization-bits.svg": bits_plot(rows, columns),
    }


def values_plot() -> str:
    """The numbers of each code, under the density of weights over their scale."""
    rows = [
        Row(label=_label(one), values=one.code.levels, colour=_COLOURS[one.code.name])
        for one in _once()
    ]
    steps = [2 * i / _N_DENSITY - 1 for i in range(_N_DENSITY + 1)]
    return mark_rows(
        "The numbers that weights are rounded to, times the scale",
        rows,
        [(x, density_over_scale(BLOCK, x)) for x in steps],
        f"grey: where Gaussian weights lie, divided by the largest of their block of {BLOCK}",
    )


def error_plot(columns: int) -> str:
    """Error of Gaussian weights by how many of them share a scale."""
    lines = [
        Line(
            label=_label(one),
            points=[(b, 100 * one.error(b, b)) for b in BLOCKS if b <= columns],
            colour=_COLOURS[one.code.name],
            dashed=not one.is_run,
        )
        for one in _once()
    ]
    y = Scale(label="root mean square error, % of the weights' own", low=0.4, high=50,
              ticks=(0.5, 1, 2, 5, 10, 20, 50), base=10)  # fmt: skip
    return line_chart("Error against Gaussian weights", _block_scale(columns), y, lines)


def bits_plot(rows: int, columns: int) -> str:
    """Bits a weight by how many share a scale, with scales in full and quantized."""
    lines = [
        Line(
            label="double" if one.double_quant else "scales in full",
            points=[(b, one.bits(rows, columns, b)) for b in BLOCKS if b <= columns],
            colour=int(one.double_quant),
        )
        for one in FORMATS
        if one.code.name == "nf4"
    ]
    y = Scale(label="bits a weight, NF4 or FP4", low=3.9, high=5.1,
              ticks=(4, 4.25, 4.5, 4.75, 5))  # fmt: skip
    title = f"Bits a weight of a matrix of {rows} × {columns}"
    return line_chart(title, _block_scale(columns), y, lines)


def _block_scale(columns: int) -> Scale:
    shown = [block for block in BLOCKS if block <= columns]
    return Scale(label="weights that share a scale", low=shown[0],
                 high=max(shown[-1], 2 * shown[0]), ticks=shown, base=2)  # fmt: skip


def _once() -> Sequence[Format]:
    """One of each code."""
    return [one for one in FORMATS if not one.double_quant]


def _label(one: Format) -> str:
    return one.name if one.is_run else f"{one.name} (compare)"
