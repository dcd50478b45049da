"""`loadmaster plan`: what would go where, without loading it."""

import json
from dataclasses import replace
from typing import Any

import click

from loadmaster.errors import UsageError
from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.options import (
    common_options,
    machine_option,
    plan_options,
    read_plan_options,
    sequence_options,
)
from loadmaster.plan.codec import plan_to_json
from loadmaster.plan.compare import Limits
from loadmaster.tasks.planner import Planner
from loadmaster.tasks.planning import PlanOptions, require_plan


@click.command("plan")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@plan_options
@machine_option
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of the prompt that TTFT and prefill are predicted for; default: 512.",
)
@click.option(
    "--workload",
    type=click.Choice(["chat", "serve", "batch"]),
    help="What to be fast at: one conversation, several, or requests per hour; default: chat.",
)
@sequence_options(
    sequences="Conversations or requests at the same time.",
    cells="Tokens of all sequences together; default: `--ctx` for each.",
)
@click.option(
    "--output-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of an answer, as weighed against the prompt's; default: 256.",
)
@click.option(
    "--shared-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --workload batch: leading tokens that all prompts share; default: 0.",
)
@click.option(
    "--compare",
    "comparing",
    is_flag=True,
    help="Plan every quantization of the models, and say which are beaten by another.",
)
@click.option(
    "--goal",
    type=click.Choice(["quality", "speed", "context"]),
    help="With --compare: what the answer is to be best at; default: quality.",
)
@click.option(
    "--min-speed",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="With --compare: no fewer tok/s of decode.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="X",
    help="With --compare: no higher KL divergence.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False),
    metavar="FILE.svg",
    help="With --compare: write the scatter plot as SVG too.",
)
@common_options
def command(models: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Show what would go where, without loading it.

    MODEL is a GGUF file, `demo` for the packaged model, `hf:owner/repo:Q4_K_M`, an `https://` URL,
    `ollama:name:tag`, or a shape without any file, `shape:llama-3-70b@Q4_K_M`. Of a model that is
    not on this machine only the header is read.

    It may also be a folder or a Hub repository with safetensors, planned for transformers with
    bitsandbytes: --quantize says what its weights become (of a shape also `@nf4`). Layers go to the
    GPUs; with -ngl N the others stay on the CPU, unquantized.

    Every line of the ledger says where its figure is from: `header` and `engine` are exact,
    `calibrated` was measured here, `bound` is a conservative bound. Exit code 3: nothing fits.

    With --workload batch and --sequences the placement is the one that finishes the most requests
    per hour; `loadmaster batch plan FILE` chooses the sequences too, from a file of requests.

    With --compare, MODEL may be given several times and may be a folder or a repository: each of
    its files is planned, with a 16-bit and a q8_0 cache; of safetensors each of none, int8 and nf4.
    """
    options = _with_workload(read_plan_options(given), given)
    if given["comparing"]:
        _compare(models, options, given, as_json=as_json, quiet=quiet)
        return
    _refuse_comparing(models, given)
    planner = Planner(models[0], options, header_only=True).of_its_kind()
    plan = require_plan(planner.plan())
    if as_json:
        click.echo(json.dumps(plan_to_json(plan), ensure_ascii=False, indent=1))
        return
    click.echo(render.plan_text(plan))


def _with_workload(options: PlanOptions, given: dict[str, Any]) -> PlanOptions:
    """The workload's options; several sequences are served, unless the job is named."""
    several = (given["n_sequences"] or 1) > 1
    changes = {
        "kind": given["workload"] or ("serve" if several else "chat"),
        "n_seq_max": given["n_sequences"],
        "n_cells": given["n_cells"],
        "prompt_tokens": given["prompt_tokens"],
        "output_tokens": given["output_tokens"],
        "shared_tokens": given["shared_tokens"],
    }
    asked = {name: value for name, value in changes.items() if value is not None}
    workload = replace(options.workload, **asked)
    if workload.shared_tokens >= workload.prompt_tokens:
        raise UsageError(
            f"{workload.shared_tokens} shared tokens leave nothing of a prompt of "
            f"{workload.prompt_tokens}",
            hint="`--prompt-tokens` counts the shared ones too",
        )
    return replace(options, workload=workload)


def _compare(
    models: tuple[str, ...],
    options: PlanOptions,
    given: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from loadmaster.interfaces.cli import compare

    limits = Limits(
        goal=given["goal"] or "quality", min_speed=given["min_speed"], max_kl=given["max_kl"]
    )
    compare.run(models, options, limits, plot=given["plot"], as_json=as_json, quiet=quiet)


def _refuse_comparing(models: tuple[str, ...], given: dict[str, Any]) -> None:
    """Options of a comparison, or several models, without `--compare`."""
    if len(models) > 1:
        raise UsageError(
            f"{len(models)} models, and a plan is of one",
            hint="`--compare` plans them side by side",
        )
    for name in ("goal", "min_speed", "max_kl", "plot"):
        if given[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"`{flag}` chooses between plans", hint=f"`--compare {flag} …` makes them"
            )
