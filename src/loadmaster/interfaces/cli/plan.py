"""`loadmaster plan`: what would go where, without loading it."""

import json
from typing import Any

import click

from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.options import common_options, plan_options, read_plan_options
from loadmaster.plan.codec import plan_to_json
from loadmaster.tasks.opening import Planner
from loadmaster.tasks.planning import require_plan


@click.command("plan")
@click.argument("model")
@plan_options
@click.option(
    "--machine",
    metavar="NAME|FILE",
    help="Plan for another machine: a shipped profile, or one that `doctor` wrote.",
)
@common_options
def command(model: str, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Show what would go where, without loading it.

    MODEL is a GGUF file, or `demo` for the packaged model. Every line of the ledger says where its
    figure is from: `header` and `engine` are exact, `calibrated` was measured here, `bound` is a
    conservative bound. Exit code 3: nothing fits.
    """
    planner = Planner(model, read_plan_options(given))
    plan = require_plan(planner.plan())
    if as_json:
        click.echo(json.dumps(plan_to_json(plan), ensure_ascii=False, indent=1))
        return
    click.echo(render.plan_text(plan))
