"""`loadmaster quantization`: the formats of `--quantize`, what they take and how exact they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loadmaster.errors import UsageError
from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.quantization_plots import plots
from loadmaster.interfaces.cli.render import table
from loadmaster.model.codes import FP4, INT4, INT8, NF4, Code, quantize
from loadmaster.plan.formats import BLOCKS, FORMATS, Format
from loadmaster.plan.hf_weights import BLOCK, NESTED_BLOCK

SCHEMA_VERSION = 1
CODES = (NF4, FP4, INT4, INT8)
_LEAST = BLOCKS[0]
_MOST_WEIGHTS = 4096
_MOST = 1e30  # its square is finite
_MOST_SIDE = 1 << 20


def _numbers_of(value: str) -> list[float]:
    """Numbers, by commas or spaces."""
    try:
        found = [float(word) for word in value.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"`{value}` is not a row of numbers: `0.31,-0.07,1.2`") from None
    if not 0 < len(found) <= _MOST_WEIGHTS or not all(abs(x) < _MOST for x in found):
        raise click.BadParameter(f"1 to {_MOST_WEIGHTS} finite numbers are wanted")
    return found


@click.command()
@click.option(
    "--rows",
    type=click.IntRange(1, _MOST_SIDE),
    default=4096,
    show_default=True,
    metavar="N",
    help="Outputs of the matrix that is counted.",
)
@click.option(
    "--columns",
    type=click.IntRange(_LEAST, _MOST_SIDE),
    default=4096,
    show_default=True,
    metavar="N",
    help="Its inputs; they share a scale in int8.",
)
@click.option(
    "--weights",
    type=_numbers_of,
    metavar="X,X,…",
    help="Quantize these weights as one block and show what comes back.",
)
@click.option(
    "--plots",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write plots there as SVG: numbers, errors by block, bits by block.",
)
@common_options
def quantization(
    rows: int, columns: int, weights: list[float] | None, folder: Path | None,
    as_json: bool, quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Explain the formats of `--quantize`: their numbers, their errors, the bits they take.

    Bits are those of a plan. Errors are computed for Gaussian weights, none is drawn at random.
    `int4` is evenly spaced and made by nothing here: it is what nf4 and fp4 are compared with.
    """
    if folder is not None:
        _write(folder, rows, columns)
    if as_json:
        click.echo(json.dumps(to_json(rows, columns, weights), ensure_ascii=False, indent=1))
    else:
        click.echo(text(rows, columns, weights))


command = quantization


def _write(folder: Path, rows: int, columns: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in plots(rows, columns).items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to `{folder}`: {error.strerror}") from None


# ---- text


def text(rows: int, columns: int, weights: Sequence[float] | None) -> str:
    """The table and the numbers, or what becomes of the weights that were given."""
    if weights is not None:
        return _round_trip(weights)
    head = f"a matrix of {rows} × {columns}, its weights Gaussian"
    return "\n\n".join([head, _formats(rows, columns), "numbers, times the scale", _numbers()])


def _formats(rows: int, columns: int) -> str:
    found = [["format", "share a scale", "bits a weight", "error"]]
    for one in FORMATS:
        shared = f"a row, {columns}" if one.by_row else f"{BLOCK}"
        shared += f", then {NESTED_BLOCK} scales" if one.double_quant else ""
        figures = [f"{one.bits(rows, columns):.3f}", f"{100 * one.error(columns):.2f} %"]
        found.append([one.name, shared, *figures, "" if one.is_run else "to compare with"])
    return table(found, right=(2, 3))


def _numbers() -> str:
    few = [code for code in CODES if code is not INT8]
    found = [[code.name, " ".join(f"{x:.4f}" for x in code.levels)] for code in few]
    return table([*found, [INT8.name, f"{len(INT8.levels)} numbers, 1/127 apart"]])


def _round_trip(weights: Sequence[float]) -> str:
    blocks = []
    for code in CODES:
        kept = quantize(weights, code, len(weights))
        blocks += [
            [code.name, *(f"{i}" for i in kept.kept), f"scale {kept.scales[0]:.6g}"],
            ["", *(f"{x:.4g}" for x in kept.weights), f"error {100 * _error(weights, code):.2f} %"],
        ]
    given = ["given", *(f"{x:.4g}" for x in weights)]
    return table([given, *blocks], right=range(1, len(weights) + 1))


def _error(weights: Sequence[float], code: Code) -> float:
    """Of these weights, as the table's is of Gaussian ones."""
    back = quantize(weights, code, len(weights)).weights
    whole = sum(x * x for x in weights)
    lost = sum((x - y) ** 2 for x, y in zip(weights, back, strict=True))
    return (lost / whole) ** 0.5 if whole else 0.0


# ---- JSON


def to_json(rows: int, columns: int, weights: Sequence[float] | None) -> dict[str, Any]:
    """One versioned object: of the formats, or of the weights that were given."""
    about: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    if weights is not None:
        return about | {"weights": [_weights_json(weights, code) for code in CODES]}
    return about | {
        "rows": rows,
        "columns": columns,
        "formats": [_format_json(one, rows, columns) for one in FORMATS],
        "codes": {code.name: list(code.values) for code in CODES if code is not INT8},
    }


def _format_json(one: Format, rows: int, columns: int) -> dict[str, Any]:
    blocks = [block for block in BLOCKS if block <= columns and not one.by_row]
    return {
        "name": one.name,
        "is_run": one.is_run,
        "block": one.block(columns, BLOCK),
        "double_quant": one.double_quant,
        "bits_per_weight": one.bits(rows, columns),
        "relative_error": one.error(columns),
        "by_block": [
            {"block": b, "bits_per_weight": one.bits(rows, columns, b),
             "relative_error": one.error(columns, b)}
            for b in blocks
        ],
    }  # fmt: skip


def _weights_json(weights: Sequence[float], code: Code) -> dict[str, Any]:
    kept = quantize(weights, code, len(weights))
    return {
        "code": code.name,
        "scale": kept.scales[0],
        "kept": list(kept.kept),
        "weights": kept.weights,
        "relative_error": _error(weights, code),
    }
