"""The options of commands that talk to a server that runs: `ps`, `stop` and `launch`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.settings import URL
from loadmaster.tasks.serving.client import DEFAULT_HOST, DEFAULT_PORT, DEFAULT_URL, Server

Command = TypeVar("Command", bound=Callable[..., object])
_OPTIONS = (
    click.option(
        "--url", metavar="URL",
        help=f"The server's address; default: {URL.name}, or {DEFAULT_URL}.",
    ),
    click.option("--host", metavar="HOST", help="The same by its parts, as `serve` takes them."),
    click.option("--port", type=click.IntRange(1, 65535), metavar="PORT"),
    click.option(
        "--api-key-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="The file with the server's key.",
    ),
)  # fmt: skip


def server_options(command: Command) -> Command:
    """`--url`, `--host`, `--port` and `--api-key-file`; collected by `read_server`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_server(given: dict[str, Any]) -> Server:
    """Collect the values of `server_options`.

    Raises:
        NotFoundError: the key's file is not there.
        UsageError: two addresses are given.
    """
    file: Path | None = given["api_key_file"]
    try:
        key = None if file is None else file.read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        raise NotFoundError(f"there is no key in `{file}`") from None
    return Server(url=_url(given["url"], given["host"], given["port"]), key=key)


def _url(url: str | None, host: str | None, port: int | None) -> str:
    if host is None and port is None:
        return (url or URL.value or DEFAULT_URL).rstrip("/").removesuffix("/v1")
    if url is not None:
        raise UsageError("`--url` and `--host` or `--port` are two addresses", hint="leave one out")
    host = host or DEFAULT_HOST
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port or DEFAULT_PORT}"
