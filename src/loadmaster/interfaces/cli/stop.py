"""`loadmaster stop`: unload a model of a server."""

import json
from typing import Any

import click

from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.server_options import read_server, server_options


@click.command("stop")
@click.argument("model")
@server_options
@common_options
def command(model: str, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Unload a model of a server: its requests end first, then its memory is free.

    The model is loaded again when it is asked for. A model that failed three times in ten minutes
    may be loaded again after this.
    """
    was_loaded = read_server(given).stop(model)
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "model": model, "was_loaded": was_loaded}))
    elif not quiet:
        click.echo(f"`{model}` {'is unloaded' if was_loaded else 'was not loaded'}", err=True)
