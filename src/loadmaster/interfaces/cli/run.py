"""`loadmaster run`: one prompt in, one answer out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loadmaster.errors import UsageError
from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.answer import Answer, stream
from loadmaster.interfaces.cli.failure import INTERRUPTED_EXIT_CODE
from loadmaster.interfaces.cli.options import (
    common_options,
    plan_options,
    read_plan_options,
    read_sampling,
    sampling_options,
)
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.interfaces.cli.text import read_json_schema, read_prompt
from loadmaster.plan.codec import plan_to_json
from loadmaster.schema import to_json
from loadmaster.tasks.chat import Chat, ChatSettings, Conversation
from loadmaster.tasks.measurement import rows_to_json
from loadmaster.tasks.opening import Opened, open_model, open_plan_file


@click.command("run")
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read the prompt, or more of it, from a file.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Run this plan (of `plan --json`) instead of making one.",
)
@click.option(
    "--json-schema",
    "json_schema",
    metavar="FILE|TEXT",
    help="Answer with JSON of this schema: a file, or the schema itself; '{}' is any JSON.",
)
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@sampling_options
@plan_options
@common_options
def command(
    model: str | None,
    prompt: str | None,
    file: Path | None,
    plan_file: Path | None,
    json_schema: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Answer one prompt, inside a memory budget.

    MODEL is a GGUF file, a folder of safetensors, or `demo` for the packaged model. The prompt is
    the argument, the file of `-f` and what is piped in, together. Planned and measured memory go to
    stderr, the answer to stdout.
    """
    if plan_file is not None and prompt is None:
        model, prompt = None, model  # `run --plan FILE PROMPT`: the plan names the model
    if (model is None) == (plan_file is None):
        raise UsageError(
            "give a MODEL or a plan, one of them",
            hint="`loadmaster run demo` or `loadmaster run --plan plan.json`",
        )
    text = read_prompt(prompt, file)
    progress = TerminalProgress(quiet=quiet or as_json)
    schema = None if json_schema is None else read_json_schema(json_schema)
    options = replace(read_plan_options(given), schemas=schema is not None)
    opened = (
        open_plan_file(plan_file, options, progress)
        if plan_file is not None
        else open_model(str(model), options, progress)
    )
    with opened:
        settings = replace(_settings(given), json_schema=schema)
        answer = _answer(opened, text, settings, progress, show=not as_json)
        if as_json:
            click.echo(json.dumps(_to_json(opened, answer, settings), ensure_ascii=False))
        elif answer.done and not quiet:
            predicted = opened.session.plan.predicted
            click.echo(render.done_line(answer.done, predicted) + opened.label, err=True)
    if answer.finish_reason == "cancelled":
        click.get_current_context().exit(INTERRUPTED_EXIT_CODE)


def _settings(given: dict[str, Any]) -> ChatSettings:
    return ChatSettings(
        sampling=read_sampling(given),
        max_tokens=given["max_tokens"],
        stop=given["stop"],
        system=given["system"],
        raw=given["raw"],
    )


def _answer(
    opened: Opened, text: str, settings: ChatSettings, progress: TerminalProgress, *, show: bool
) -> Answer:
    chat = Chat(opened.session, opened.template, Conversation(settings))
    for note in opened.notes(raw=settings.raw):
        progress.say(note)
    if opened.label:
        progress.say(f"note:{opened.label}")
    progress.say(render.memory_table(opened.session.memory()) + "\n")
    answer = stream(chat.ask(text, progress), show=show, on_interrupt=opened.session.cancel)
    if answer.done and chat.is_full(answer.done):
        progress.say(f"note: the answer stopped because n_ctx {opened.session.n_ctx} is full")
    return answer


def _to_json(opened: Opened, answer: Answer, settings: ChatSettings) -> dict[str, object]:
    plan, loaded = opened.session.plan, opened.session.loaded
    return {
        "schema_version": 1,
        "backend": opened.backend,
        **({"attention": loaded.attention} if loaded.attention else {}),
        **answer.to_json(plan.predicted),
        "sampling": to_json(settings.sampling),
        "plan": plan_to_json(plan),
        "memory": rows_to_json(opened.session.memory()),
    }
