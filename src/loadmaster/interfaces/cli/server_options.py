"""The options of commands that talk to a server that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loadmaster.errors import NotFoundError
from loadmaster.settings import URL
from loadmaster.tasks.serving.client import DEFAULT_URL, Server

Command = TypeVar("Command", bound=Callable[..., object])


def server_options(command: Command) -> Command:
    """`--url` and `--api-key-file`; collected by `read_server`."""
    key = click.option(
        "--api-key-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="The file with the server's key.",
    )  # fmt: skip
    url = click.option(
        "--url", metavar="URL",
        help=f"The server's address; default: {URL.name}, or {DEFAULT_URL}.",
    )  # fmt: skip
    return url(key(command))


def read_server(given: dict[str, Any]) -> Server:
    """Collect the values of `server_options`.

    Raises:
        NotFoundError: the key's file is not there.
    """
    file: Path | None = given["api_key_file"]
    try:
        key = None if file is None else file.read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        raise NotFoundError(f"there is no key in `{file}`") from None
    return Server(url=given["url"] or URL.value or DEFAULT_URL, key=key)
