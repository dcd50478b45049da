"""A request on its way through the scheduler, and the queue of those that wait."""

import heapq
from dataclasses import dataclass

from loadmaster.scheduler.guesses import Guesses
from loadmaster.scheduler.types import Finish, FinishReason, Progress, Submitted

_NUMBERS = 1 << 48  # of arrivals within one priority


def rank_of(priority: int, number: int) -> int:
    """Smaller goes first: by priority, then by arrival."""
    return priority * _NUMBERS + number


@dataclass(frozen=True, slots=True)
class Saved:
    """The cells from `start` to `end` of a preempted request are in host RAM."""

    start: int
    end: int
    state_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """What is known of a request between its arrival and its end."""

    submitted: Submitted
    rank: int
    max_tokens: int  # the request's, bounded by the cells of a sequence
    arrived_s: float
    tokens: list[int]  # the prompt and what was sampled; those from `n_fed` on are to be fed
    n_fed: int = 0
    seq_id: int | None = None  # once it holds cells
    ready: bool = False  # the backend has answered `Admitted`
    expected: int = 0  # before it holds cells: how many it will get from others
    leader: "Request | None" = None  # who feeds the tokens that it waits for
    stops: list[int] | None = None  # where others wait for this one
    saved: Saved | None = None
    parking: int | None = None  # preempted, before the backend's answer: where its own cells began
    cancelled: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    n_cached: int = 0
    n_generated: int = 0
    n_preempted: int = 0
    guesses: Guesses | None = None  # where drafts are on
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def request_id(self) -> str:
        return self.submitted.request_id

    @property
    def priority(self) -> int:
        return self.submitted.priority

    @property
    def n_prompt(self) -> int:
        return len(self.submitted.prompt)

    @property
    def n_left(self) -> int:
        """Tokens that are known and not fed: 1 while it decodes."""
        return len(self.tokens) - self.n_fed

    @property
    def decoding(self) -> bool:
        return self.n_generated > 0 and len(self.tokens) - self.n_fed == 1

    def ahead(self, n_steps: int) -> int:
        """Cells that it will add by feeding what is known, and in so many steps after that."""
        covered = self.n_fed if self.seq_id is not None else self.expected
        return len(self.tokens) - covered + min(self.max_tokens - self.n_generated, n_steps)

    def progress(self) -> Progress:
        return Progress(
            request_id=self.request_id,
            n_done=min(self.n_fed, self.n_prompt),
            n_prompt=self.n_prompt,
        )

    def finish(self, reason: FinishReason, now: float) -> Finish:
        begun = self.arrived_s if self.admitted_s is None else self.admitted_s
        first = now if self.first_token_s is None else self.first_token_s
        return Finish(
            request_id=self.request_id,
            seq_id=self.seq_id,
            finish_reason=reason,
            n_prompt=self.n_prompt,
            n_cached=self.n_cached,
            n_generated=self.n_generated,
            n_preempted=self.n_preempted,
            prefill_s=first - begun,
            decode_s=now - first,
            n_drafted=self.n_drafted,
            n_accepted=self.n_accepted,
        )


class Queue:
    """Requests by rank. Removing one from the middle costs nothing until it comes first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Request]] = []
        self._ranks: set[int] = set()

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, request: Request) -> bool:
        return request.rank in self._ranks

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.rank, request))
        self._ranks.add(request.rank)

    def remove(self, request: Request) -> None:
        self._ranks.remove(request.rank)
        if not self._ranks:
            self._heap.clear()

    def first(self) -> Request | None:
        """Who is next; it stays."""
        while self._heap and self._heap[0][0] not in self._ranks:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None
