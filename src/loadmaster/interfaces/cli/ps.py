"""`loadmaster ps`: what a server has loaded, and what it is doing."""

import json
from collections.abc import Mapping
from typing import Any

import click

from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.server_options import read_server, server_options
from loadmaster.units import format_size

_HEADINGS = ("NAME", "STATE", "CONTEXT", "RUNNING", "WAITING", "MEMORY", "UNTIL")


@click.command("ps")
@server_options
@common_options
def command(as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Show the models that a server has loaded."""
    rows = read_server(given).models()
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "models": rows}))
    elif quiet:
        for row in rows:
            click.echo(row["id"])
    else:
        click.echo(table([_HEADINGS, *map(cells, rows)]))


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    n_ctx, n_parallel = row["n_ctx"], row["n_parallel"]
    memory = [f"{device} {format_size(size)}" for device, size in row["planned_bytes"].items()]
    return (
        row["id"],
        row["state"] + (f": {row['reason']}" if row["reason"] else ""),
        f"{n_parallel} × {n_ctx}" if n_ctx else "-",
        str(row["n_running"]),
        str(row["n_waiting"]),
        ", ".join(memory) or "-",
        _until(row),
    )


def _until(row: Mapping[str, Any]) -> str:
    if row.get("n_items") and row["idle_s"] is not None:
        return "its job ends"
    if row["expires_s"] is None:
        return "in use" if row["idle_s"] is None else "kept"
    return f"{row['expires_s']:.0f} s from now"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
             for row in rows)  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
