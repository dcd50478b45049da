"""The `loadmaster` command: finds a subcommand, runs it, and turns its end into an exit code.

A command's module is imported only when that command runs, so `--help` and errors are quick.
"""

import difflib
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from loadmaster import __version__
from loadmaster.errors import UsageError
from loadmaster.interfaces.cli.failure import INTERRUPTED_EXIT_CODE, Failure, describe

COMMANDS = {
    "batch": ("loadmaster.interfaces.cli.batch", "Run files of requests, durably."),
    "bench": ("loadmaster.interfaces.cli.bench", "Measure speed under the plan."),
    "chat": ("loadmaster.interfaces.cli.chat", "Talk to a model, inside a memory budget."),
    "doctor": ("loadmaster.interfaces.cli.doctor", "Show this machine and what limits it."),
    "engine": ("loadmaster.interfaces.cli.engine", "Build, list, test and choose engines."),
    "launch": ("loadmaster.interfaces.cli.launch", "Print a program's settings for a server."),
    "plan": ("loadmaster.interfaces.cli.plan", "Show what would go where, without loading it."),
    "ps": ("loadmaster.interfaces.cli.ps", "Show the models that a server has loaded."),
    "pull": ("loadmaster.interfaces.cli.pull", "Download a model, verified and resumable."),
    "quantization": (
        "loadmaster.interfaces.cli.quantization",
        "Explain the formats of --quantize.",
    ),
    "run": ("loadmaster.interfaces.cli.run", "Answer one prompt, inside a memory budget."),
    "serve": ("loadmaster.interfaces.cli.serve", "Serve models over HTTP, under one budget."),
    "stop": ("loadmaster.interfaces.cli.stop", "Unload a model of a server."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-liners, and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; it holds a click command named `command`."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or suggest the closest name."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise UsageError(
                f"`{name}` is not a command",
                hint=f"did you mean `{close[0]}`?" if close else f"commands: {', '.join(COMMANDS)}",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="First steps: `loadmaster doctor`, then `loadmaster run demo`.",
)
@click.version_option(__version__, message="loadmaster %(version)s")
def cli() -> None:
    """Run language models that are bigger than your GPU, inside exactly the memory you allow."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the console script. Every end of the program passes here once."""
    words = list(sys.argv[1:] if argv is None else argv)
    sys.exit(run(words))


def run(words: Sequence[str]) -> int:
    """Run a command line and give its exit code; messages have been printed."""
    try:
        status = cli.main(list(words) or ["--help"], prog_name="loadmaster", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # click turns a broken pipe, and nothing else, into one
        _silence_stdout()
        return 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        return _fail(error, words)
    return status if isinstance(status, int) else 0


def _fail(error: Exception, words: Sequence[str]) -> int:
    if "--debug" in words and not isinstance(error, click.UsageError):
        import traceback

        traceback.print_exception(error)
    failure = describe(error)
    try:
        _report(failure, as_json="--json" in words)
    except BrokenPipeError:
        _silence_stdout()
    return failure.exit_code


def _report(failure: Failure, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(failure.to_json(), ensure_ascii=False) + "\n")
        sys.stdout.flush()
    sys.stderr.write(failure.to_text())
    sys.stderr.flush()


def _silence_stdout() -> None:
    """The reader is gone (`| head`): nothing more to say, not even at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
