"""`loadmaster launch`: the configuration with which a program talks to a server."""

import json
from pathlib import Path
from typing import Any

import click

from loadmaster.errors import LoadmasterError
from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.server_options import read_server, server_options
from loadmaster.tasks.api.client_configs import CLIENTS, Models, configuration
from loadmaster.tasks.serving.client import Server


@click.command("launch")
@click.argument("client", type=click.Choice(CLIENTS))
@click.option("-m", "--model", help="The model for chat; default: the server's first.")
@click.option("--autocomplete", metavar="MODEL", help="The model that completes what you type.")
@click.option("--embed", metavar="MODEL", help="The model for embeddings.")
@click.option("--rerank", metavar="MODEL", help="The model that ranks what was found.")
@server_options
@common_options
def command(client: str, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Print the configuration of CLIENT for a server, and where it goes.

    Nothing is written: the file may have other entries. The models are ids of `serve`; where the
    server runs they are checked, and their n_ctx is filled in. A key is named, never printed.
    """
    server = read_server(given)
    models, missing = _look(server)
    key_file: Path | None = given["api_key_file"]
    found = configuration(
        client,
        url=server.url,
        models=models,
        model=given["model"],
        autocomplete=given["autocomplete"],
        embed=given["embed"],
        rerank=given["rerank"],
        key_file=None if key_file is None else str(key_file.absolute()),
    )
    notes = [*missing, *found.notes]
    if as_json:
        value = {"schema_version": 1, "client": client, "place": found.place, "text": found.text}
        click.echo(json.dumps({**value, "notes": notes}))
        return
    for note in notes if not quiet else ():
        click.echo(f"note: {note}", err=True)
    if not quiet:
        click.echo(f"{found.place}:", err=True)
    click.echo(found.text)


def _look(server: Server) -> tuple[Models, list[str]]:
    """What the server offers; a configuration can be had before it runs."""
    try:
        offers = server.offers()
    except LoadmasterError as error:
        return Models(), [f"{error.message}: models are not checked, their n_ctx is left out"]
    return Models.read(offers), []
