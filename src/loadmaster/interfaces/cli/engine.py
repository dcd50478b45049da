"""`loadmaster engine`: build, list, use and test engines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadmaster.engine import builds
from loadmaster.engine.build_engine import build_engine, build_for_machine
from loadmaster.engine.build_progress import BuildProgress, Report, Step, ignore
from loadmaster.engine.toolchain import Target
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import EngineMissingError
from loadmaster.interfaces.cli.options import common_options

_DOING: dict[Step, str] = {
    "fetch": "fetching the source",
    "unpack": "unpacking it",
    "configure": "configuring",
    "compile": "compiling",
    "test": "testing",
}


@click.group()
def engine() -> None:
    """Build, list, test and choose engines.

    An engine is llama.cpp compiled for this machine, with loadmaster's native library. Several can
    be installed side by side.
    """


command = engine


@engine.command()
@click.option("--cuda", "target", flag_value="cuda", type=str, help="For NVIDIA GPUs.")
@click.option("--rocm", "target", flag_value="rocm", type=str, help="For AMD GPUs.")
@click.option("--vulkan", "target", flag_value="vulkan", type=str, help="For any Vulkan GPU.")
@click.option("--metal", "target", flag_value="metal", type=str, help="For Apple GPUs.")
@click.option("--cpu", "target", flag_value="cpu", type=str, help="For the processor alone.")
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="A llama-cpp-python sdist, or one unpacked; default: the pinned version.",
)
@click.option("--force", is_flag=True, help="Build even if it is there already.")
@common_options
def build(
    target: Target | None, source: Path | None, force: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Compile an engine for this machine, test it, and install it.

    Without a target: the first of CUDA, ROCm, Vulkan and Metal whose GPU and tooling are here,
    else the CPU.
    """
    with _reporting(silent=as_json or quiet) as report:
        if target:
            built, note = build_engine(target, source, report, force=force), None
        else:
            built, note = build_for_machine(source, report, force=force)
    if as_json:
        _print_json({**_describe(built), "note": note})
        return
    click.echo(f"{built.id}   {built.root}")
    if note and not quiet:
        click.echo(note, err=True)


@engine.command("list")
@common_options
def list_engines(as_json: bool, quiet: bool, debug: bool) -> None:
    """Show the installed engines; the one in use is marked."""
    installed = builds.list_builds()
    used = _used_id()
    if as_json:
        _print_json({"engines": [{**_describe(b), "used": b.id == used} for b in installed]})
        return
    for one in installed:
        mark = "*" if one.id == used else " "
        stale = "" if builds.is_current(one) else f"   outdated: `{builds.BUILD_COMMAND}`"
        click.echo(f"{mark} {one.id:<16} {builds.read_manifest(one).created}   {one.root}{stale}")
    if not installed and not quiet:
        click.echo(f"no engine is built yet: `{builds.BUILD_COMMAND}`", err=True)


@engine.command()
@click.argument("engine_id", metavar="ID")
@common_options
def use(engine_id: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Make an installed engine the default."""
    chosen = builds.use_build(engine_id)
    if as_json:
        _print_json(_describe(chosen))
    elif not quiet:
        click.echo(f"using {chosen.id}")


@engine.command("test")
@click.argument("engine_id", metavar="[ID]", required=False)
@common_options
def test_engine(engine_id: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Test an engine on a tiny model: bytes as planned, tokens as expected."""
    outcome = builds.test_build(builds.find_build(engine_id))
    if as_json:
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in outcome.checks]
        _print_json(
            {
                "id": outcome.build_id,
                "passed": outcome.passed,
                "took_s": round(outcome.took_s, 3),
                "checks": checks,
            }
        )
    elif not quiet:
        for check in outcome.checks:
            click.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    failed = outcome.failure
    if failed is not None and as_json:  # the object says it all
        click.get_current_context().exit(EngineMissingError.exit_code)
    if failed is not None:
        raise EngineMissingError(
            f"the engine `{outcome.build_id}` failed its self-test: {failed.name}",
            hint=f"`{builds.BUILD_COMMAND} --force` builds it again",
        )


def _used_id() -> str | None:
    try:
        return builds.find_build().id
    except EngineMissingError:
        return None


def _describe(build: EngineBuild) -> dict[str, Any]:
    manifest = builds.read_manifest(build)
    return {
        "id": build.id,
        "target": build.target,
        "version": build.version,
        "path": str(build.root),
        "created": manifest.created,
        "compiler": manifest.compiler,
        "current": builds.is_current(build),
        "gpu_hint": builds.gpu_hint(build),
    }


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def _reporting(*, silent: bool) -> Iterator[Report]:
    """Shows a build on stderr: a bar on a terminal, else a line for every tenth."""
    console = Console(stderr=True)
    if silent:
        yield ignore
    elif not console.is_terminal:
        yield Lines()
    else:
        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("")
            yield lambda p: bar.update(
                task, description=_DOING[p.step], completed=p.done, total=p.total
            )


class Lines:
    """One line for every step, and for every tenth of a long one."""

    def __init__(self) -> None:
        self._last: tuple[Step, int] | None = None

    def __call__(self, progress: BuildProgress) -> None:
        tenth = 10 * progress.done // max(1, progress.total)
        now = (progress.step, tenth)
        if now == self._last or (progress.total == 1 and progress.done == 1):
            return
        self._last = now
        percent = f" {10 * tenth} %" if progress.total > 1 else ""
        click.echo(f"{_DOING[progress.step]}{percent}", err=True)
