"""Write `docs/cli.md` from the commands themselves; with `--check`, say whether it is current."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from loadmaster.errors import LoadmasterError
from loadmaster.interfaces.cli.main import cli
from loadmaster.interfaces.cli.repl import HELP
from loadmaster.settings import VARIABLES

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
_HEADER = """# Command line

Written from the commands by `make docs`; change the commands, not this page.

stdout has the data and stderr the rest. `--json` on any command prints one object, errors included:
`{"error": {"message", "code", "hint", "numbers"}}`.
"""
_OTHER_CODES = ((0, "it worked"), (130, "stopped by Ctrl-C"))


def reference() -> str:
    """The whole page."""
    root = click.Context(cli, info_name="loadmaster")
    parts = [_HEADER, *_command(cli, root, level=2), _chat(), _variables(), _exit_codes()]
    return "\n".join(parts).rstrip() + "\n"


def _command(command: click.Command, ctx: click.Context, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{ctx.command_path}`\n"
    yield f"{_text(command.help)}\n"
    if not isinstance(command, click.Group):
        yield f"```\n{command.get_usage(ctx).removeprefix('Usage: ')}\n```\n"
        yield _options(command, ctx)
        return
    for name in command.list_commands(ctx):
        child = command.get_command(ctx, name)
        assert child is not None
        yield from _command(child, click.Context(child, parent=ctx, info_name=name), level + 1)


def _text(text: str | None) -> str:
    return "\n".join(line.strip() for line in (text or "").strip().splitlines())


def _options(command: click.Command, ctx: click.Context) -> str:
    records = (p.get_help_record(ctx) for p in command.params if isinstance(p, click.Option))
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in filter(None, records)]
    return "| option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("  [", " [")


def _chat() -> str:
    rows = [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in HELP.items()]
    return "## Inside `chat`\n\n| command | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"


def _variables() -> str:
    rows = [f"| `{variable.name}` | {variable.meaning} |" for variable in VARIABLES]
    return "## Environment\n\n| variable | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"


def _exit_codes() -> str:
    codes = dict(_OTHER_CODES)
    for error in _tree(LoadmasterError):
        codes.setdefault(error.exit_code, _first_sentence(error))
    rows = [f"| {code} | {codes[code]} |" for code in sorted(codes)]
    return "## Exit codes\n\n| code | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"


def _tree(root: type[LoadmasterError]) -> Iterator[type[LoadmasterError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == "loadmaster.errors":
            yield from _tree(child)


def _first_sentence(error: type[LoadmasterError]) -> str:
    line = (error.__doc__ or "").strip().splitlines()[0].split("; ")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    current = reference()
    if not parser.parse_args().check:
        TARGET.write_text(current, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == current:
        return 0
    print(f"{TARGET.name} is not current: `make docs` writes it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
