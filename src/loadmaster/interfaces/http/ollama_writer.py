"""Ollama's answers: objects in lines, durations in nanoseconds."""

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from loadmaster.engine.types import DoneEvent, TextEvent
from loadmaster.interfaces.http.errors import as_ours, body_for
from loadmaster.interfaces.http.streams import NDJSON
from loadmaster.interfaces.http.writing import Start, dumps
from loadmaster.tasks.api.answer_reading import (
    AnswerReader,
    Called,
    NewReader,
    Piece,
    Said,
    Thought,
)
from loadmaster.tasks.api.openai_answers import Body, Gathering
from loadmaster.tasks.serving.answer import PartEvent

_NS = 1_000_000_000


def stamp(seconds: float) -> str:
    """A time as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class OllamaWriter:
    """`message` of a chat, or `response` of a completion."""

    media_type = NDJSON
    ping: bytes | None = None  # lines have no comments

    def __init__(self, reader: NewReader | None = None) -> None:
        """`reader`: of a chat, once its prompt is made; None: a completion, text alone."""
        self._new_reader = reader
        self._reader = AnswerReader()
        self._model = ""
        self._started_s = time.monotonic()

    def begin(self, start: Start) -> bytes:
        """Nothing comes before the text."""
        self._model = start.model
        if self._new_reader is not None:
            self._reader = self._new_reader()
        return b""

    def part(self, item: PartEvent) -> bytes:
        """A line of text, or the last line with its figures."""
        event = item.event
        if isinstance(event, TextEvent):
            return self._lines(event.text)
        if isinstance(event, DoneEvent):
            rest = self._pieces(self._reader.end()) if self._new_reader else b""
            return rest + dumps(self._last(self._said(""), event)) + b"\n"
        return b""

    def end(self, dones: list[DoneEvent]) -> bytes:
        """The last line was the end."""
        return b""

    def failed(self, error: Exception) -> bytes:
        """An error in a line of its own."""
        return dumps(body_for(as_ours(error), "/api/")) + b"\n"

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> Body:
        """One object."""
        self._model = model
        if self._new_reader is None:
            return self._last({"response": parts[0].text}, dones[0])
        reader = self._new_reader()
        pieces = [*reader.feed(parts[0].text), *reader.end()]
        return self._last({"message": message_of(pieces)}, dones[0])

    def _lines(self, text: str) -> bytes:
        if self._new_reader is None:
            return dumps(self._line(self._said(text))) + b"\n"
        return self._pieces(self._reader.feed(text))

    def _pieces(self, pieces: Iterable[Piece]) -> bytes:
        lines = (self._line({"message": message_of([piece])}) for piece in pieces)
        return b"".join(dumps(line) + b"\n" for line in lines)

    def _said(self, text: str) -> Body:
        if self._new_reader is None:
            return {"response": text}
        return {"message": {"role": "assistant", "content": text}}

    def _line(self, said: Body) -> Body:
        return {
            "model": self._model,
            "created_at": stamp(time.time()),
            **said,
            "done": False,
        }

    def _last(self, said: Body, done: DoneEvent) -> Body:
        total_s = time.monotonic() - self._started_s
        return {
            **self._line(said),
            "done": True,
            "done_reason": done.finish_reason,
            "total_duration": int(total_s * _NS),
            "load_duration": int(max(0.0, total_s - done.prefill_s - done.decode_s) * _NS),
            "prompt_eval_count": done.n_prompt,
            "prompt_eval_duration": int(done.prefill_s * _NS),
            "eval_count": done.n_generated,
            "eval_duration": int(done.decode_s * _NS),
        }


def message_of(pieces: Iterable[Piece]) -> Body:
    """A message; the arguments of a call are an object here."""
    found = list(pieces)
    message: Body = {
        "role": "assistant",
        "content": "".join(piece.text for piece in found if isinstance(piece, Said)),
    }
    thought = "".join(piece.text for piece in found if isinstance(piece, Thought))
    if thought:
        message["thinking"] = thought
    calls = [piece for piece in found if isinstance(piece, Called)]
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in calls
        ]
    return message
