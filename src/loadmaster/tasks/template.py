"""The model's chat template: messages in, prompt text out, by a confined child process.

A child, because neither a thread nor an alarm can stop `'a' * 10**9` inside one C call. It starts
while the model loads (about 0.1 s) and stays, so a render costs about 1 ms.
"""

import json
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from loadmaster.errors import DamagedFileError, LoadmasterError, UsageError
from loadmaster.tasks.line_child import LineChild

Role = Literal["system", "user", "assistant"]
ChatMessage = Mapping[str, Any]  # `role` and `content`; a server's also `tool_calls`

TEMPLATE_LIMIT_BYTES = 256_000
OUTPUT_LIMIT_CHARS = 8_000_000
CPU_LIMIT_S = 2.0
WALL_LIMIT_S = 30.0  # a stopped or starved child; CPU time is limited by the child's own timer

_RAW_HINT = "`--raw` sends the prompt without a chat template"


def chatml(messages: Sequence[ChatMessage]) -> str:
    """The format for models that bring no template of their own."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


class ChatTemplate:
    """Renders conversations with a model's own template, or ChatML when it has none.

    Use as a context manager, or call `close`: a child process may be running.
    """

    def __init__(self, source: str | None, *, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._source = source
        self._cpu_limit_s = cpu_limit_s
        self._child = LineChild("loadmaster.tasks.template_worker")
        if source is None:
            return
        n_bytes = len(source.encode())
        if n_bytes > TEMPLATE_LIMIT_BYTES:
            raise _bad_template(f"it has {n_bytes} bytes, the limit is {TEMPLATE_LIMIT_BYTES}")
        self._child.start()

    @property
    def is_fallback(self) -> bool:
        """Whether the model brings no template, so that ChatML is used."""
        return self._source is None

    @property
    def pid(self) -> int | None:
        """The child, whose memory belongs to the budget too."""
        return self._child.pid

    @property
    def takes_tools(self) -> bool:
        """Whether the template does something with `tools`."""
        return self._source is not None and "tools" in self._source

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        bos_text: str = "",
        eos_text: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that asks for the next assistant turn.

        Raises:
            UsageError: the template refuses this conversation (say, a system message).
            DamagedFileError: the template is broken, or goes beyond its limits.
        """
        if self._source is None:
            return chatml(messages)
        variables = {
            "messages": list(map(dict, messages)),
            "bos_token": bos_text,
            "eos_token": eos_text,
            "add_generation_prompt": True,
            "tools": None if tools is None else list(map(dict, tools)),
        }
        request = {
            "template": self._source,
            "variables": variables,
            "cpu_s": self._cpu_limit_s,
            "output_limit": OUTPUT_LIMIT_CHARS,
        }
        return _text(self._ask(json.dumps(request).encode() + b"\n"))

    def close(self) -> None:
        """Stop the child; a later render starts a new one."""
        self._child.close()

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: bytes) -> dict[str, str]:
        line = self._child.ask(request, WALL_LIMIT_S)
        if line is None:
            raise _bad_template(self._cause(self._child.status))
        reply: dict[str, str] = json.loads(line)
        return reply

    def _cause(self, status: int) -> str:
        """Why there is no reply: its own timer, our patience, or something that ended it."""
        if status == -signal.SIGPROF:
            return f"it takes more than {self._cpu_limit_s:g} s to render"
        if status == -signal.SIGKILL:
            return f"it takes more than {WALL_LIMIT_S:g} s to render, or more memory than there is"
        return f"the process that renders it ended with status {status}"


def _text(reply: dict[str, str]) -> str:
    if "text" in reply:
        return reply["text"]
    if "refused" in reply:
        raise _refusal(reply["refused"])
    raise _bad_template(reply["failed"])


def _refusal(reason: str) -> LoadmasterError:
    about_system = "system" in reason.lower()
    return UsageError(
        f"the model's chat template refuses this conversation: {reason}",
        hint="leave out `--system` (`/set system` in the chat)" if about_system else _RAW_HINT,
    )


def _bad_template(reason: str) -> LoadmasterError:
    return DamagedFileError(
        f"the model's chat template cannot be used: {reason}", code="bad_template", hint=_RAW_HINT
    )
