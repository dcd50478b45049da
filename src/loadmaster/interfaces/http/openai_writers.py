"""OpenAI's answers, streamed and whole: chat and completions."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from loadmaster.engine.types import DoneEvent, TextEvent
from loadmaster.interfaces.http.errors import as_ours
from loadmaster.interfaces.http.streams import EVENT_STREAM, PING, sse
from loadmaster.interfaces.http.writing import Start, dumps
from loadmaster.tasks.api import openai_answers as answers
from loadmaster.tasks.api.answer_reading import (
    AnswerReader,
    Arguments,
    Called,
    Calling,
    NewReader,
    Piece,
    Said,
    Thought,
)
from loadmaster.tasks.api.generation import Generation
from loadmaster.tasks.api.openai_answers import Body, Gathering, Usage, usage_of
from loadmaster.tasks.serving.answer import PartEvent

DONE = b"data: [DONE]\n\n"


class OpenAIWriter:
    """What chat and completions share: ids, chunks, usage, the end."""

    media_type = EVENT_STREAM
    ping: bytes | None = PING

    def __init__(self, generation: Generation, *, chat: bool) -> None:
        self._generation = generation
        self._chat = chat
        self._answer_id = answers.new_id("chatcmpl" if chat else "cmpl")
        self._created = int(time.time())
        self._model = ""

    def end(self, dones: list[DoneEvent]) -> bytes:
        """The usage where asked for, and OpenAI's last line."""
        if not self._generation.include_usage:
            return DONE
        chunk = answers.usage_chunk(
            chat=self._chat,
            answer_id=self._answer_id,
            created=self._created,
            model=self._model,
            usage=self._usage(dones),
        )
        return sse(dumps(chunk)) + DONE

    def failed(self, error: Exception) -> bytes:
        """An error event, and no `[DONE]`: what came before is not a whole answer."""
        return sse(dumps(answers.error_body(as_ours(error))))

    def _usage(self, dones: Sequence[DoneEvent]) -> Usage:
        return usage_of(dones, n_choices=self._generation.n)

    def _logprobs(self, event: TextEvent) -> Any:
        return event.logprobs if self._generation.top_logprobs is not None else None

    def _chunk(self, part: int, extra: Body | None = None, **fields: Any) -> bytes:
        make: Any = answers.chat_chunk if self._chat else answers.completion_chunk
        chunk = make(
            answer_id=self._answer_id,
            created=self._created,
            model=self._model,
            index=part,
            **fields,
        )
        if extra:
            chunk["choices"][0]["delta"].update(extra)
        return sse(dumps(chunk))


class ChatWriter(OpenAIWriter):
    """`chat.completion`: text, reasoning beside it, and calls of tools."""

    def __init__(self, generation: Generation, reader: NewReader) -> None:
        """`reader` makes one for each choice, once the prompt is made."""
        super().__init__(generation, chat=True)
        self._new_reader = reader
        self._readers: list[AnswerReader] = []

    def begin(self, start: Start) -> bytes:
        """The role of each choice."""
        self._model = start.model
        self._readers = [self._new_reader(in_pieces=True) for _ in range(start.n_parts)]
        return b"".join(
            self._chunk(part, role="assistant", text="") for part in range(start.n_parts)
        )

    def part(self, item: PartEvent) -> bytes:
        """Chunks of what was said, thought or called; at the end of a choice, why it ended."""
        event = item.event
        if isinstance(event, TextEvent):
            pieces = self._readers[item.part].feed(event.text)
            return self._pieces(item.part, pieces, self._logprobs(event))
        if isinstance(event, DoneEvent):
            reader = self._readers[item.part]
            rest = self._pieces(item.part, reader.end(), None)
            reason = finish_reason(event.finish_reason, reader.n_calls)
            return rest + self._last(item.part, reason)
        return b""

    def _last(self, part: int, reason: str) -> bytes:
        return self._chunk(part, finish_reason=reason)

    def _pieces(self, part: int, pieces: Iterable[Piece], logprobs: Any) -> bytes:
        written = []
        for piece in pieces:
            if not isinstance(piece, Called):  # its arguments have been told
                written.append(self._piece(part, piece, logprobs))
                logprobs = None  # of all tokens of the event: with its first piece
        if not written and logprobs:
            written.append(self._chunk(part, logprobs=logprobs))
        return b"".join(written)

    def _piece(self, part: int, piece: Piece, logprobs: Any) -> bytes:
        """A call's id and name come once, then its arguments: clients join every name they see."""
        match piece:
            case Said(text=text):
                return self._chunk(part, text=text, logprobs=logprobs)
            case Thought(text=text):
                return self._chunk(part, {"reasoning_content": text}, logprobs=logprobs)
            case Calling():
                function = {"name": piece.name, "arguments": ""}
                call: Body = {"id": piece.id, "type": "function", "function": function}
            case Arguments(text=text):
                call = {"function": {"arguments": text}}
            case Called():
                return b""
        call = {"index": self._readers[part].n_calls - 1, **call}
        return self._chunk(part, {"tool_calls": [call]}, logprobs=logprobs)

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> Body:
        """The body of an answer that is not streamed."""
        body = answers.chat_completion(
            answer_id=self._answer_id,
            created=self._created,
            model=model,
            choices=[part.choice() for part in parts],
            usage=self._usage(dones),
        )
        for choice, part in zip(body["choices"], parts, strict=True):
            reader = self._new_reader()
            choice["message"].update(message_of([*reader.feed(part.text), *reader.end()]))
            choice["finish_reason"] = finish_reason(choice["finish_reason"], reader.n_calls)
        return body


class FillWriter(ChatWriter):
    """Mistral's fill-in-the-middle: every delta has a `content`, which editors join unseen."""

    def _last(self, part: int, reason: str) -> bytes:
        return self._chunk(part, text="", finish_reason=reason)


def message_of(pieces: Iterable[Piece]) -> Body:
    """The fields of a message from what was read."""
    found = list(pieces)
    said = "".join(piece.text for piece in found if isinstance(piece, Said))
    thought = "".join(piece.text for piece in found if isinstance(piece, Thought))
    calls = [
        {
            "id": piece.id,
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }
        for piece in found
        if isinstance(piece, Called)
    ]
    message: Body = {"content": said if said or not calls else None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def finish_reason(reason: str, n_calls: int) -> str:
    """`tool_calls` where the answer is one; a call that was cut is `length` like any text."""
    return "tool_calls" if n_calls and reason == "stop" else reason


class CompletionWriter(OpenAIWriter):
    """`text_completion`: text alone."""

    def __init__(self, generation: Generation, echoed: Sequence[str] = ()) -> None:
        """`echoed`: the text that goes before each choice's own, prompt by prompt."""
        super().__init__(generation, chat=False)
        self._echoed = echoed

    def begin(self, start: Start) -> bytes:
        """The echoed prompts."""
        self._model = start.model
        echoes = [(part, self._echo(part)) for part in range(start.n_parts)]
        return b"".join(self._chunk(part, text=echo) for part, echo in echoes if echo)

    def part(self, item: PartEvent) -> bytes:
        """A chunk of text, or the chunk that says why a choice ended."""
        event = item.event
        if isinstance(event, TextEvent):
            return self._chunk(item.part, text=event.text, logprobs=self._logprobs(event))
        if isinstance(event, DoneEvent):
            return self._chunk(item.part, finish_reason=event.finish_reason)
        return b""

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> Body:
        """The body of an answer that is not streamed."""
        choices = [part.choice() for part in parts]
        return answers.completion(
            answer_id=self._answer_id,
            created=self._created,
            model=model,
            choices=[replace(c, text=self._echo(c.index) + c.text) for c in choices],
            usage=self._usage(dones),
        )

    def _echo(self, part: int) -> str:
        return self._echoed[part // self._generation.n] if self._echoed else ""
