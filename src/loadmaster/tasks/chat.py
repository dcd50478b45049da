"""A conversation with an open model: its messages, their tokens, and what happens when they fill
n_ctx. Nothing is ever dropped unless the user says so."""

import json
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from loadmaster.engine.types import DoneEvent, GenerateEvent, SamplingParams, TextEvent
from loadmaster.errors import ContextLengthError, UsageError
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.session import Session
from loadmaster.tasks.template import ChatTemplate, Role

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn's text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """What `/set` changes between answers."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    system: str | None = None
    raw: bool = False  # no chat template: messages are joined as they are
    json_schema: str | None = None  # answers are JSON of this schema


class Conversation:
    """Messages and settings; survives the session, so that a model can be opened again under it."""

    def __init__(self, settings: ChatSettings) -> None:
        self.settings = settings
        self.messages: list[Message] = []

    def clear(self) -> None:
        """Forget all messages; settings stay."""
        self.messages.clear()

    def drop(self, n_turns: int) -> int:
        """Forget the oldest turns (a user message and its answer); how many messages that was.

        Raises:
            UsageError: there are fewer turns.
        """
        starts = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not 1 <= n_turns <= len(starts):
            raise UsageError(
                f"there are {len(starts)} turns, not {n_turns}", hint="`/clear` drops all of them"
            )
        end = starts[n_turns] if n_turns < len(starts) else len(self.messages)
        del self.messages[:end]
        return end

    def with_system(self, extra: Message | None = None) -> list[dict[str, str]]:
        """What the template gets: system message, messages, and `extra`."""
        turns = [*self.messages, *([extra] if extra else [])]
        if self.settings.system:
            turns.insert(0, Message(role="system", content=self.settings.system))
        return [{"role": m.role, "content": m.content} for m in turns]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, readable by its owner alone."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "system": self.settings.system,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take the messages and the system prompt of a saved conversation; all or nothing.

        Raises:
            UsageError: the file is no saved conversation.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"`{path}` is not a saved conversation: {error}") from error
        messages, system = _read_saved(value, path)
        self.messages[:] = messages
        self.settings = replace(self.settings, system=system)


def _read_saved(value: Any, path: Path) -> tuple[list[Message], str | None]:
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"`{path}` is not a saved conversation of version {SCHEMA_VERSION}")
    unknown = value.keys() - {"schema_version", "system", "messages"}
    system = value.get("system")
    items = value.get("messages")
    if unknown or not isinstance(items, list) or not isinstance(system, str | None):
        raise UsageError(f"`{path}` is not a saved conversation: {sorted(unknown) or 'messages'}")
    return [_read_message(item, f"{path}: messages[{i}]") for i, item in enumerate(items)], system


def _read_message(item: Any, place: str) -> Message:
    if (
        not isinstance(item, dict)
        or set(item) != {"role", "content"}
        or item["role"] not in get_args(Role)
        or not isinstance(item["content"], str)
    ):
        raise UsageError(f"`{place}` is not a message with a role and a content")
    return Message(role=item["role"], content=item["content"])


class Chat:
    """A conversation, the session that answers and the template between them."""

    def __init__(
        self, session: Session, template: ChatTemplate, conversation: Conversation
    ) -> None:
        self.session = session
        self.template = template
        self.conversation = conversation
        self.last: DoneEvent | None = None  # figures of the last answer, for `/stats`

    def prompt_tokens(self, text: str | None = None) -> tuple[int, ...]:
        """The tokens of the conversation with `text` as the next user message."""
        extra = None if text is None else Message(role="user", content=text)
        return self.session.tokens(self._prompt(extra))

    def _prompt(self, extra: Message | None) -> str:
        messages = self.conversation.with_system(extra)
        if self.conversation.settings.raw:
            return "".join(message["content"] for message in messages)
        loaded = self.session.loaded
        return self.template.render(messages, bos_text=loaded.bos_text, eos_text=loaded.eos_text)

    def ask(
        self, text: str, progress: Progress | None = None
    ) -> Generator[GenerateEvent, None, None]:
        """Stream the answer to `text`. Both join the conversation once the answer has begun, as
        far as it came; a message that does not fit joins nothing.

        Raises:
            ContextLengthError: the conversation with `text` does not fit in n_ctx.
        """
        tokens = self.prompt_tokens(text)
        if len(tokens) >= self.session.n_ctx:
            raise self._too_long(len(tokens))
        return self._answer(text, tokens, progress)

    def _answer(
        self, text: str, tokens: tuple[int, ...], progress: Progress | None
    ) -> Generator[GenerateEvent, None, None]:
        settings = self.conversation.settings
        events = self.session.generate(
            tokens,
            sampling=settings.sampling,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            json_schema=settings.json_schema,
            progress=progress,
        )
        parts: list[str] = []
        try:
            for event in events:
                if isinstance(event, TextEvent):
                    parts.append(event.text)
                elif isinstance(event, DoneEvent):
                    self.last = event
                yield event
        finally:
            events.close()
            if parts:
                self.conversation.messages += [
                    Message(role="user", content=text),
                    Message(role="assistant", content="".join(parts)),
                ]

    def _too_long(self, n_prompt: int) -> ContextLengthError:
        n_ctx = self.session.n_ctx
        return ContextLengthError(
            f"the conversation with this message has {n_prompt} tokens, n_ctx is {n_ctx}; "
            "nothing was sent or dropped",
            hint=f"`/set ctx {_next_n_ctx(n_prompt)}` opens the model again with more room, "
            "`/drop 1` forgets the oldest turn, `/clear` all of them",
            numbers={"n_prompt": n_prompt, "n_ctx": n_ctx},
        )

    def is_full(self, done: DoneEvent) -> bool:
        """Whether an answer ended because n_ctx is full, not because of `max_tokens`."""
        used = done.n_prompt + done.n_generated
        return done.finish_reason == "length" and used >= self.session.n_ctx - 1


def _next_n_ctx(n_prompt: int) -> int:
    """Room for the conversation and half as much again, in the engine's steps of 256."""
    return -(-(n_prompt * 3 // 2) // 256) * 256
