"""llama-server's own form of an answer, which editors read."""

from loadmaster.engine.types import DoneEvent, TextEvent
from loadmaster.interfaces.http.errors import as_ours
from loadmaster.interfaces.http.streams import EVENT_STREAM, PING, sse
from loadmaster.interfaces.http.writing import Start, dumps
from loadmaster.tasks.api import openai_answers as answers
from loadmaster.tasks.api.openai_answers import Body, Gathering
from loadmaster.tasks.serving.answer import PartEvent

_STOP_TYPES = {"stop": "eos", "length": "limit"}


class EditorWriter:
    """`content` as it comes; the last object has `stop` and the figures. There is no `[DONE]`."""

    media_type = EVENT_STREAM
    ping: bytes | None = PING

    def __init__(self) -> None:
        self._model = ""

    def begin(self, start: Start) -> bytes:
        """Nothing comes before the text."""
        self._model = start.model
        return b""

    def part(self, item: PartEvent) -> bytes:
        """A piece of text, or the end."""
        event = item.event
        if isinstance(event, TextEvent):
            return sse(dumps({"index": item.part, "content": event.text, "stop": False}))
        if isinstance(event, DoneEvent):
            return sse(dumps(_final(self._model, item.part, "", event)))
        return b""

    def end(self, dones: list[DoneEvent]) -> bytes:
        """The last object was the end."""
        return b""

    def failed(self, error: Exception) -> bytes:
        """An error event."""
        return sse(dumps(answers.error_body(as_ours(error))))

    def whole(self, model: str, parts: list[Gathering], dones: list[DoneEvent]) -> object:
        """One object, or a list where several prompts or choices were asked for."""
        bodies = [_final(model, part.index, part.text, part.done) for part in parts if part.done]
        return bodies[0] if len(bodies) == 1 else bodies


def _final(model: str, index: int, text: str, done: DoneEvent) -> Body:
    return {
        "index": index,
        "content": text,
        "stop": True,
        "stop_type": _STOP_TYPES.get(done.finish_reason, "none"),
        "model": model,
        "tokens_predicted": done.n_generated,
        "tokens_evaluated": done.n_prompt,
        "tokens_cached": done.n_cached,
        "truncated": False,
        "timings": timings(done),
    }


def timings(done: DoneEvent) -> Body:
    """llama.cpp's figures of one request."""
    n_read = done.n_prompt - done.n_cached
    return {
        "prompt_n": n_read,
        "prompt_ms": done.prefill_s * 1e3,
        "prompt_per_second": n_read / done.prefill_s if done.prefill_s else 0.0,
        "predicted_n": done.n_generated,
        "predicted_ms": done.decode_s * 1e3,
        "predicted_per_second": done.n_generated / done.decode_s if done.decode_s else 0.0,
    }
