"""Stream one answer to the terminal; Ctrl-C ends the answer and not the program."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loadmaster.engine.types import DoneEvent, GenerateEvent, TextEvent
from loadmaster.interfaces.cli.text import write_answer
from loadmaster.plan.types import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one request. `done` is None when it was interrupted before its end."""

    text: str
    done: DoneEvent | None

    @property
    def finish_reason(self) -> str:
        return self.done.finish_reason if self.done else "cancelled"

    def to_json(self, predicted: Prediction) -> dict[str, object]:
        """OpenAI's words for what was used, ours for the times."""
        done = self.done
        usage = {
            "prompt_tokens": done.n_prompt if done else None,
            "cached_tokens": done.n_cached if done else None,
            "completion_tokens": done.n_generated if done else None,
        }
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": usage,
            "timings": timings(done, predicted),
            **_drafts(done),
        }


def _drafts(done: DoneEvent | None) -> dict[str, object]:
    """How many tokens were drafted and accepted, where any were."""
    if done is None or not done.n_drafted:
        return {}
    return {"drafts": {"drafted": done.n_drafted, "accepted": done.n_accepted}}


def timings(done: DoneEvent | None, predicted: Prediction) -> dict[str, float | None]:
    """Measured seconds and rates beside the predicted ones."""
    fed = done.n_prompt - done.n_cached if done else 0
    return {
        "prefill_s": done.prefill_s if done else None,
        "decode_s": done.decode_s if done else None,
        "prefill_tok_s": fed / done.prefill_s if done and fed and done.prefill_s else None,
        "decode_tok_s": done.n_generated / done.decode_s if done and done.decode_s else None,
        "predicted_prefill_tok_s": predicted.prefill_tok_s,
        "predicted_decode_tok_s": predicted.decode_tok_s,
    }


def stream(
    events: Iterable[GenerateEvent], *, on_interrupt: Callable[[], None], show: bool = True
) -> Answer:
    """Print text as it comes, and a newline after it. Ctrl-C calls `on_interrupt`, which must
    lead to the end of `events`; a second one raises KeyboardInterrupt."""
    parts: list[str] = []
    done: DoneEvent | None = None
    try:
        with _interrupts(on_interrupt):
            for event in events:
                if isinstance(event, TextEvent):
                    parts.append(event.text)
                    if show:
                        write_answer(event.text)
                elif isinstance(event, DoneEvent):
                    done = event
    finally:
        if show and parts and not parts[-1].endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return Answer(text="".join(parts), done=done)


@contextmanager
def _interrupts(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Send the first Ctrl-C to `on_interrupt`, on a thread of its own: the interrupted code may
    hold the lock that a cancellation needs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=on_interrupt, daemon=True).start()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
