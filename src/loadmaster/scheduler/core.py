"""Who runs next: a pure state machine, `on_event(event, now) -> actions`.

Requests are admitted first come, first served into `n_seq_max` slots. Admission reserves the cells
a request can prove it needs: its prompt and `max_tokens`, at most `n_ctx_seq`. A slot keeps its
cells after its request ended; the next prompt is not prefilled again as far as it agrees with them.
Every submitted request ends exactly once, with `Finish` or `Refuse`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loadmaster.scheduler.types import (
    Action,
    Admit,
    Admitted,
    Cancelled,
    Event,
    Evict,
    Finish,
    FinishReason,
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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree. Compares slices, so that 100,000 tokens take no loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True, kw_only=True)
class _Running:
    """A request in a slot."""

    request: Submitted
    max_tokens: int  # the request's, bounded by the cells of its sequence
    admitted_s: float
    reserved: int
    ready: bool = False  # the backend has answered `Admitted`
    cancelled: bool = False
    n_cached: int = 0
    n_generated: int = 0
    first_token_s: float | None = None
    next_token: int | None = None  # sampled, and not yet fed


@dataclass(slots=True, kw_only=True)
class _Slot:
    index: int
    cells: list[int] = field(default_factory=list)  # the token of each cell
    running: _Running | None = None
    last_used_s: float = float("-inf")


class Scheduler:
    """Holds every sequence's state; the driver beside the backend carries its actions out.

    At most one `Step` is outstanding. Events that come meanwhile take effect at its end.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._slots = [_Slot(index=index) for index in range(limits.n_seq_max)]
        self._queue: deque[tuple[Submitted, float]] = deque()
        self._outstanding: tuple[SequenceWork, ...] | None = None

    @property
    def idle(self) -> bool:
        """No request is queued or running."""
        return not self._queue and all(slot.running is None for slot in self._slots)

    @property
    def reserved_cells(self) -> int:
        """Cells promised to running requests; never above `n_ctx`."""
        return sum(slot.running.reserved for slot in self._slots if slot.running)

    def cells(self, slot: int) -> tuple[int, ...]:
        """The tokens whose cells a slot holds."""
        return tuple(self._slots[slot].cells)

    def on_event(self, event: Event, now: float) -> list[Action]:
        """Take note of what happened and say what to do, in order."""
        actions: list[Action] = []
        match event:
            case Stepped():
                actions += self._stepped(event, now)
            case Submitted():
                actions += self._submitted(event, now)
            case Cancelled():
                actions += self._cancelled(event.request_id, now)
            case Admitted():
                self._admitted(event)
            case StepCut():
                self._step_cut(event)
            case Restored():
                self._restored(event, now)
        actions += self._finish_cancelled(now)
        actions += self._admit(now)
        actions += self._next_step()
        return actions

    # -- events

    def _submitted(self, request: Submitted, now: float) -> Iterator[Action]:
        # Prompt and answer share n_ctx: one token of answer must fit.
        if not request.prompt or len(request.prompt) >= self._room_seq:
            yield Refuse(
                request_id=request.request_id,
                n_prompt=len(request.prompt),
                n_ctx=self._room_seq,
            )
            return
        self._queue.append((request, now))

    @property
    def _room_seq(self) -> int:
        return min(self.limits.n_ctx, self.limits.n_ctx_seq)

    def _cancelled(self, request_id: str, now: float) -> Iterator[Action]:
        for queued in self._queue:
            if queued[0].request_id == request_id:
                self._queue.remove(queued)
                yield _finish_unstarted(queued[0], queued[1], now)
                return
        for slot in self._slots:
            if slot.running and slot.running.request.request_id == request_id:
                slot.running.cancelled = True

    def _admitted(self, event: Admitted) -> None:
        slot = self._slots[event.slot]
        if slot.running is None:
            return
        del slot.cells[event.n_kept :]
        slot.running.ready = True
        slot.running.n_cached = event.n_kept

    def _restored(self, event: Restored, now: float) -> None:
        slot = self._slots[event.slot]
        if slot.running is None:
            slot.cells = list(event.tokens)
            slot.last_used_s = now

    def _step_cut(self, event: StepCut) -> None:
        """The driver drops what a cut step left; here its cells never were."""
        work, self._outstanding = self._outstanding or (), None
        if event.begun and not self.limits.partial_removal:
            for part in work:
                self._slots[part.seq_id].cells.clear()

    def _stepped(self, event: Stepped, now: float) -> list[Action]:
        work, self._outstanding = self._outstanding or (), None
        actions: list[Action] = []
        for part in work:
            slot = self._slots[part.seq_id]
            if slot.running is None:
                continue
            slot.cells += part.tokens
            if part.sample:
                sampled = (event.tokens[part.seq_id], *event.run)
                slot.cells += sampled[:-1]  # a repeated step has fed them
                actions += self._sampled(slot, sampled, part.seq_id in event.stopped, now)
            else:
                actions.append(_progress(slot, slot.running))
        return actions

    def _sampled(
        self, slot: _Slot, tokens: Sequence[int], stopped: bool, now: float
    ) -> Iterator[Action]:
        running = slot.running
        assert running is not None
        if running.first_token_s is None:
            running.first_token_s = now
        running.n_generated += len(tokens)
        running.next_token = tokens[-1]
        if running.cancelled:
            return
        if stopped:
            yield self._finish(slot, running, "stop", now)
        elif running.n_generated >= running.max_tokens:
            yield self._finish(slot, running, "length", now)

    # -- endings

    def _finish(self, slot: _Slot, running: _Running, reason: FinishReason, now: float) -> Finish:
        slot.running = None
        slot.last_used_s = now
        first = now if running.first_token_s is None else running.first_token_s
        return Finish(
            request_id=running.request.request_id,
            slot=slot.index,
            finish_reason=reason,
            n_prompt=len(running.request.prompt),
            n_cached=running.n_cached,
            n_generated=running.n_generated,
            prefill_s=first - running.admitted_s,
            decode_s=now - first,
        )

    def _finish_cancelled(self, now: float) -> Iterator[Action]:
        if self._outstanding is not None:
            return
        for slot in self._slots:
            if slot.running and slot.running.cancelled:
                yield self._finish(slot, slot.running, "cancelled", now)

    # -- admission

    def _admit(self, now: float) -> Iterator[Action]:
        while self._outstanding is None and self._queue:
            request, _ = self._queue[0]
            reserved = self._need(request)
            slot = self._choose_slot(request)
            if slot is None or self.reserved_cells + reserved > self.limits.n_ctx:
                return
            self._queue.popleft()
            slot.running = _Running(
                request=request,
                max_tokens=reserved - len(request.prompt),
                admitted_s=now,
                reserved=reserved,
            )
            yield from self._make_room()
            keep = self._reusable(slot, request)
            yield Admit(slot=slot.index, request_id=request.request_id, n_keep=keep)

    def _need(self, request: Submitted) -> int:
        """Cells for the prompt and what may follow it."""
        if request.max_tokens is None:
            return self._room_seq
        return min(len(request.prompt) + max(1, request.max_tokens), self._room_seq)

    def _choose_slot(self, request: Submitted) -> _Slot | None:
        """The idle slot that saves the most prefill; among equals the one unused for longest."""
        free = [slot for slot in self._slots if slot.running is None]
        return max(free, key=lambda s: (self._reusable(s, request), -s.last_used_s), default=None)

    def _reusable(self, slot: _Slot, request: Submitted) -> int:
        """Leading cells that hold the prompt's own tokens. At least one token must be fed."""
        prompt = request.prompt
        common = min(common_prefix(tuple(slot.cells), prompt), len(prompt) - 1)
        if not self.limits.partial_removal and common < len(slot.cells):
            return 0
        return common

    def _make_room(self) -> Iterator[Action]:
        """Evict idle slots, the one unused for longest first, until all reservations hold."""
        idle = sorted(
            (slot for slot in self._slots if slot.running is None and slot.cells),
            key=lambda slot: slot.last_used_s,
        )
        kept = sum(len(slot.cells) for slot in idle)
        for slot in idle:
            if self.reserved_cells + kept <= self.limits.n_ctx:
                return
            kept -= len(slot.cells)
            slot.cells.clear()
            yield Evict(slot=slot.index)

    # -- steps

    def _next_step(self) -> list[Action]:
        if self._outstanding is not None:
            return []
        decoding: list[SequenceWork] = []
        prefilling: list[tuple[_Slot, _Running]] = []
        for slot in self._slots:
            running = slot.running
            if running is None or not running.ready:
                continue
            if running.next_token is None:
                prefilling.append((slot, running))
            else:
                decoding.append(_decode_work(slot, running.next_token))
        work = (*decoding, *self._prefill_work(prefilling, len(decoding)))
        if not work:
            return []
        self._outstanding = work
        return [Step(work=work, repeat=self._repeat(work) if decoding else 1)]

    def _repeat(self, work: tuple[SequenceWork, ...]) -> int:
        """A sequence alone may decode on while nobody waits; its cells are reserved."""
        running = self._slots[work[0].seq_id].running
        if len(work) > 1 or self._queue or running is None:
            return 1
        return running.max_tokens - running.n_generated

    def _prefill_work(
        self, prefilling: list[tuple[_Slot, _Running]], n_decoding: int
    ) -> Iterator[SequenceWork]:
        """Chunks of prompts, oldest first. Beside a decode they stay below n_ubatch."""
        room = (self.limits.n_ubatch if n_decoding else self.limits.n_batch) - n_decoding
        for slot, running in sorted(prefilling, key=lambda pair: pair[1].admitted_s):
            if room <= 0:
                return
            done = len(slot.cells)
            chunk = running.request.prompt[done : done + room]
            room -= len(chunk)
            yield SequenceWork(
                seq_id=slot.index,
                tokens=chunk,
                position=done,
                sample=done + len(chunk) == len(running.request.prompt),
            )


def _decode_work(slot: _Slot, token: int) -> SequenceWork:
    return SequenceWork(seq_id=slot.index, tokens=(token,), position=len(slot.cells), sample=True)


def _progress(slot: _Slot, running: _Running) -> Progress:
    return Progress(
        request_id=running.request.request_id,
        n_done=len(slot.cells),
        n_prompt=len(running.request.prompt),
    )


def _finish_unstarted(request: Submitted, arrived_s: float, now: float) -> Finish:
    return Finish(
        request_id=request.request_id,
        slot=None,
        finish_reason="cancelled",
        n_prompt=len(request.prompt),
        n_cached=0,
        n_generated=0,
        prefill_s=now - arrived_s,
        decode_s=0.0,
    )
