"""`loadmaster batch`: durable jobs from OpenAI Batch files."""

from importlib import import_module

import click

_COMMANDS = {
    # Name: the module, the command in it, and its line in the help.
    "cancel": ("batch_jobs", "cancel", "Give a job up; its results stay."),
    "list": ("batch_jobs", "list_jobs", "List all jobs."),
    "plan": ("batch_plan", "plan", "Show how long a file takes, without running it."),
    "results": ("batch_jobs", "results", "Write the results that a job has so far."),
    "resume": ("batch_run", "resume", "Run a job that was submitted, stopped or interrupted."),
    "retry": ("batch_run", "retry", "Run the failed items of a job again."),
    "run": ("batch_run", "run", "Run a file of requests, and go on where it was left."),
    "status": ("batch_jobs", "status", "Show how far a job is."),
    "submit": ("batch_run", "submit", "Check a file, and run it in the background."),
}


class _Commands(click.Group):
    """Imports a command's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it."""
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        command = getattr(import_module(f"loadmaster.interfaces.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group("batch", cls=_Commands)
def command() -> None:
    """Run files of requests overnight; nothing that has a result is lost or done twice.

    A file has one request of OpenAI's Batch API on each line. Every result is on the disk before it
    counts: after a crash, a power cut or Ctrl-C, `run` or `resume` goes on with what is left.
    """
