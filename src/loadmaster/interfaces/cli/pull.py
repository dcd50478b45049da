"""`loadmaster pull`: download a model, verified, to where every command finds it."""

import json
import time
from collections import deque
from typing import TextIO

import click

from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.progress import LiveLine, bar_line, duration
from loadmaster.tasks.connections import TransferRules
from loadmaster.tasks.pull import Pulled, PullOptions, pull
from loadmaster.units import MIB, format_size

MAX_CONNECTIONS = 16
_RATE_WINDOW_S = 10.0


@click.command("pull")
@click.argument("model")
@click.option("--sha256", metavar="HEX", help="The digest that the file must have; for plain URLs.")
@click.option(
    "--connections",
    type=click.IntRange(1, MAX_CONNECTIONS),
    default=TransferRules().connections,
    show_default=True,
    metavar="N",
    help="Ranges that are fetched at the same time.",
)
@click.option(
    "--safetensors", is_flag=True, help="Of a repository that has GGUF files too, the safetensors."
)
@common_options
def command(
    model: str,
    sha256: str | None,
    connections: int,
    safetensors: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Download a model; an interrupted download goes on where it stopped.

    MODEL is `hf:owner/repo:Q4_K_M`, `hf:owner/repo/file.gguf`, each with `@revision` if need be, or
    an `https://` URL. `hf:owner/repo` of safetensors is fetched with its config and tokenizer.
    Files of the Hub go into the Hub's own cache and are verified against its sha256; a file of a
    plain URL is verified against `--sha256`, or marked as unverified. stdout has the path.
    """
    progress = PullProgress(quiet=quiet or as_json)
    rules = TransferRules(connections=connections)
    options = PullOptions(sha256=sha256, safetensors=safetensors, rules=rules)
    try:
        pulled = pull(model, options, progress)
    finally:
        progress.finish()
    if as_json:
        click.echo(json.dumps(_to_json(pulled), ensure_ascii=False))
        return
    progress.say(summary(pulled))
    click.echo(str(pulled.path))


def summary(pulled: Pulled) -> str:
    """What was downloaded, how fast, and whether it is what it claims to be."""
    size = sum(file.size_bytes for file in pulled.files)
    parts = [format_size(size)]
    if pulled.fetched_bytes:
        rate = pulled.fetched_bytes / MIB / max(pulled.took_s, 1e-3)
        parts.append(f"{format_size(pulled.fetched_bytes)} in {pulled.took_s:.1f} s")
        parts.append(f"{rate:.1f} MiB/s")
        parts.append(_verified(pulled))
    else:
        parts.append("was here already")
    return " · ".join(parts)


def _verified(pulled: Pulled) -> str:
    open_files = [file for file in pulled.files if not file.verified]
    if not open_files:
        return "sha256 verified"
    if pulled.is_checkpoint and all(file.path.suffix != ".safetensors" for file in open_files):
        names = ", ".join(file.path.name for file in open_files)
        return f"sha256 of the weights verified; the Hub has none of {names}"
    digests = ", ".join(file.sha256 for file in open_files)
    return f"unverified: compare its sha256 {digests} with the publisher's"


def _to_json(pulled: Pulled) -> dict[str, object]:
    return {
        "schema_version": 1,
        "model": pulled.reference,
        "path": str(pulled.path),
        "took_s": round(pulled.took_s, 3),
        "files": [
            {
                "path": str(file.path),
                "size_bytes": file.size_bytes,
                "sha256": file.sha256,
                "verified": file.verified,
                "fetched_bytes": file.fetched_bytes,
                "resumed_bytes": file.resumed_bytes,
            }
            for file in pulled.files
        ],
    }


class PullProgress(LiveLine):
    """A bar with the rate of the last seconds and what is left; elsewhere one line a file."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        super().__init__(quiet=quiet, stream=stream)
        self._label = ""
        self._seen: deque[tuple[float, int]] = deque()

    def fetching(self, label: str, done_bytes: int, total_bytes: int | None) -> None:
        """Draw how far it is, how fast, and for how long."""
        self._begin(label, "fetching", total_bytes)
        self._seen.append((time.monotonic(), done_bytes))
        while self._seen[-1][0] - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        if self.is_due():
            amount = rate_text(tuple(self._seen), total_bytes)
            fraction = done_bytes / total_bytes if total_bytes else 0.0
            self.redraw(bar_line("fetching", fraction, amount, 0.0))

    def verifying(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Draw how much has been read for the digest."""
        if self.is_due():
            fraction = done_bytes / total_bytes if total_bytes else 1.0
            self.redraw(bar_line("verifying", fraction, "", 0.0))

    def _begin(self, label: str, verb: str, total_bytes: int | None) -> None:
        if label == self._label:
            return
        self._label = label
        self._seen.clear()
        size = format_size(total_bytes) if total_bytes else "unknown size"
        self.say(f"{verb} {label}, {size}")


def rate_text(seen: tuple[tuple[float, int], ...], total_bytes: int | None) -> str:
    """`1.20 GiB  85.3 MiB/s  12 min left` from moments and the bytes that were there."""
    (first_at, first), (last_at, last) = seen[0], seen[-1]
    parts = [format_size(last)]
    elapsed = last_at - first_at
    rate = (last - first) / elapsed if elapsed > 0 else 0.0
    if rate > 0:
        parts.append(f"{rate / MIB:.1f} MiB/s")
        if total_bytes is not None:
            parts.append(f"{duration((total_bytes - last) / rate)} left")
    return "  ".join(parts)
