"""`loadmaster launch`: the configuration with which a program talks to a server."""

import json
from typing import Any

import click

from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.server_options import read_server, server_options
from loadmaster.tasks.api.client_configs import CLIENTS, configuration


@click.command("launch")
@click.argument("client", type=click.Choice(CLIENTS))
@click.option("-m", "--model", default="demo", show_default=True, help="The model for chat.")
@click.option("--autocomplete", metavar="MODEL", help="The model that completes what you type.")
@click.option("--embed", metavar="MODEL", help="The model for embeddings.")
@click.option("--rerank", metavar="MODEL", help="The model that ranks what was found.")
@server_options
@common_options
def command(client: str, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Print the configuration of CLIENT for a server, and where it goes.

    Nothing is written: the file may have other entries. The models are ids of `serve`.
    """
    found = configuration(
        client,
        url=read_server(given).url,
        model=given["model"],
        autocomplete=given["autocomplete"],
        embed=given["embed"],
        rerank=given["rerank"],
    )
    if as_json:
        value = {"schema_version": 1, "client": client, "place": found.place, "text": found.text}
        click.echo(json.dumps(value))
        return
    for note in found.notes if not quiet else ():
        click.echo(f"note: {note}", err=True)
    if not quiet:
        click.echo(f"{found.place}:", err=True)
    click.echo(found.text)
