"""Anthropic's answers: a message of blocks, streamed as named events."""

import json
import uuid
from collections.abc import Iterable
from typing import Any

from loadmaster.engine.types import DoneEvent, TextEvent
from loadmaster.interfaces.http.errors import as_ours, body_for
from loadmaster.interfaces.http.streams import EVENT_STREAM, PING, sse
from loadmaster.interfaces.http.writing import Start, dumps
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
from loadmaster.tasks.api.openai_answers import Body, Gathering
from loadmaster.tasks.serving.answer import PartEvent

_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class AnthropicWriter:
    """Blocks of `thinking`, `text` and `tool_use`, each opened, filled and closed."""

    media_type = EVENT_STREAM
    ping: bytes | None = PING

    def __init__(self, reader: NewReader) -> None:
        self._new_reader = reader
        self._reader = AnswerReader()
        self._id = f"msg_{uuid.uuid4().hex}"
        self._n_blocks = 0
        self._open: str | None = None  # the kind of the block that is open

    def begin(self, start: Start) -> bytes:
        """The message without its content."""
        self._reader = self._new_reader(in_pieces=True)
        message = self._message(start.model, [], None, start.n_prompt, 0)
        return _event("message_start", {"message": message})

    def part(self, item: PartEvent) -> bytes:
        """What was said since; at the end, why it ended."""
        event = item.event
        if isinstance(event, TextEvent):
            return self._pieces(self._reader.feed(event.text))
        if isinstance(event, DoneEvent):
            rest = self._pieces(self._reader.end()) + self._close()
            reason = _stop_reason(event, self._reader.n_calls)
            delta = {"stop_reason": reason, "stop_sequence": None}
            usage = {"output_tokens": event.n_generated}
            return rest + _event("message_delta", {"delta": delta, "usage": usage})
        return b""

    def end(self, dones: list[DoneEvent]) -> bytes:
        """The last event."""
        return _event("message_stop", {})

    def failed(self, error: Exception) -> bytes:
        """An error event, and no `message_stop`."""
        return sse(dumps(body_for(as_ours(error), "/v1/messages")), "error")

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> Body:
        """One message."""
        reader, done = self._new_reader(), dones[0]
        pieces = [*reader.feed(parts[0].text), *reader.end()]
        reason = _stop_reason(done, reader.n_calls)
        return self._message(model, blocks_of(pieces), reason, done.n_prompt, done.n_generated)

    def _message(
        self, model: str, content: list[Body], reason: str | None, n_input: int, n_output: int
    ) -> Body:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {"input_tokens": n_input, "output_tokens": n_output},
        }

    def _pieces(self, pieces: Iterable[Piece]) -> bytes:
        return b"".join(self._piece(piece) for piece in pieces)

    def _piece(self, piece: Piece) -> bytes:
        match piece:
            case Said(text=text):
                opened = self._open_block("text", {"type": "text", "text": ""})
                return opened + self._delta({"type": "text_delta", "text": text})
            case Thought(text=text):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                opened = self._open_block("thinking", block)
                return opened + self._delta({"type": "thinking_delta", "thinking": text})
            case Calling():
                closed = self._close()
                call: Body = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                return closed + self._open_block("tool_use", call)
            case Arguments(text=text):
                return self._delta({"type": "input_json_delta", "partial_json": text})
            case Called():
                return self._close()

    def _open_block(self, kind: str, block: Body) -> bytes:
        if self._open == kind:
            return b""
        closed = self._close()
        self._open = kind
        start = {"index": self._n_blocks, "content_block": block}
        return closed + _event("content_block_start", start)

    def _delta(self, delta: Body) -> bytes:
        return _event("content_block_delta", {"index": self._n_blocks, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._n_blocks += 1
        return _event("content_block_stop", {"index": self._n_blocks - 1})


def blocks_of(pieces: Iterable[Piece]) -> list[Body]:
    """The content of a message; texts that follow each other are one block."""
    blocks: list[Body] = []
    for piece in pieces:
        match piece:
            case Said(text=text):
                _append(blocks, "text", "text", text)
            case Thought(text=text):
                _append(blocks, "thinking", "thinking", text)
            case Called():
                arguments: Any = json.loads(piece.arguments)
                blocks.append(
                    {"type": "tool_use", "id": piece.id, "name": piece.name, "input": arguments}
                )
    return blocks


def _append(blocks: list[Body], kind: str, field: str, text: str) -> None:
    if blocks and blocks[-1]["type"] == kind:
        blocks[-1][field] += text
    else:
        extra = {"signature": ""} if kind == "thinking" else {}
        blocks.append({"type": kind, field: text, **extra})


def _stop_reason(done: DoneEvent, n_calls: int) -> str:
    reason = _REASONS.get(done.finish_reason, "end_turn")
    return "tool_use" if n_calls and reason == "end_turn" else reason


def _event(kind: str, fields: Body) -> bytes:
    return sse(dumps({"type": kind, **fields}), kind)
