"""An engine in miniature for tests of the scheduler: a pool of cells that counts, and a driver.

The next token of a sequence depends on all tokens in its cells: a wrongly shared, lost or stale
cell changes the stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadmaster.scheduler.core import Scheduler
from loadmaster.scheduler.types import (
    Action,
    Admit,
    Admitted,
    Cancelled,
    Copy,
    Discard,
    Draft,
    Drafted,
    Event,
    Evict,
    Finish,
    Limits,
    Lost,
    Parked,
    Preempt,
    Progress,
    Ready,
    Refuse,
    SequenceWork,
    Shelve,
    Step,
    StepCut,
    Stepped,
    Submitted,
)

N_TOKENS = 5
END = 0  # a sampled 0 stops a stream that minds it
Tokens = tuple[int, ...]
Speech = Callable[[Sequence[int]], int]


def next_token(tokens: Sequence[int]) -> int:
    """What a solo run would sample after these tokens."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % N_TOKENS


def echoing_token(tokens: Sequence[int]) -> int:
    """The same of a speaker who says most things again: guesses at it are often right."""
    token = next_token(tokens)
    return tokens[-3] if token and len(tokens) > 3 else token


def solo(prompt: Tokens, n: int, *, stops: bool = False, speech: Speech = next_token) -> Tokens:
    """The stream of a request that has the engine to itself."""
    stream: list[int] = []
    while len(stream) < n:
        stream.append(speech((*prompt, *stream)))
        if stops and stream[-1] == END:
            break
    return tuple(stream)


@dataclass(eq=False, slots=True)
class Cell:
    """One token at one position, and the sequences that have it."""

    position: int
    token: int
    holders: set[int]


@dataclass
class Pool:
    """The cells of an engine. Never more than `n_ctx`, whatever the scheduler believes."""

    limits: Limits
    sequences: dict[int, list[Cell]] = field(default_factory=dict)

    @property
    def n_used(self) -> int:
        return len({id(cell) for cells in self.sequences.values() for cell in cells})

    def tokens(self, seq_id: int) -> Tokens:
        return tuple(cell.token for cell in self.sequences.get(seq_id, []))

    def feed(self, work: SequenceWork) -> None:
        assert 0 <= work.seq_id < self.limits.n_seq_max
        cells = self.sequences.setdefault(work.seq_id, [])
        assert work.position == len(cells)
        assert work.tokens
        cells += [Cell(len(cells) + i, t, {work.seq_id}) for i, t in enumerate(work.tokens)]
        assert self.n_used <= self.limits.n_ctx

    def remove(self, seq_id: int, start: int) -> bool:
        cells = self.sequences.setdefault(seq_id, [])
        if not self.limits.partial_removal and 0 < start < len(cells):
            start = 0
        whole = start <= len(cells)
        for cell in cells[start:]:
            cell.holders.discard(seq_id)
        del cells[start:]
        return whole and (start > 0 or not cells)

    def share(self, source: int, seq_id: int, n: int) -> bool:
        assert not self.sequences.get(seq_id)
        assert self.limits.shared_prefix or n == 0
        cells = self.sequences.get(source, [])
        if len(cells) < n or (self.limits.shared_at_end and len(cells) != n):
            return False
        for cell in cells[:n]:
            cell.holders.add(seq_id)
        self.sequences[seq_id] = cells[:n]
        return True

    def restore(self, seq_id: int, tokens: Tokens) -> None:
        cells = self.sequences.setdefault(seq_id, [])
        cells += [Cell(len(cells) + i, t, {seq_id}) for i, t in enumerate(tokens)]
        assert self.n_used <= self.limits.n_ctx


def limits(**changes: Any) -> Limits:
    """An engine that can do everything, with some of it changed."""
    fields: dict[str, Any] = {
        "n_ctx": 64, "n_seq_max": 4, "n_batch": 16, "n_ubatch": 8, "partial_removal": True,
        "n_seq_ids": 12, "shared_prefix": True, "partial_state": True, "state_bytes": 10_000,
        "min_wait_tokens": 1,
    } | changes  # fmt: skip
    return Limits(**{"n_ctx_seq": fields["n_ctx"], **fields})


class Run:
    """A scheduler on a pool of cells, step by step."""

    def __init__(
        self, given: Limits, *, on_step: Callable[[Step], None] = lambda _: None,
        speech: Speech = next_token,
    ) -> None:  # fmt: skip
        self.limits = given
        self._speech = speech
        self.core = Scheduler(given)
        self.pool = Pool(given)
        self.step: Step | None = None
        self.now = 0.0
        self.requests: dict[str, Submitted] = {}
        self.stops: dict[str, bool] = {}
        self.streams: dict[str, list[int]] = {}
        self.ends: dict[str, Finish | Refuse] = {}
        self.by_seq: dict[int, str] = {}
        self.states: dict[str, Tokens] = {}
        self.admitted: list[str] = []
        self.preempted: list[str] = []
        self.fed: list[str] = []  # the requests of every step, those that were prefilled
        self.n_fed_prompt = 0
        self.n_drafted = 0
        self._on_step = on_step

    # -- what a test says

    def submit(
        self, name: str, prompt: Tokens, max_tokens: int | None = 4, *, stops: bool = False,
        priority: int = 0, scope: str = "",
    ) -> None:  # fmt: skip
        request = Submitted(
            request_id=name, prompt=prompt, max_tokens=max_tokens, priority=priority,
            prefix_scope=scope,
        )  # fmt: skip
        self.requests[name], self.stops[name], self.streams[name] = request, stops, []
        self.give(request)

    def cancel(self, name: str) -> None:
        self.give(Cancelled(request_id=name))

    def decide(self) -> Step | None:
        """The next step, not run yet."""
        while self.step is None and self.give(Ready()):
            pass
        return self.step

    def run_step(self, n_run: int = 1) -> bool:
        """Run the next step, if there is one."""
        step = self.decide()
        if step is None:
            return False
        self.step = None
        self._on_step(step)
        assert 0 < sum(len(part.tokens) for part in step.work) <= self.limits.n_batch
        self.fed += [self.by_seq[p.seq_id] for p in step.work if len(p.tokens) > 1]
        tokens = {}
        accepted = {}
        for part in step.work:
            self._feed(part)
            if part.sample:
                said = self._follow(part)
                tokens[part.seq_id] = said[0]
                if part.n_draft:
                    accepted[part.seq_id] = said[1:]
                    self.n_drafted += part.n_draft
                    self.pool.remove(part.seq_id, part.position + len(said))
        run: list[int] = []
        (first, *others) = step.work
        while not others and len(run) + 1 < min(n_run, step.repeat):
            token = run[-1] if run else tokens[first.seq_id]
            if self._stopped(first.seq_id):
                break
            position = len(self.pool.sequences[first.seq_id])
            work = SequenceWork(
                seq_id=first.seq_id, tokens=(token,), position=position, sample=True
            )
            self.pool.feed(work)
            run.append(self._sample(first.seq_id))
        stopped = [seq_id for seq_id in tokens if self._stopped(seq_id)]
        self.give(Stepped(tokens=tokens, stopped=stopped, run=run, accepted=accepted))
        return True

    def cut_step(self, *, no_room: bool = False) -> None:
        """Decide on a step, and do not run it."""
        if self.decide() is not None:
            self.step = None
            self.give(StepCut(no_room=no_room))

    def finish(self, n_run: int = 1) -> None:
        """Until nothing is left to do."""
        for _ in range(5_000):
            if not self.run_step(n_run):
                break
        assert self.core.idle
        assert self.ends.keys() == self.requests.keys()

    # -- the driver

    def give(self, event: Event) -> bool:
        events, active = [event], False
        while events:
            self.now += 1
            for action in self.core.on_event(events.pop(0), self.now):
                active = True
                events += self._do(action)
        return active

    def _do(self, action: Action) -> list[Event]:
        match action:
            case Admit():
                return [self._admit(action)]
            case Preempt():
                return [self._preempt(action)]
            case Evict():
                if not self.pool.remove(action.seq_id, action.n_keep) and action.n_keep:
                    return [Lost(seq_id=action.seq_id)]
            case Shelve():
                assert self.pool.share(action.seq_id, action.to, action.n)
                self.pool.remove(action.seq_id, 0)
            case Copy():
                if not self.pool.share(action.source, action.to, action.n):
                    return [Lost(seq_id=action.to)]
            case Discard():
                del self.states[action.request_id]
            case Draft():
                return [self._draft(action)]
            case Step():
                assert self.step is None
                self.step = action
            case Finish() | Refuse():
                self._end(action)
            case Progress():
                assert 0 < action.n_done <= action.n_prompt
        return []

    def _draft(self, action: Draft) -> Drafted:
        """As a draft model that is right two times in three, and now and then knows nothing."""
        guesses: dict[int, Tokens] = {}
        for wanted in action.wanted:
            name = self.by_seq[wanted.seq_id]
            known = (*self.requests[name].prompt, *self.streams[name])
            assert tuple(wanted.tokens) == known
            if len(known) % 5:
                said = solo(known, wanted.n, speech=self._speech)
                guesses[wanted.seq_id] = tuple(
                    t + (len(known) + i) % 3 // 2 for i, t in enumerate(said)
                )
        return Drafted(guesses=guesses)

    def _admit(self, action: Admit) -> Admitted:
        name = action.request_id
        assert action.seq_id not in self.by_seq
        if action.source is None:
            kept = self.pool.remove(action.seq_id, action.n_keep)
        else:
            kept = self.pool.share(action.source, action.seq_id, action.n_keep)
        n_kept = action.n_keep if kept else 0
        if action.restore:
            tokens = self.states.pop(name)
            if kept:
                self.pool.restore(action.seq_id, tokens)
                n_kept += len(tokens)
        known = (*self.requests[name].prompt, *self.streams[name])
        assert self.pool.tokens(action.seq_id) == known[:n_kept]
        self.by_seq[action.seq_id] = name
        self.admitted.append(name)
        return Admitted(seq_id=action.seq_id, n_kept=n_kept)

    def _preempt(self, action: Preempt) -> Parked:
        name = self.by_seq.pop(action.seq_id)
        assert name == action.request_id
        tokens = self.pool.tokens(action.seq_id)[action.start : action.end]
        size = 4 * len(tokens)
        self.pool.remove(action.seq_id, 0)
        self.preempted.append(name)
        if size > action.limit_bytes:
            size = 0
        else:
            self.states[name] = tokens
        assert self.state_bytes <= self.limits.state_bytes
        return Parked(request_id=name, state_bytes=size)

    @property
    def state_bytes(self) -> int:
        return sum(4 * len(state) for state in self.states.values())

    def _end(self, end: Finish | Refuse) -> None:
        name = end.request_id
        assert name not in self.ends
        self.ends[name] = end
        self.states.pop(name, None)
        if isinstance(end, Finish) and end.seq_id is not None:
            assert self.by_seq.pop(end.seq_id) == name

    def _feed(self, part: SequenceWork) -> None:
        name = self.by_seq[part.seq_id]
        n_prompt = len(self.requests[name].prompt)
        self.n_fed_prompt += max(0, min(n_prompt - part.position, len(part.tokens)))
        self.pool.feed(part)

    def _follow(self, part: SequenceWork) -> list[int]:
        """What it samples, for as long as that is its draft and its stream goes on."""
        end = part.position + len(part.tokens) - part.n_draft
        said = []
        for n in range(part.n_draft + 1):
            said.append(self._sample(part.seq_id, end + n))
            wrong = n < part.n_draft and said[-1] != part.tokens[n - part.n_draft]
            if wrong or self._stopped(part.seq_id):
                break
        return said

    def _sample(self, seq_id: int, end: int | None = None) -> int:
        token = self._speech(self.pool.tokens(seq_id)[:end])
        self.streams[self.by_seq[seq_id]].append(token)
        return token

    def _stopped(self, seq_id: int) -> bool:
        name = self.by_seq[seq_id]
        return self.stops[name] and self.streams[name][-1] == END

    # -- what must hold at any time

    def check(self) -> None:
        stats = self.core.stats()
        assert stats.n_cells_used == self.pool.n_used <= self.limits.n_ctx
        assert stats.n_running + stats.n_queued == len(self.requests) - len(self.ends)
        assert stats.state_bytes == self.state_bytes
        for seq_id in self.pool.sequences:
            assert self.core.cells(seq_id) == self.pool.tokens(seq_id)

    def check_streams(self) -> None:
        """Every stream is what a solo run gives, as far as it got."""
        for name, request in self.requests.items():
            stream = tuple(self.streams[name])
            assert stream == solo(
                request.prompt, len(stream), stops=self.stops[name], speech=self._speech
            )
            end = self.ends.get(name)
            if isinstance(end, Finish):
                assert end.n_generated == len(stream)
                assert end.finish_reason == self._reason(name) or (end.finish_reason == "cancelled")

    def check_drafts(self) -> None:
        """What was counted is what was fed."""
        stats = self.core.stats()
        assert stats.n_drafted_tokens == self.n_drafted >= stats.n_accepted_tokens
        ends = [end for end in self.ends.values() if isinstance(end, Finish)]
        assert sum(end.n_accepted for end in ends) == stats.n_accepted_tokens
        assert sum(end.n_drafted for end in ends) == stats.n_drafted_tokens

    def _reason(self, name: str) -> str:
        stream = self.streams[name]
        return "stop" if self.stops[name] and stream[-1:] == [END] else "length"

    def reasons(self) -> Mapping[str, str]:
        return {
            name: end.finish_reason if isinstance(end, Finish) else "refused"
            for name, end in self.ends.items()
        }
