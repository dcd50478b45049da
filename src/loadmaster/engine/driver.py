"""The step loop, beside the backend in the worker: carries the scheduler's actions out.

The scheduler decides who runs; the driver feeds the backend, turns tokens into text and reports.
Text is sent at most every `FLUSH_S`: on a small model a message for each token would wake the
parent two thousand times a second, on the very cores that decode.
"""

import threading
import time
from collections.abc import Callable, Sequence

from loadmaster.engine.detokenize import TextStream
from loadmaster.engine.drafts import feed_checked, without_drafts
from loadmaster.engine.sequences import Sequences
from loadmaster.engine.stream import Stream
from loadmaster.engine.types import (
    Backend,
    GenerateEvent,
    GenerateRequest,
    PrefillEvent,
    StepResult,
    TokenLogprob,
)
from loadmaster.errors import (
    BusyError,
    ContextLengthError,
    EngineError,
    LoadmasterError,
    UsageError,
)
from loadmaster.scheduler.core import Scheduler
from loadmaster.scheduler.types import (
    Action,
    Admit,
    Admitted,
    Adopt,
    Cancelled,
    Copy,
    Discard,
    Draft,
    Drafted,
    Event,
    Evict,
    Finish,
    Forget,
    Limits,
    Lost,
    Offered,
    Preempt,
    Progress,
    Ready,
    Refuse,
    SchedulerStats,
    SequenceWork,
    Shelve,
    StateRoom,
    Step,
    StepCosts,
    StepCut,
    Stepped,
    Submitted,
)

FLUSH_S = 0.04  # at 0.02 s the demo model lost 2 % of its decode tok/s, at 0.04 s none to be seen
FLUSH_STREAMS = 32  # so many streams send at that pace
FLUSH_ITEM_S = 0.5  # of an item of a job, which nobody reads meanwhile

Report = Callable[[GenerateEvent], None]
ReportRefusal = Callable[[str, UsageError], None]


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
    ) -> None:
        """`attention` says that the caller has something else to do than to step."""
        self.n_ubatch = limits.n_ubatch
        self.n_draft_step = limits.n_draft_step if limits.n_draft else 0
        self.draft_model = limits.draft_model
        self._backend = backend
        self._scheduler = Scheduler(limits)
        self._report = report
        self._refuse = refuse
        self._attention = attention
        self._streams: dict[str, Stream] = {}
        self._by_seq: dict[int, Stream] = {}
        self._sequences = Sequences(backend)
        self._next_step: Step | None = None
        self._adopted: int | None = None
        self._step_lock = threading.Lock()
        self._stepping_alone: str | None = None
        self._cancel_asked: set[str] = set()

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    # -- requests

    def submit(self, request: GenerateRequest) -> None:
        if request.json_schema is not None:
            try:
                self._backend.check_schema(request.json_schema)
            except UsageError as error:
                self._refuse(request.request_id, error)
                return
        self._streams[request.request_id] = Stream(request=request, text=TextStream(request.stop))
        self._take(
            Submitted(
                request_id=request.request_id,
                prompt=request.prompt,
                max_tokens=request.max_tokens,
                priority=request.priority,
                prefix_scope=request.prefix_scope,
            )
        )

    def cancel(self, request_id: str) -> None:
        """End a request; of an unknown one, nothing happens."""
        self._take(Cancelled(request_id=request_id))

    def interrupt(self, request_id: str) -> None:
        """Cut the running step short if it is this request's alone, and begin no other of it.

        From any thread, when the cancellation is in the main thread's inbox.
        """
        with self._step_lock:
            if request_id in self._streams:
                self._cancel_asked.add(request_id)
            if self._stepping_alone == request_id:
                self._backend.interrupt()

    def stats(self) -> SchedulerStats:
        """Counts, and what is in use between two steps."""
        return self._scheduler.stats()

    def allow_states(self, n_bytes: int) -> None:
        """Let the states of preempted requests take so much host RAM."""
        self._take(StateRoom(state_bytes=n_bytes))

    def note_costs(self, costs: StepCosts) -> None:
        """What steps of so many tokens cost, by which drafts are given."""
        self._take(costs)

    def save(self) -> tuple[tuple[int, ...], bytes]:
        """The tokens of the sequence whose request ended last, and its cells.

        Raises:
            UsageError: no ended sequence has cells.
        """
        seq_id = self._scheduler.last_kept
        if seq_id is None:
            raise UsageError("there is no sequence to save: nothing was generated yet")
        return self._scheduler.cells(seq_id), self._backend.save_state(seq_id)

    def restore(self, tokens: tuple[int, ...], state: bytes) -> None:
        """Put saved cells back, so that a prompt that begins with their tokens goes on.

        Raises:
            BusyError: running requests have all cells.
            EngineRefusedError: the state belongs to another model.
        """
        self._adopted = None
        self._take(Offered(tokens=tokens))
        if self._adopted is None:
            raise BusyError(f"there is no room for {len(tokens)} saved cells")
        try:
            self._backend.restore_state(self._adopted, state)
        except LoadmasterError:
            self._take(Lost(seq_id=self._adopted))
            raise

    def forget(self) -> None:
        """Drop the cells of every ended sequence.

        Raises:
            BusyError: a request is running.
        """
        if not self.idle:
            raise BusyError("a request is running")
        self._take(Forget())

    # -- the loop

    def step(self) -> None:
        """Run the next step, if there is one; of a lone sequence, some `FLUSH_S` of steps."""
        self._decide()
        step, self._next_step = self._next_step, None
        if step is None:
            return
        if not self._begin_step(step.work):
            self._take(StepCut())
            return
        try:
            event = self._decode_run(step) if self._may_run(step) else self._one_step(step.work)
        finally:
            with self._step_lock:
                self._stepping_alone = None
        if not self._take(event) and isinstance(event, StepCut) and event.no_room:
            raise EngineError("the engine found no free KV cells for a step that had them")

    def _decide(self) -> None:
        """Ask for the next step until the scheduler has nothing to prepare for it."""
        while self._take(Ready()) and self._next_step is None:
            pass

    def _may_run(self, step: Step) -> bool:
        """Stop strings are looked for after every token; so are schemas and log-probabilities."""
        request = self._by_seq[step.work[0].seq_id].request
        return step.repeat > 1 and not request.every_token

    def _one_step(self, work: tuple[SequenceWork, ...]) -> Event:
        result = self._backend.step(work)
        if result.no_room:
            plain = without_drafts(work)
            return StepCut(no_room=True) if plain == work else self._one_step(plain)
        if result.cut:
            remove = self._backend.remove
            lost = [part.seq_id for part in work if not remove(part.seq_id, part.position)]
            return StepCut(lost=lost)
        now = time.monotonic()
        if result.accepted:
            return self._checked_step(work, result, now)
        stopped = [seq_id for seq_id in result.tokens if self._feed_one(seq_id, result, now)]
        return Stepped(tokens=result.tokens, stopped=stopped)

    def _checked_step(
        self, work: Sequence[SequenceWork], result: StepResult, now: float
    ) -> Stepped:
        """The end of a step with drafts: what follows a stop, or was not accepted, is dropped."""
        stopped: list[int] = []
        accepted: dict[int, Sequence[int]] = {}
        lost: list[int] = []
        for part in work:
            seq_id = part.seq_id
            stream = self._by_seq[seq_id]
            fed, stops = feed_checked(stream, self._backend, seq_id, result)
            if stream.pending and now - stream.sent_s >= self._flush_s(stream):
                self._report(stream.take(now))
            accepted[seq_id] = fed[1:]
            if stops:
                stopped.append(seq_id)
            end = part.position + len(fed)
            if len(fed) <= part.n_draft and not self._backend.remove(seq_id, end):
                lost.append(seq_id)
        return Stepped(tokens=result.tokens, stopped=stopped, accepted=accepted, lost=lost)

    def _feed_one(self, seq_id: int, result: StepResult, now: float) -> bool:
        """Add a step's token to its stream; whether the stream stops with it."""
        stream, token = self._by_seq[seq_id], result.tokens[seq_id]
        if stream.request.json_schema is not None:
            stream.failure = result.failed.get(seq_id)
        stopped = self._feed(seq_id, (token,), now, result.logprobs.get(seq_id))
        return stopped or seq_id in result.ended

    def _decode_run(self, step: Step) -> Event:
        (first,) = step.work
        clock, attention = time.monotonic, self._attention
        deadline = clock() + FLUSH_S
        result = self._backend.decode_run(
            first,
            step.repeat,
            lambda: clock() < deadline and not attention(),
            stop_at_eog=not self._by_seq[first.seq_id].request.ignore_eos,
        )
        seq_id, tokens = first.seq_id, result.tokens
        if result.no_room:
            return StepCut(no_room=True)
        kept = not result.cut or self._backend.remove(seq_id, first.position + len(tokens))
        if not tokens:
            return StepCut(lost=() if kept else (seq_id,))
        stopped = (seq_id,) if self._feed(seq_id, tokens, clock()) else ()
        return Stepped(
            tokens={seq_id: tokens[0]},
            stopped=stopped,
            run=tokens[1:],
            lost=() if kept else (seq_id,),
        )

    def _begin_step(self, work: tuple[SequenceWork, ...]) -> bool:
        """Open the step to `interrupt`; False when its cancellation is in the inbox already."""
        alone = len(work) == 1
        request_id = self._by_seq[work[0].seq_id].request.request_id
        with self._step_lock:
            if alone and request_id in self._cancel_asked:
                return False
            self._backend.resume()
            self._stepping_alone = request_id if alone else None
            return True

    def _feed(
        self, seq_id: int, tokens: Sequence[int], now: float, logprob: TokenLogprob | None = None
    ) -> bool:
        """Add tokens to their stream; whether it stops with the last one."""
        stream = self._by_seq[seq_id]
        stopped = stream.feed(self._backend, tokens, logprob)
        if stream.pending and now - stream.sent_s >= self._flush_s(stream):
            self._report(stream.take(now))
        return stopped

    def _flush_s(self, stream: Stream) -> float:
        """Of many streams each sends more rarely: an event costs as much as a token's step."""
        seconds = FLUSH_S * max(1.0, len(self._by_seq) / FLUSH_STREAMS)
        return seconds if stream.request.priority == 0 else max(seconds, FLUSH_ITEM_S)

    # -- actions

    def _take(self, event: Event) -> bool:
        """Give the scheduler an event and do what it says, and what follows from that.

        Whether there was anything to do.
        """
        events: list[Event] = [event]
        active = False
        while events:
            actions = self._scheduler.on_event(events.pop(0), time.monotonic())
            active = active or bool(actions)
            for action in actions:
                answer = self._do(action)
                if answer is not None:
                    events.append(answer)
        return active

    def _do(self, action: Action) -> Event | None:
        match action:
            case Step():
                self._next_step = action
            case Admit():
                return self._admit(action)
            case Preempt():
                return self._sequences.preempt(action, self._by_seq.pop(action.seq_id))
            case Evict():
                return self._sequences.evict(action)
            case Draft():
                return Drafted(guesses=self._backend.draft(action.wanted))
            case Copy():
                return self._sequences.copy(action)
            case Shelve():
                return self._sequences.shelve(action)
            case _:
                self._do_quietly(action)
        return None

    def _do_quietly(self, action: Action) -> None:
        """What the scheduler needs no answer to."""
        match action:
            case Finish():
                self._finish(action)
            case Progress():
                self._report_progress(action)
            case Discard():
                self._streams[action.request_id].state = None
            case Adopt():
                self._adopted = action.seq_id
            case Refuse():
                self._refuse_prompt(action)

    def _admit(self, action: Admit) -> Admitted:
        stream = self._by_seq[action.seq_id] = self._streams[action.request_id]
        return self._sequences.admit(action, stream)

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
        if action.seq_id is not None:
            del self._by_seq[action.seq_id]
        if stream.sampler is not None:
            self._backend.end_sequence(stream.sampler)
        for event in stream.finish(action, time.monotonic()):
            if event is not None:
                self._report(event)


def context_length_error(n_prompt: int, n_ctx: int) -> ContextLengthError:
    """Prompt and answer share n_ctx; a prompt is never cut to fit."""
    if n_prompt == 0:
        return ContextLengthError("the prompt is empty", numbers={"n_prompt": 0, "n_ctx": n_ctx})
    return ContextLengthError(
        f"the prompt has {n_prompt} tokens, n_ctx is {n_ctx} for prompt and answer together",
        hint="shorten the prompt or raise `--ctx`",
        numbers={"n_prompt": n_prompt, "n_ctx": n_ctx},
    )
