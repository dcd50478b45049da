"""`loadmaster serve`: an HTTP server for one model or many, under one budget."""

import json
import secrets
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loadmaster.engine.confine import confine_server
from loadmaster.errors import UsageError
from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.options import common_options, plan_options, read_plan_options
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.tasks.serving.client import DEFAULT_HOST, DEFAULT_PORT
from loadmaster.tasks.serving.events import EventLog
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.offers import Offers, read_offers, with_contexts
from loadmaster.tasks.serving.opening import Opener, check_parallel
from loadmaster.tasks.serving.strict import require_confined
from loadmaster.tasks.serving.types import ServeOptions, ServerEvent, parse_keep_alive

_KEY_BYTES = 32


@click.command("serve")
@click.argument("models", nargs=-1, metavar="[MODEL | ID=MODEL]...")
@click.option(
    "--embeddings", multiple=True, metavar="[ID=]MODEL",
    help="Offer a model for embeddings, with mean pooling where its header names none.",
)  # fmt: skip
@click.option(
    "--model-ctx", multiple=True, metavar="ID=N",
    help="Tokens of prompt and answer for one model, in place of --ctx.",
)  # fmt: skip
@click.option("--host", default=DEFAULT_HOST, show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=DEFAULT_PORT, show_default=True, type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Keys, one in a line; needed for any --host but loopback. Made if it is not there.",
)  # fmt: skip
@click.option("--allow-origin", multiple=True, metavar="URL", help="Let pages of this origin ask.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name of this server.")
@click.option(
    "--parallel", "n_parallel", type=int, metavar="N",
    help="Sequences of a model at a time; default: 4, or as many as fit.",
)  # fmt: skip
@click.option(
    "--queue", "queue_cap", type=click.IntRange(min=0), default=64, show_default=True, metavar="N",
    help="Requests of a model that may wait; the next ones get 429.",
)  # fmt: skip
@click.option(
    "--keep-alive", default="5m", show_default=True, metavar="TIME",
    help="Unload a model that was idle for so long: 90s, 5m, 1h; -1: never.",
)  # fmt: skip
@click.option(
    "--drain", "drain_s", type=click.FloatRange(min=0), default=30.0, show_default=True,
    metavar="SECONDS", help="How long requests may go on after Ctrl-C or SIGTERM.",
)  # fmt: skip
@click.option(
    "--probe", "probe_s", type=click.FloatRange(min=0), default=30.0, show_default=True,
    metavar="SECONDS", help="An idle model decodes one token so often, as a check; 0: never.",
)  # fmt: skip
@click.option(
    "--strict", is_flag=True,
    help="Refuse to start where a confinement that `doctor` lists is not in force.",
)  # fmt: skip
@click.option("--backend-options", hidden=True, help="JSON for the fake backend, for tests.")
@plan_options
@common_options
def command(models: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Serve models over HTTP, inside a memory budget.

    MODEL is a GGUF file, a folder of safetensors, a model of the Hub or of Ollama that is here, or
    `demo`; `ID=MODEL` gives it the name that clients send. Without one, the packaged model and
    those of Ollama are offered. The first is loaded now, the others when they are asked for; what
    does not fit beside them takes the place of the one that was used least recently. Batches of
    `/v1/batches` are jobs, as in `loadmaster batch`; people's requests go before their items.
    """
    from loadmaster.interfaces.http.listen import Listening, bind, run

    progress = TerminalProgress(quiet=quiet or as_json)
    listening = Listening(
        host=given["host"],
        port=given["port"],
        keys=read_keys(given["api_key_file"], progress),
        hosts=given["allow_host"],
        origins=given["allow_origin"],
        drain_s=given["drain_s"],
    )
    listening.rules()
    options = _options(given)
    confine_server()
    if given["strict"]:
        require_confined(options.plan.backend)
    offers = with_contexts(read_offers(models, given["embeddings"]), given["model_ctx"])
    listener = bind(listening)
    port = listener.getsockname()[1]
    _announce(listening.host, port, offers, progress, as_json=as_json)

    def make_serving() -> Serving:
        opener = Opener(options.plan, given["n_parallel"], offers=offers, strict=given["strict"])
        return Serving(offers, options, opener, events=EventLog(_sayer(progress)))

    async def on_start(serving: Serving) -> None:
        if models:
            first = next(iter(serving.models.values()))
            await serving.ensure(first)
            await first.measure()
            progress.say(render.memory_table(first.last_memory))

    run(listening, listener, make_serving, on_start)
    progress.say("ended")


def _options(given: dict[str, Any]) -> ServeOptions:
    check_parallel(given["n_parallel"])
    plan = read_plan_options(given)
    if given["backend_options"]:
        plan = replace(plan, backend_options=json.loads(given["backend_options"]))
    try:
        keep_alive_s = parse_keep_alive(given["keep_alive"])
    except ValueError:
        raise UsageError(
            f"`{given['keep_alive']}` is not a time", hint="`--keep-alive` takes 90s, 5m, 1h or -1"
        ) from None
    return ServeOptions(
        plan=plan,
        queue_cap=given["queue_cap"],
        keep_alive_s=keep_alive_s,
        drain_s=given["drain_s"],
        probe_s=given["probe_s"],
    )


def read_keys(file: Path | None, progress: TerminalProgress) -> tuple[str, ...]:
    """The keys in a file; one that is not there is made, readable by its owner alone.

    Raises:
        UsageError: the file has no key, or others may read it.
    """
    if file is None:
        return ()
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(_KEY_BYTES) + "\n", encoding="ascii")
        progress.say(f"a key was made in {file}")
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise UsageError(f"`{file}` can be read by others", hint=f"`chmod 600 {file}`")
    keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    if not any(keys):
        raise UsageError(f"`{file}` has no key", hint="write one in a line of its own")
    return tuple(key for key in keys if key)


def _announce(
    host: str, port: int, offers: Offers, progress: TerminalProgress, *, as_json: bool
) -> None:
    """Where it listens: for people on stderr, for programs as the first line on stdout."""
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    ids = [offer.id for offer in offers]
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "url": url, "models": ids}))
    progress.say(f"listening on {url}, OpenAI's API at {url}/v1")
    progress.say(f"models: {', '.join(ids)}")


def _sayer(progress: TerminalProgress) -> Callable[[ServerEvent], None]:
    def say(event: ServerEvent) -> None:
        name = f"{event.model}: " if event.model else ""
        progress.say(f"{event.kind}: {name}{event.text}")

    return say
