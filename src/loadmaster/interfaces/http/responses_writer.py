"""OpenAI's `response`: items of reasoning, text and calls, streamed as named events."""

import time
import uuid
from collections.abc import Iterable

from loadmaster.engine.types import DoneEvent, TextEvent
from loadmaster.interfaces.http.errors import as_ours
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
from loadmaster.tasks.api.openai_answers import Body, Gathering, error_body
from loadmaster.tasks.serving.answer import PartEvent

_ARGUMENTS = "response.function_call_arguments"


class ResponsesWriter:
    """Items are opened, filled and closed; every event has a number."""

    media_type = EVENT_STREAM
    ping: bytes | None = PING

    def __init__(self, reader: NewReader, asked: Body) -> None:
        """`asked` is the body, parts of which a response repeats."""
        self._new_reader = reader
        self._reader = AnswerReader()
        self._asked = asked
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = ""
        self._items: list[Body] = []
        self._kind: type[Piece] | None = None  # of the item that is open
        self._number = 0

    def begin(self, start: Start) -> bytes:
        """The response without its items."""
        self._model = start.model
        self._reader = self._new_reader(in_pieces=True)
        response = self._response("in_progress", None)
        return self._event("response.created", {"response": response}) + self._event(
            "response.in_progress", {"response": response}
        )

    def part(self, item: PartEvent) -> bytes:
        """What was said since; at the end, the whole response."""
        event = item.event
        if isinstance(event, TextEvent):
            return self._pieces(self._reader.feed(event.text))
        if isinstance(event, DoneEvent):
            rest = self._pieces(self._reader.end()) + self._close()
            response = self._response(_status(event), event)
            return rest + self._event(f"response.{_status(event)}", {"response": response})
        return b""

    def end(self, dones: list[DoneEvent]) -> bytes:
        """The whole response was the last event."""
        return b""

    def failed(self, error: Exception) -> bytes:
        """A response that failed, and why."""
        inner = error_body(as_ours(error))["error"]
        response = self._response("failed", None)
        response["error"] = {"code": inner["code"], "message": inner["message"]}
        return self._event("response.failed", {"response": response})

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> Body:
        """The response, finished."""
        self._model = model
        self._reader = self._new_reader()
        self._pieces([*self._reader.feed(parts[0].text), *self._reader.end()])
        self._close()
        return self._response(_status(dones[0]), dones[0])

    def _response(self, status: str, done: DoneEvent | None) -> Body:
        cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": list(self._items),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self._asked.get("instructions"),
            "metadata": self._asked.get("metadata") or {},
            "parallel_tool_calls": True,
            "temperature": self._asked.get("temperature"),
            "top_p": self._asked.get("top_p"),
            "tool_choice": self._asked.get("tool_choice") or "auto",
            "tools": self._asked.get("tools") or [],
            "max_output_tokens": self._asked.get("max_output_tokens"),
            "usage": _usage(done) if done else None,
        }

    def _pieces(self, pieces: Iterable[Piece]) -> bytes:
        return b"".join(self._piece(piece) for piece in pieces)

    def _piece(self, piece: Piece) -> bytes:
        match piece:
            case Calling():
                return self._close() + self._open_call(piece)
            case Arguments(text=text):
                self._items[-1]["arguments"] += text
                return self._event(f"{_ARGUMENTS}.delta", {**self._place(), "delta": text})
            case Called():
                return self._called(piece)
        opened = b"" if self._kind is type(piece) else self._close() + self._open(type(piece))
        content = self._items[-1]["content"][0]
        content["text"] += piece.text
        kind = "output_text" if isinstance(piece, Said) else "reasoning_text"
        fields = {**self._place(), "content_index": 0, "delta": piece.text}
        return opened + self._event(f"response.{kind}.delta", fields)

    def _open(self, kind: type[Piece]) -> bytes:
        self._kind = kind
        if kind is Thought:
            item: Body = {"id": _new("rs"), "type": "reasoning", "summary": []}
            content: Body = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": _new("msg"), "type": "message", "role": "assistant"}
            content = {"type": "output_text", "text": "", "annotations": []}
        self._items.append({**item, "status": "in_progress", "content": [dict(content)]})
        added = {"output_index": len(self._items) - 1, "item": {**self._items[-1], "content": []}}
        return self._event("response.output_item.added", added) + self._event(
            "response.content_part.added", {**self._place(), "content_index": 0, "part": content}
        )

    def _close(self) -> bytes:
        if self._kind is None:
            return b""
        if self._kind is Calling:
            return self._end_call("incomplete")
        kind = "output_text" if self._kind is Said else "reasoning_text"
        self._kind = None
        item = self._items[-1]
        item["status"] = "completed"
        (content,) = item["content"]
        place = {**self._place(), "content_index": 0}
        return (
            self._event(f"response.{kind}.done", {**place, "text": content["text"]})
            + self._event("response.content_part.done", {**place, "part": content})
            + self._event("response.output_item.done", self._item())
        )

    def _open_call(self, call: Calling) -> bytes:
        self._kind = Calling
        item = {
            "id": _new("fc"),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        return self._event("response.output_item.added", self._item())

    def _called(self, call: Called) -> bytes:
        """The end of a call; all of it, where it is not streamed."""
        opened = b""
        if self._kind is not Calling:
            opened = self._close() + self._open_call(Calling(id=call.id, name=call.name))
        self._items[-1]["arguments"] = call.arguments
        return opened + self._end_call("completed")

    def _end_call(self, status: str) -> bytes:
        self._kind = None
        item = self._items[-1]
        item["status"] = status
        told = {"name": item["name"], "arguments": item["arguments"]}
        return self._event(f"{_ARGUMENTS}.done", {**self._place(), **told}) + self._event(
            "response.output_item.done", self._item()
        )

    def _place(self) -> Body:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _item(self) -> Body:
        return {"output_index": len(self._items) - 1, "item": dict(self._items[-1])}

    def _event(self, kind: str, fields: Body) -> bytes:
        self._number += 1
        return sse(dumps({"type": kind, "sequence_number": self._number - 1, **fields}), kind)


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _status(done: DoneEvent) -> str:
    return "incomplete" if done.finish_reason == "length" else "completed"


def _usage(done: DoneEvent) -> Body:
    return {
        "input_tokens": done.n_prompt,
        "input_tokens_details": {"cached_tokens": done.n_cached},
        "output_tokens": done.n_generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.n_prompt + done.n_generated,
    }
