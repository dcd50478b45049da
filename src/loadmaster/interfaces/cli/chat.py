"""`loadmaster chat`: a conversation with a model."""

from dataclasses import replace
from typing import Any

import click

from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.lines import line_reader
from loadmaster.interfaces.cli.options import (
    common_options,
    plan_options,
    read_plan_options,
    read_sampling,
    sampling_options,
)
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.interfaces.cli.repl import Repl
from loadmaster.settings import state_folder
from loadmaster.tasks.chat import Chat, ChatSettings, Conversation
from loadmaster.tasks.opening import Opened, open_model


@click.command("chat")
@click.argument("model")
@click.option("--raw", is_flag=True, help="Send messages as they are, without the chat template.")
@sampling_options
@plan_options
@common_options
def command(model: str, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Talk to a model, inside a memory budget.

    MODEL is a GGUF file, a folder of safetensors, or `demo` for the packaged model. `/help` lists
    the commands inside; Ctrl-C stops an answer, Ctrl-D leaves. With piped input every line is a
    message.
    """
    progress = TerminalProgress(quiet=quiet or as_json)
    settings = ChatSettings(
        sampling=read_sampling(given),
        max_tokens=given["max_tokens"],
        stop=given["stop"],
        system=given["system"],
        raw=given["raw"],
    )
    options = replace(read_plan_options(given), line_editor=True)
    with open_model(model, options, progress) as opened:
        _greet(opened, progress, raw=given["raw"])
        chat = Chat(opened.session, opened.template, Conversation(settings))
        Repl(
            chat,
            read_line=line_reader(state_folder() / "chat_history"),
            reopen=lambda chat, n_ctx: opened.reopen(chat, n_ctx, progress),
            progress=progress,
            as_json=as_json,
            quiet=quiet,
        ).run()


def _greet(opened: Opened, progress: TerminalProgress, *, raw: bool) -> None:
    for note in opened.notes(raw=raw):
        progress.say(note)
    progress.say(render.headline(opened.session.plan) + opened.label)
    progress.say("`/help` lists commands, `/mem` shows planned beside measured memory")
