"""The step loop, beside the backend in the worker: carries the scheduler's actions out.

The scheduler decides who runs; the driver feeds the backend, turns tokens into text and reports.
Text is sent at most every `FLUSH_S`: on a small model a message for each token would wake the
parent two thousand times a second, on the very cores that decode.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loadmaster.engine.detokenize import TextStream
from loadmaster.engine.types import (
    Backend,
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    PrefillEvent,
    TextEvent,
)
from loadmaster.errors import BusyError, ContextLengthError
from loadmaster.scheduler.core import Scheduler
from loadmaster.scheduler.types import (
    Action,
    Admit,
    Admitted,
    Cancelled,
    Event,
    Evict,
    Finish,
    Limits,
    Progress,
    Refuse,
    Restored,
    SequenceWork,
    Step,
    StepCut,
    Stepped,
    Submitted,
)

FLUSH_S = 0.04  # at 0.02 s the demo model lost 2 % of its decode tok/s, at 0.04 s none to be seen

Clock = Callable[[], float]
Report = Callable[[GenerateEvent], None]
ReportRefusal = Callable[[str, ContextLengthError], None]


@dataclass(slots=True, kw_only=True)
class _Stream:
    """The output side of one request."""

    request: GenerateRequest
    text: TextStream
    n_tokens: int = 0
    pending: str = ""
    sent_s: float = float("-inf")  # the first text goes out at once


class Driver:
    """Runs requests on an open backend. One thread calls it, but for `interrupt`."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        report: Report,
        refuse: ReportRefusal,
        attention: Callable[[], bool] = lambda: False,
        clock: Clock = time.monotonic,
    ) -> None:
        """`attention` says that the caller has something else to do than to step."""
        self.n_ubatch = limits.n_ubatch
        self._backend = backend
        self._scheduler = Scheduler(limits)
        self._report = report
        self._refuse = refuse
        self._attention = attention
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._by_slot: dict[int, _Stream] = {}
        self._next_step: Step | None = None
        self._step_lock = threading.Lock()
        self._stepping_alone: str | None = None
        self._cancel_asked: set[str] = set()

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    # -- requests

    def submit(self, request: GenerateRequest) -> None:
        self._streams[request.request_id] = _Stream(request=request, text=TextStream(request.stop))
        self._take(
            Submitted(
                request_id=request.request_id,
                prompt=request.prompt,
                max_tokens=request.max_tokens,
            )
        )

    def cancel(self, request_id: str) -> None:
        """End a request; of an unknown one, nothing happens."""
        self._take(Cancelled(request_id=request_id))
        if self._next_step is not None:  # not begun: the cancelled request need not pay for it
            self._next_step = None
            self._take(StepCut(begun=False))

    def interrupt(self, request_id: str) -> None:
        """Cut the running step short if it is this request's alone, and begin no other of it.

        From any thread, when the cancellation is in the main thread's inbox.
        """
        with self._step_lock:
            if request_id in self._streams:
                self._cancel_asked.add(request_id)
            if self._stepping_alone == request_id:
                self._backend.interrupt()

    def save(self, slot: int) -> tuple[tuple[int, ...], bytes]:
        """The tokens of a slot's cells, and the cells."""
        return self._scheduler.cells(slot), self._backend.save_state(slot)

    def restore(self, slot: int, tokens: tuple[int, ...], state: bytes) -> None:
        """Put saved cells into an idle slot, so that a prompt that begins with them goes on.

        Raises:
            BusyError: a request runs in the slot.
            EngineRefusedError: the state belongs to another model.
        """
        if slot in self._by_slot:
            raise BusyError(f"sequence {slot} is busy")
        self._backend.remove(slot, 0)
        self._take(Restored(slot=slot, tokens=()))
        self._backend.restore_state(slot, state)
        self._take(Restored(slot=slot, tokens=tokens))

    def forget(self, slots: Iterable[int]) -> None:
        """The cells of these idle slots are gone: something else used them."""
        for slot in slots:
            self._backend.remove(slot, 0)
            self._take(Restored(slot=slot, tokens=()))

    # -- the loop

    def step(self) -> None:
        """Run the next step, if there is one; of a lone sequence, some `FLUSH_S` of steps."""
        step, self._next_step = self._next_step, None
        if step is None:
            return
        if not self._begin_step(step.work):
            self._take(StepCut(begun=False))
            return
        try:
            event = self._decode_run(step) if self._may_run(step) else self._one_step(step.work)
        finally:
            with self._step_lock:
                self._stepping_alone = None
        self._take(event)

    def _may_run(self, step: Step) -> bool:
        """Stop strings are looked for after every token."""
        return step.repeat > 1 and not self._by_slot[step.work[0].seq_id].request.stop

    def _one_step(self, work: tuple[SequenceWork, ...]) -> Event:
        result = self._backend.step(work)
        if result.cut:
            for part in work:
                self._backend.remove(part.seq_id, part.position)
            return StepCut()
        now = self._clock()
        stopped = [slot for slot, token in result.tokens.items() if self._feed(slot, (token,), now)]
        return Stepped(tokens=result.tokens, stopped=stopped)

    def _decode_run(self, step: Step) -> Event:
        (first,) = step.work
        clock, attention = self._clock, self._attention
        deadline = clock() + FLUSH_S
        result = self._backend.decode_run(
            first,
            step.repeat,
            lambda: clock() < deadline and not attention(),
            stop_at_eog=not self._by_slot[first.seq_id].request.ignore_eos,
        )
        slot, tokens = first.seq_id, result.tokens
        if result.cut:
            self._backend.remove(slot, first.position + len(tokens))
        if not tokens:
            return StepCut()
        stopped = (slot,) if self._feed(slot, tokens, clock()) else ()
        return Stepped(tokens={slot: tokens[0]}, stopped=stopped, run=tokens[1:])

    def _begin_step(self, work: tuple[SequenceWork, ...]) -> bool:
        """Open the step to `interrupt`; False when its cancellation is in the inbox already."""
        alone = len(work) == 1
        request_id = self._by_slot[work[0].seq_id].request.request_id
        with self._step_lock:
            if alone and request_id in self._cancel_asked:
                return False
            self._backend.resume()
            self._stepping_alone = request_id if alone else None
            return True

    def _feed(self, slot: int, tokens: Sequence[int], now: float) -> bool:
        """Add tokens to their stream; whether it stops with the last one."""
        stream = self._by_slot[slot]
        stream.n_tokens += len(tokens)
        ended = not stream.request.ignore_eos and self._backend.is_eog(tokens[-1])
        raw = b"".join(map(self._backend.token_bytes, tokens[:-1] if ended else tokens))
        stream.pending += stream.text.feed(raw)
        if stream.pending and now - stream.sent_s >= FLUSH_S:
            self._flush(stream, now)
        return ended or stream.text.stopped

    def _flush(self, stream: _Stream, now: float) -> None:
        text, stream.pending, stream.sent_s = stream.pending, "", now
        self._report(
            TextEvent(request_id=stream.request.request_id, text=text, n_tokens=stream.n_tokens)
        )

    # -- actions

    def _take(self, event: Event) -> None:
        """Give the scheduler an event and do what it says, and what follows from that."""
        events: list[Event] = [event]
        while events:
            for action in self._scheduler.on_event(events.pop(0), self._clock()):
                answer = self._do(action)
                if answer is not None:
                    events.append(answer)

    def _do(self, action: Action) -> Event | None:
        match action:
            case Step():
                self._next_step = action
            case Admit():
                return self._admit(action)
            case Finish():
                self._finish(action)
            case Progress():
                self._report_progress(action)
            case Evict():
                self._backend.remove(action.slot, 0)
            case Refuse():
                self._refuse_prompt(action)
        return None

    def _admit(self, action: Admit) -> Admitted:
        stream = self._streams[action.request_id]
        kept = action.n_keep
        if not self._backend.remove(action.slot, kept):
            kept = 0
        sampling = stream.request.sampling
        recent = stream.request.prompt if sampling.repeat_penalty != 1.0 else ()
        self._backend.start_sequence(action.slot, sampling, recent)
        self._by_slot[action.slot] = stream
        return Admitted(slot=action.slot, n_kept=kept)

    def _report_progress(self, action: Progress) -> None:
        self._report(
            PrefillEvent(
                request_id=action.request_id, n_done=action.n_done, n_prompt=action.n_prompt
            )
        )

    def _refuse_prompt(self, action: Refuse) -> None:
        with self._step_lock:
            del self._streams[action.request_id]
            self._cancel_asked.discard(action.request_id)
        self._refuse(action.request_id, context_length_error(action.n_prompt, action.n_ctx))

    def _finish(self, action: Finish) -> None:
        with self._step_lock:
            stream = self._streams.pop(action.request_id)
            self._cancel_asked.discard(action.request_id)
        if action.slot is not None:
            del self._by_slot[action.slot]
        reason = action.finish_reason
        if reason != "cancelled":
            stream.pending += stream.text.flush()
            # What was held back may have turned out to be a stop string.
            reason = "stop" if stream.text.stopped else reason
        if stream.pending:
            self._flush(stream, self._clock())
        self._report(
            DoneEvent(
                request_id=action.request_id,
                finish_reason=reason,
                n_prompt=action.n_prompt,
                n_cached=action.n_cached,
                n_generated=action.n_generated,
                prefill_s=action.prefill_s,
                decode_s=action.decode_s,
            )
        )


def context_length_error(n_prompt: int, n_ctx: int) -> ContextLengthError:
    """Prompt and answer share n_ctx; a prompt is never cut to fit."""
    if n_prompt == 0:
        return ContextLengthError("the prompt is empty", numbers={"n_prompt": 0, "n_ctx": n_ctx})
    return ContextLengthError(
        f"the prompt has {n_prompt} tokens, n_ctx is {n_ctx} for prompt and answer together",
        hint="shorten the prompt or raise `--ctx`",
        numbers={"n_prompt": n_prompt, "n_ctx": n_ctx},
    )
