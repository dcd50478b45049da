"""What every API's writer is: how an answer is put into bytes, streamed or whole."""

import json
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response

from loadmaster.engine.types import DoneEvent
from loadmaster.tasks.api.openai_answers import Gathering
from loadmaster.tasks.serving.answer import PartEvent


def dumps(value: object) -> bytes:
    """Compact JSON; a NaN is a defect of ours."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", errors="backslashreplace"
    )


def json_response(value: object, status: int = 200) -> Response:
    """Compact JSON."""
    return Response(dumps(value), status_code=status, media_type="application/json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What is known before the first token."""

    model: str
    n_parts: int
    n_prompt: int  # tokens of all prompts


class Writer(Protocol):
    """How one API writes an answer. One writer is for one answer."""

    media_type: str
    ping: bytes | None

    def begin(self, start: Start) -> bytes:
        """What comes before any text."""

    def part(self, item: PartEvent) -> bytes:
        """Text, or the end of a choice."""

    def end(self, dones: list[DoneEvent]) -> bytes:
        """What comes last."""

    def failed(self, error: Exception) -> bytes:
        """The last of a stream that cannot go on."""

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> object:
        """The body of an answer that is not streamed."""
