"""Who runs next: a pure state machine, `on_event(event, now) -> actions`.

Requests wait in a queue by priority and arrival. A request is admitted when its prompt and its
next steps fit beside what the running ones need next; nothing is set aside for all of its
`max_tokens`. When cells run out all the same, the last in rank gives its own up (`Preempt`) and
goes on later; the first in rank never does, so somebody always gets on. Every submitted request
ends exactly once, with `Finish` or `Refuse`.

A prompt is fed only as far as no sequence has its cells (`cells`, `prefix`). Where another request
is about to feed the same tokens, those behind it wait until it has, and no further.
"""

from collections.abc import Collection, Iterator, Sequence

from loadmaster.scheduler.cells import Cells
from loadmaster.scheduler.counts import Counts
from loadmaster.scheduler.drafting import Drafts
from loadmaster.scheduler.places import Places
from loadmaster.scheduler.request import Request, rank_of
from loadmaster.scheduler.steps import sits_out, step_work
from loadmaster.scheduler.types import (
    Action,
    Admitted,
    Adopt,
    Cancelled,
    Draft,
    Drafted,
    Event,
    Finish,
    FinishReason,
    Forget,
    Limits,
    Lost,
    Offered,
    Parked,
    Ready,
    Refuse,
    SchedulerStats,
    SequenceWork,
    StateRoom,
    Step,
    StepCosts,
    StepCut,
    Stepped,
    Submitted,
)

# Cells for a lone sequence to decode on into, without a word to the scheduler.
_LONE_CELLS = 256


class Scheduler:
    """Holds every request's state; the driver beside the backend carries its actions out.

    At most one `Step` is outstanding. Events that come meanwhile take effect at its end.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._counts = Counts()
        self._places = Places(limits, self._counts)
        self._drafts = Drafts(limits) if limits.n_draft else None
        self._requests: dict[str, Request] = {}  # queued and running
        self._outstanding: tuple[SequenceWork, ...] | None = None
        self._n_out = 0  # steps in a row without those who answer

    @property
    def _cells(self) -> Cells:
        return self._places.cells

    @property
    def idle(self) -> bool:
        """No request is queued or running."""
        return not self._requests

    @property
    def last_kept(self) -> int | None:
        """The sequence of the request that ended last, if its cells are still there."""
        return self._cells.last_kept

    def cells(self, seq_id: int) -> tuple[int, ...]:
        """The tokens whose cells a sequence holds."""
        return self._cells.tokens(seq_id)

    def stats(self) -> SchedulerStats:
        places = self._places
        return self._counts.stats(
            self.limits.n_ctx, places.cells, len(places.running), len(places.queue)
        )

    def on_event(self, event: Event, now: float) -> list[Action]:
        """Take note of what happened and say what to do, in order."""
        match event:
            case Ready():
                return self._ready(now)
            case Stepped():
                return list(self._stepped(event, now))
            case Submitted():
                return list(self._submitted(event, now))
            case Cancelled():
                return list(self._cancelled(event.request_id, now))
            case Admitted():
                self._places.admitted(event)
            case Parked():
                if (request := self._requests.get(event.request_id)) is not None:
                    self._places.parked(request, event.state_bytes)
            case StepCut():
                return list(self._step_cut(event, now))
            case Offered():
                return self._offered(event)
            case Lost():
                self._cells.lose(event.seq_id)
            case StateRoom():
                self._places.state_bytes = event.state_bytes
            case StepCosts() if self._drafts is not None:
                self._drafts.costs = event
            case Drafted() if self._drafts is not None:
                self._drafts.made(event.guesses, self._places.by_seq)
            case Forget():
                return list(self._cells.evict_all())
        return []

    # -- arrivals and departures

    def _submitted(self, arrived: Submitted, now: float) -> Iterator[Action]:
        room = min(self.limits.n_ctx, self.limits.n_ctx_seq)
        n_prompt = len(arrived.prompt)
        self._counts.n_submitted += 1
        if not n_prompt or n_prompt >= room:  # one token of answer must fit
            yield Refuse(request_id=arrived.request_id, n_prompt=n_prompt, n_ctx=room)
            return
        left = room - n_prompt
        request = Request(
            submitted=arrived,
            rank=rank_of(arrived.priority, self._counts.n_submitted),
            max_tokens=left
            if arrived.max_tokens is None
            else max(1, min(arrived.max_tokens, left)),
            arrived_s=now,
            tokens=list(arrived.prompt),
        )
        self._requests[request.request_id] = request
        self._places.queue.push(request)
        self._places.short = False

    def _cancelled(self, request_id: str, now: float) -> Iterator[Action]:
        request = self._requests.get(request_id)
        if request is None:
            return
        if request in self._places.queue:
            self._places.queue.remove(request)
            yield from self._places.discard(request)
            yield self._end(request, "cancelled", now)
        elif self._outstanding is None:
            yield from self._finish(request, "cancelled", now)
        else:
            request.cancelled = True

    def _finish(self, request: Request, reason: FinishReason, now: float) -> Iterator[Action]:
        """The end of a running request; its cells stay as long as nobody needs them."""
        seq_id = request.seq_id
        self._places.leave(request)
        yield self._end(request, reason, now)
        if seq_id is None:
            return
        if request.priority > 0:
            yield from self._cells.keep_item(seq_id, request.n_prompt)
        else:
            yield from self._cells.keep(seq_id)

    def _end(self, request: Request, reason: FinishReason, now: float) -> Finish:
        del self._requests[request.request_id]
        self._places.n_places = self.limits.n_seq_max
        self._counts.n_finished += 1
        return request.finish(reason, now)

    # -- the next step

    def _ready(self, now: float) -> list[Action]:
        """Admissions first; the step is decided when the backend has answered them."""
        if self._outstanding is not None:
            return []
        actions = [*self._places.admit(now), *self._places.start()]
        return actions or self._next_step()

    # -- steps

    def _next_step(self) -> list[Action]:
        ready = [request for request in self._places.running if request.ready]
        if len(ready) > self._cells.n_available:
            return self._places.give_up_last()
        sit_out = sits_out(self.limits, ready, self._n_out)
        self._n_out = self._n_out + 1 if sit_out else 0
        available = self._cells.n_available
        work, n_decoding = step_work(self.limits, ready, available, prompts_alone=sit_out)
        if not work:
            return []
        if self._drafts is not None and len(work) == n_decoding:
            known = (work, self._places.by_seq, self._cells.n_available)
            if wanted := self._drafts.wanted(*known):
                return [Draft(wanted=wanted)]
            work = self._drafts.bring(*known)
        n_tokens = sum(len(part.tokens) for part in work)
        alone = len(self._places.running) == n_decoding == 1
        repeat = self._repeat(ready[0]) if alone and n_tokens == 1 else 1
        self._outstanding = work
        room = self._cells.make_room(max(n_tokens, repeat))
        return [*room, Step(work=work, repeat=repeat)]

    def _repeat(self, request: Request) -> int:
        """A sequence alone may decode on: whoever is queued waits for its end anyway."""
        free = self.limits.n_ctx - self._cells.n_used
        room = min(self._cells.n_available, max(free, _LONE_CELLS))
        if self._drafts is not None:
            room = min(room, self._drafts.n_repeat)
        return max(1, min(request.max_tokens - request.n_generated, room))

    def _stepped(self, event: Stepped, now: float) -> Iterator[Action]:
        work, self._outstanding = self._outstanding or (), None
        self._places.short = False
        self._counts.n_steps += 1 + len(event.run)
        decoded = any(self._places.by_seq[part.seq_id].decoding for part in work)
        self._counts.n_decode_steps += decoded + len(event.run)
        for part in work:
            request = self._places.by_seq[part.seq_id]
            if not request.decoding:
                self._counts.n_prefilled_tokens += len(part.tokens)
            self._fed(request, part.tokens[: -part.n_draft] if part.n_draft else part.tokens)
            if part.sample:
                more = event.accepted.get(part.seq_id, ()) if part.n_draft else event.run
                sampled = (event.tokens[part.seq_id], *more)
                if more:  # the draft or the repeated steps fed all but the last
                    self._fed(request, sampled[:-1])
                if request.guesses is not None:
                    self._guessed(request, part.n_draft, sampled)
                yield from self._sampled(request, sampled, part.seq_id in event.stopped, now)
            elif request.n_fed <= request.n_prompt:
                yield request.progress()
            if request.cancelled and request.request_id in self._requests:
                yield from self._finish(request, "cancelled", now)
        self._lose(event.lost)

    def _lose(self, seq_ids: Collection[int]) -> None:
        """The cells of these sequences are gone; whoever still runs is fed again."""
        for seq_id in seq_ids:
            request = self._places.by_seq.get(seq_id)
            if request is None:
                self._cells.lose(seq_id)
            else:
                self._cells.trim(seq_id, 0)
                request.n_fed = 0

    def _fed(self, request: Request, tokens: Sequence[int]) -> None:
        assert request.seq_id is not None
        self._cells.extend(request.seq_id, tokens)
        request.n_fed += len(tokens)

    def _guessed(self, request: Request, n_draft: int, sampled: Sequence[int]) -> None:
        assert request.guesses is not None
        request.guesses.note(sampled)
        if n_draft:
            n_accepted = len(sampled) - 1
            request.n_drafted += n_draft
            request.n_accepted += n_accepted
            self._counts.n_drafted_tokens += n_draft
            self._counts.n_accepted_tokens += n_accepted

    def _sampled(
        self, request: Request, tokens: Sequence[int], stopped: bool, now: float
    ) -> Iterator[Action]:
        if request.first_token_s is None:
            request.first_token_s = now
        self._places.plans.leave(request)
        request.n_generated += len(tokens)
        self._counts.n_generated_tokens += len(tokens)
        request.tokens += tokens
        if request.cancelled:
            return
        if stopped:
            yield from self._finish(request, "stop", now)
        elif request.n_generated >= request.max_tokens:
            yield from self._finish(request, "length", now)

    def _step_cut(self, event: StepCut, now: float) -> Iterator[Action]:
        """The driver drops what a cut step left; here its cells never were."""
        work, self._outstanding = self._outstanding or (), None
        for part in work:
            request = self._places.by_seq[part.seq_id]
            if request.cancelled:
                yield from self._finish(request, "cancelled", now)
        self._lose(event.lost)
        if event.no_room:
            yield from self._places.relieve()

    # -- saved sequences from outside

    def _offered(self, event: Offered) -> list[Action]:
        seq_id, evicted = self._cells.adopt(event.prefix_scope, event.tokens)
        return [*evicted, Adopt(seq_id=seq_id)] if seq_id is not None else []
