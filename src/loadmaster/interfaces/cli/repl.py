"""The chat's read-eval-print loop: messages go to the model, lines with a slash are commands."""

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from loadmaster.errors import EngineError, LoadmasterError, UsageError
from loadmaster.interfaces.cli import render, settings
from loadmaster.interfaces.cli.answer import Answer, stream
from loadmaster.interfaces.cli.failure import describe
from loadmaster.interfaces.cli.lines import ReadLine, read_message
from loadmaster.tasks.chat import Chat
from loadmaster.tasks.progress import Progress

Reopen = Callable[[Chat, int], None]  # plan and open the model again with another n_ctx

HELP = {
    "/set KEY VALUE": "change " + ", ".join(settings.KEYS) + "; `/set KEY` alone resets it",
    "/show": "the settings and the messages so far",
    "/plan": "what lies where, and why",
    "/mem": "planned memory beside measured",
    "/stats": "figures of the last answer, and how full n_ctx is",
    "/save FILE": "keep the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    "/drop N": "forget the N oldest turns",
    "/clear": "forget all messages",
    "/help": "this list",
    "/bye": "leave (Ctrl-D does too)",
}
_SYNONYMS = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}


class Repl:
    """Reads until the end of input. Errors of one message are told and survived; a dead engine
    ends the loop."""

    def __init__(
        self,
        chat: Chat,
        *,
        read_line: ReadLine,
        reopen: Reopen,
        progress: Progress,
        as_json: bool = False,
        quiet: bool = False,
    ) -> None:
        self._chat = chat
        self._read_line = read_line
        self._reopen = reopen
        self._progress = progress
        self._as_json = as_json
        self._quiet = quiet
        self._commands: dict[str, Callable[[str], None]] = {
            "/set": self._set,
            "/show": self._show,
            "/plan": self._plan,
            "/mem": self._memory,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
            "/drop": self._drop,
            "/clear": self._clear,
            "/help": self._help,
        }

    def run(self) -> None:
        """Until `/bye`, Ctrl-D or the end of the pipe.

        Raises:
            EngineError: the engine is of no more use.
        """
        while True:
            try:
                message = read_message(self._read_line)
                if message.strip() in ("/bye", "/exit", "/quit"):
                    return
                self._handle(message)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("(Ctrl-D or /bye leaves)")

    def _handle(self, message: str) -> None:
        try:
            if message.startswith("/") and "\n" not in message:
                self._command(message)
            elif message.strip():
                self._ask(message)
        except EngineError:
            raise
        except (LoadmasterError, OSError) as error:
            self._fail(error)

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        name = _SYNONYMS.get(name, name)
        if name not in self._commands:
            close = difflib.get_close_matches(name, [*self._commands, "/bye"], n=1)
            raise UsageError(
                f"`{name}` is not a command",
                hint=f"did you mean `{close[0]}`?" if close else "`/help` lists the commands",
            )
        self._commands[name](rest.strip())

    def _ask(self, message: str) -> None:
        answer = stream(
            self._chat.ask(message, self._progress),
            on_interrupt=self._chat.session.cancel,
            show=not self._as_json,
        )
        if self._as_json:
            predicted = self._chat.session.plan.predicted
            self._print(json.dumps(answer.to_json(predicted), ensure_ascii=False))
        self._explain_end(answer)

    def _explain_end(self, answer: Answer) -> None:
        done = answer.done
        if answer.finish_reason == "cancelled":
            self._say("(stopped)")
        elif done and self._chat.is_full(done):
            self._say(
                f"(the answer stopped because n_ctx {self._chat.session.n_ctx} is full: "
                f"{done.n_prompt} tokens of prompt and {done.n_generated} of answer)\n"
                "hint: `/set ctx N` opens the model again with more room, `/drop N` forgets the "
                "oldest turns, `/clear` all of them"
            )
        elif answer.finish_reason == "length":
            self._say(f"(stopped at max_tokens {self._chat.conversation.settings.max_tokens})")

    def _set(self, rest: str) -> None:
        key, _, value = rest.partition(" ")
        if key in settings.N_CTX_KEYS:
            self._reopen(self._chat, settings.parse_n_ctx(value))
            self._say(f"n_ctx is {self._chat.session.n_ctx}; the conversation goes on")
            return
        conversation = self._chat.conversation
        conversation.settings = settings.changed(conversation.settings, key, value.strip())

    def _show(self, _: str) -> None:
        self._print(settings.text(self._chat.conversation.settings))
        for message in self._chat.conversation.messages:
            self._print(f"{message.role}: {message.content}")

    def _plan(self, _: str) -> None:
        self._print(render.plan_text(self._chat.session.plan))

    def _memory(self, _: str) -> None:
        self._print(render.memory_table(self._chat.session.memory()))

    def _stats(self, _: str) -> None:
        session, last = self._chat.session, self._chat.last
        used = len(self._chat.prompt_tokens()) if self._chat.conversation.messages else 0
        if last is not None:
            self._print(render.done_line(last, session.plan.predicted))
        self._print(f"the conversation has {used} of {session.n_ctx} tokens")

    def _save(self, rest: str) -> None:
        file = _file(rest, "/save")
        self._chat.conversation.save(file)
        self._say(f"saved {len(self._chat.conversation.messages)} messages to {file}")

    def _load(self, rest: str) -> None:
        file = _file(rest, "/load")
        self._chat.conversation.load(file)
        self._say(f"{len(self._chat.conversation.messages)} messages from {file}")

    def _drop(self, rest: str) -> None:
        if not rest.isdigit():
            raise UsageError(f"`/drop {rest}` needs a number of turns", hint="`/drop 1`")
        self._say(f"forgot {self._chat.conversation.drop(int(rest))} messages")

    def _clear(self, _: str) -> None:
        n_messages = len(self._chat.conversation.messages)
        self._chat.conversation.clear()
        self._say(f"forgot {n_messages} messages")

    def _help(self, _: str) -> None:
        self._print(render.table(list(HELP.items())))
        self._print('  Alt-Enter, a `\\` at the end of a line or `"""` … `"""` make several lines')

    def _fail(self, error: Exception) -> None:
        failure = describe(error)
        if self._as_json:
            self._print(json.dumps(failure.to_json(), ensure_ascii=False))
        sys.stderr.write(failure.to_text())
        sys.stderr.flush()

    def _print(self, text: str) -> None:
        print(text, flush=True)

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise UsageError(f"`{command}` needs a file name", hint=f"`{command} talk.json`")
    return Path(rest).expanduser()
