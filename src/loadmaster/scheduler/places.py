"""The running requests: who gets among them, with whose cells, and who gives its own up."""

from bisect import insort
from collections.abc import Iterator

from loadmaster.plan.types import DRAFT_SEQUENCES
from loadmaster.scheduler.cells import Cells
from loadmaster.scheduler.counts import Counts
from loadmaster.scheduler.plans import Plans
from loadmaster.scheduler.prefix import Match
from loadmaster.scheduler.request import Queue, Request, Saved
from loadmaster.scheduler.types import Action, Admit, Admitted, Discard, Limits, Preempt

# Steps of every running request that must fit before another is admitted. With none, whoever is
# admitted last is preempted a step later, over and over.
_LOOKAHEAD_STEPS = 16
# A state is worth saving from this many cells on: fewer are fed again within a step.
_SAVE_CELLS = 16


class Places:
    """The places of an engine, `n_seq_max` of them, and the queue before them."""

    def __init__(self, limits: Limits, counts: Counts) -> None:
        self._limits = limits
        self.counts = counts
        self.cells = Cells(limits)
        self.plans = Plans(limits)
        self.queue = Queue()
        self.running: list[Request] = []  # by rank
        self.by_seq: dict[int, Request] = {}
        self.n_places = limits.n_seq_max  # fewer while the engine has fewer cells than we count
        self.state_bytes = limits.state_bytes
        self.short = False  # cells ran out for this step: nobody is admitted before the next

    def leave(self, request: Request) -> None:
        """Out of the running ones."""
        self.running.remove(request)
        self.by_seq.pop(-1 if request.seq_id is None else request.seq_id, None)
        self.plans.leave(request)

    def admit(self, now: float) -> Iterator[Action]:
        """Let in who fits, by rank; whoever does not fit lets nobody behind it in."""
        if self.short and self.running:
            return
        while (request := self.queue.first()) and request.parking is None:
            if self.n_places <= len(self.running) and (
                self.running[-1].priority <= request.priority
            ):
                return
            yield from self._preempt_for(request)
            match = self.cells.find(request)
            if not self._fits(request, match):
                return
            self.queue.remove(request)
            self._place(request, match, now)

    def _full(self, match: Match) -> bool:
        """No place is free. One that an anchor has is, for requests that do not need the anchor."""
        taken = self.cells.n_anchors if match.n >= self._anchor_tokens else 0
        return len(self.running) + taken >= self.n_places

    @property
    def _anchor_tokens(self) -> int:
        """A shared beginning of so many tokens is worth a place of its own."""
        return 4 * self._limits.min_wait_tokens

    def _fits(self, request: Request, match: Match) -> bool:
        """Whether it and the running ones have cells for their prompts and their next steps."""
        if not self.running:
            return True
        if self._full(match):
            return False
        promised = sum(other.ahead(_LOOKAHEAD_STEPS) for other in self.running)
        promised += self._drafted(len(self.running) + 1)
        fresh = request.ahead(_LOOKAHEAD_STEPS) - self._gets(request, match)
        needed = self.cells.n_held + promised + self.cells.not_held(match) + fresh
        return needed <= self._limits.n_ctx

    def _drafted(self, n_running: int) -> int:
        """Cells of a step's drafts, which all its sequences share; of many sequences none brings
        one (`drafting`)."""
        limits = self._limits
        if not limits.n_draft or n_running > DRAFT_SEQUENCES:
            return 0
        return max(0, min(n_running * limits.n_draft, limits.n_draft_step - n_running))

    def _gets(self, request: Request, match: Match) -> int:
        """How many of its cells it will share with others, as far as that is certain."""
        if request.saved is not None:
            return min(request.saved.start, match.n)
        sharable = self.cells.surely(request, match)
        return max(sharable, self.plans.before(request)[1])

    def _preempt_for(self, request: Request) -> Iterator[Action]:
        """Requests of lower priority give way, the last one first."""
        while self.running and self.running[-1].priority > request.priority:
            if self._fits(request, self.cells.find(request)):
                return
            yield from self.preempt(self.running[-1])

    def _place(self, request: Request, match: Match, now: float) -> None:
        """Among the running ones, without cells yet."""
        _, n_planned = self.plans.before(request)
        request.expected = max(match.n, n_planned)
        if request.admitted_s is None:
            request.admitted_s = now
        insort(self.running, request, key=lambda one: one.rank)
        self.plans.enter(request)

    def start(self) -> Iterator[Action]:
        """Cells for those that were admitted, unless another is about to feed the same."""
        for request in tuple(self.running):
            if request.seq_id is not None or request in self.queue:
                continue
            if not self._must_wait(request):
                yield from self._begin(request)

    def _anchor(self, request: Request, match: Match) -> Iterator[Action]:
        """Before a request shares what another stands at: keep a sequence standing there."""
        if match.n < self._anchor_tokens:
            return
        scope = request.submitted.prefix_scope
        yield from self.cells.anchor(scope, match, len(self.by_seq))
        while len(self.running) + self.cells.n_anchors > self._limits.n_seq_max:
            last = self.running[-1]
            if last is request or last.seq_id is not None:
                break
            yield from self.preempt(last)  # it has no cells yet: back to the queue

    def _must_wait(self, request: Request) -> bool:
        leader = request.leader
        if leader is not None and leader.stops is not None and leader.n_fed < request.expected:
            return True
        request.leader = None
        rank, n_planned = self.plans.before(request)
        match = self.cells.find(request)
        request.expected = match.n
        if request.saved or n_planned - match.n < self._limits.min_wait_tokens:
            return False
        leader = next(other for other in self.running if other.rank == rank)
        if leader.n_fed >= n_planned and leader.seq_id is not None:
            return False  # a cache that cannot share there
        request.leader, request.expected = leader, n_planned
        leader.stops = sorted({*(leader.stops or ()), n_planned})
        return True

    def _begin(self, request: Request) -> Iterator[Action]:
        match, saved = self.cells.find(request), request.saved
        if saved is not None:
            if saved.start <= match.n < saved.end:
                match = match.cut(saved.start)
            else:  # what it stood on is gone, or more than it holds is there
                yield from self.discard(request)
                saved = None
        if saved is None:
            yield from self._anchor(request, match)
        start = self.cells.begin(request, match)
        yield from start.before
        request.seq_id, request.n_fed, request.expected = start.seq_id, start.n, 0
        self.by_seq[start.seq_id] = request
        if saved is not None:
            yield from self.cells.make_room(saved.end - start.n)
            self.cells.extend(start.seq_id, request.tokens[start.n : saved.end])
        yield Admit(
            seq_id=start.seq_id,
            request_id=request.request_id,
            n_keep=start.n,
            source=start.source,
            restore=saved is not None,
        )
        yield from start.after

    def admitted(self, event: Admitted) -> None:
        """The backend's answer to `Admit`."""
        request = self.by_seq[event.seq_id]
        self.cells.trim(event.seq_id, event.n_kept)
        request.ready = True
        request.n_fed = event.n_kept
        if request.saved is not None:
            self.counts.n_restored += event.n_kept > request.saved.start
            self.counts.state_bytes -= request.saved.state_bytes
            request.saved = None
        elif request.n_preempted == 0:
            request.n_cached = event.n_kept
            self.counts.n_reused_tokens += event.n_kept
        if request.n_left == 1 and request.n_generated:
            self.plans.leave(request)

    # -- preemption

    def preempt(self, request: Request) -> Iterator[Action]:
        """Back to the queue, where its rank puts it before all that came later."""
        seq_id = request.seq_id
        shared = 0 if seq_id is None else self.cells.shared(seq_id)
        self.leave(request)
        request.n_preempted += seq_id is not None
        self.queue.push(request)
        if seq_id is None:
            return
        self.cells.drop(seq_id)
        self.counts.n_preempted += 1
        worth = request.n_fed - shared >= _SAVE_CELLS
        start = shared if self._limits.partial_state else 0
        left = self.state_bytes - self.counts.state_bytes
        request.seq_id, request.ready, request.parking = None, False, start
        yield Preempt(
            seq_id=seq_id,
            request_id=request.request_id,
            start=start,
            end=request.n_fed,
            limit_bytes=max(0, left) if worth else 0,
        )

    def relieve(self) -> list[Action]:
        """The engine has fewer cells than we counted: give up kept ones, then the last request."""
        actions: list[Action] = [*self.cells.evict_all()]
        actions = actions or self.give_up_last()
        self.n_places = max(1, len(self.running))
        return actions

    def give_up_last(self) -> list[Action]:
        """Not everyone has a cell for the next step: the last in rank gives its own up."""
        actions: list[Action] = []
        self.short = True
        while not actions and len(self.running) > 1:
            actions += self.preempt(self.running[-1])
        return actions

    def parked(self, request: Request, state_bytes: int) -> None:
        """The backend's answer to `Preempt`."""
        if request.parking is None:
            return
        if state_bytes:
            request.saved = Saved(request.parking, request.n_fed, state_bytes)
            self.counts.save(state_bytes)
        request.parking, request.n_fed = None, 0

    def discard(self, request: Request) -> Iterator[Action]:
        """Forget the saved state of a request."""
        if request.saved is not None:
            self.counts.state_bytes -= request.saved.state_bytes
            request.saved = None
            yield Discard(request_id=request.request_id)
