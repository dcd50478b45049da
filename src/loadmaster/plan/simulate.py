"""How long a job takes under given settings: its steps, played through without a model.

The scheduler's rules in the large: sequences are admitted while a slot and cells are free, prompts
are fed beside answers as far as `n_ubatch` goes, oldest first, a shared prefix once. Steps between
two changes are alike and are summed at once. Of a long job a part is played and the rest goes on
at the rate that the part had settled to.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil
from typing import Protocol

from loadmaster.machine.types import Machine
from loadmaster.model.types import ModelSpec
from loadmaster.plan.batch import JobOutline, unshared
from loadmaster.plan.forecast import forecast
from loadmaster.plan.job_items import PlayedItem, items_of
from loadmaster.plan.rates import Basis, Rates
from loadmaster.plan.speed import Traffic
from loadmaster.plan.steps import Pass, Step, StepCosts
from loadmaster.plan.types import AnySettings, EngineSettings

# Of a longer job, so many rounds of all sequences are played, and at least so many items.
_ROUNDS = 4
_PLAYED_ITEMS = 256
# Steps that are summed at once: depth grows meanwhile, and cost is not quite linear in it.
_MOST_AT_ONCE = 128
# Steps of every running request that must fit before another is admitted (scheduler.core).
_LOOKAHEAD_STEPS = 16
_NO_LIMIT = 1 << 60
# The scheduler, the driver and the wire, for a step of several sequences and for each of them
# (`benchmarks.batch_overhead` on a 2.3 GHz Xeon).
_DRIVER_STEP_S = 20e-6
_DRIVER_SEQUENCE_S = 12e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPrediction:
    """A job under given settings."""

    seconds: float
    n_items: int
    prefilled_tokens: int
    generated_tokens: int
    n_steps: int
    peak_cells: int
    n_preempted: int
    costs: Mapping[str, float]  # seconds by what bounds them
    basis: Basis

    @property
    def bound_by(self) -> str:
        """What takes the most time."""
        return max(self.costs, key=lambda cause: self.costs[cause], default="overhead")

    @property
    def generated_tok_s(self) -> float:
        """Tokens of answers, over the whole time."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def items_per_hour(self) -> float:
        """Finished requests."""
        return 3600 * self.n_items / self.seconds if self.seconds else 0.0


def job_prediction(
    machine: Machine, model: ModelSpec, settings: EngineSettings, job: JobOutline
) -> JobPrediction:
    """How long `job` takes on `machine` once the model is open under `settings`, and why.

    `machine` with `measured` set (`tasks.measured.with_measurements`) predicts from this machine's
    own kernels; `settings` are those the engine was opened with (`Plan.engine`); `job` comes from
    `plan.batch.outline_of([(prompt_tokens, n_output_tokens), …])` in the order of submission.
    """
    found = forecast(machine, model, settings)
    return simulate(found.traffic, found.rates, settings, job)


def simulate(
    traffic: Traffic,
    rates: Rates,
    settings: EngineSettings,
    job: JobOutline,
    *,
    rounds: int = _ROUNDS,
) -> JobPrediction:
    """Play a job, or enough of it: at least `rounds` (three or more) of all sequences."""
    if settings.n_seq_max > 1 and not settings.kv_unified:
        job = unshared(job)
    costs = StepCosts(traffic, rates, settings)
    return play_job(costs, settings, job, rates.basis, rounds=rounds)


class Costs(Protocol):
    """What prices the steps of a job: an engine's model of its own speed."""

    def of(self, step: Step, passes: Sequence[Pass] = ()) -> dict[str, float]:
        """Seconds of a step by what bounds them."""


def play_job(
    costs: Costs,
    settings: AnySettings,
    job: JobOutline,
    basis: Basis,
    *,
    rounds: int = _ROUNDS,
) -> JobPrediction:
    """The same with an engine's own costs; `job` shares what the engine's caches share."""
    n = settings.n_seq_max
    played = n * max(rounds, ceil(_PLAYED_ITEMS / n))
    items = items_of(job)
    if job.n_items <= played + n:
        play = _Play(costs, settings, job)
        play.run(items)
        return _prediction(play, basis)
    play = _Play(costs, settings, job)
    play.run(islice(items, played))
    return _prolonged(_prediction(play, basis), play, job, n)


@dataclass(slots=True)
class _Prompt:
    """An item whose prompt is being fed."""

    item: PlayedItem
    left: float


@dataclass(slots=True, order=True)
class _Answer:
    """An item that decodes: the step it ends at, its rank, and the cells it sees."""

    ends: int
    rank: int
    item: PlayedItem = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Parked:
    """A preempted answer, the tokens it still owes, and whether its state was saved."""

    answer: _Answer
    owed: int
    saved: bool

    @property
    def held(self) -> float:
        """Cells of its own that it had."""
        return _held(self.answer, self.owed)


class _Play:
    """The state of a job that is played. `run` plays it to the end."""

    def __init__(self, costs: Costs, settings: AnySettings, job: JobOutline) -> None:
        self._costs = costs
        self._settings = settings
        # In slots every sequence has cells for the longest item: nobody waits for another's.
        self._n_cells = settings.n_ctx if isinstance(settings, EngineSettings) else _NO_LIMIT
        self._job = job
        self._queue: deque[PlayedItem] = deque()
        self._prompts: deque[_Prompt] = deque()
        self._answers: list[_Answer] = []  # a heap
        self._parked: list[_Parked] = []
        self._depths = 0.0  # cells that the decoding sequences see, summed
        self._own = 0.0  # cells in use, without shared prefixes
        self._n_started = 0
        self.step = 0  # steps so far; each gives every decoding sequence a token
        self.seconds = 0.0
        self.n_preempted = 0
        self.prefilled = 0.0
        self.fed_again = 0.0
        self.generated = 0
        self.peak = 0.0
        self.by_cause: dict[str, float] = {}
        self.finished_s: list[float] = []

    def run(self, items: Iterable[PlayedItem]) -> None:
        """Play until all items are finished."""
        self._queue.extend(items)
        self._admit()
        while self._prompts or self._answers or self._parked:
            self._advance()
            self._admit()

    @property
    def _n_running(self) -> int:
        return len(self._prompts) + len(self._answers)

    def _cells_with(self, n_running: int) -> float:
        """Cells in use, were so many items running."""
        return self._own + self._job.prefix_cells(n_running)

    # -- who runs

    def _admit(self) -> None:
        """Whoever's prompt and next steps fit beside those of the others; one alone always does."""
        while self._parked or self._queue:
            if self._n_running >= self._settings.n_seq_max:
                return
            fresh = self._parked[-1].held if self._parked else self._queue[0].own_fed
            promised = sum(prompt.left * prompt.item.own_part for prompt in self._prompts)
            promised += _LOOKAHEAD_STEPS * (self._n_running + 1)
            needed = self._cells_with(self._n_running + 1) + promised + fresh
            if self._n_running and needed > self._n_cells:
                return
            if self._parked:
                self._restore(self._parked.pop())
            else:
                item = self._queue.popleft()
                self._prompts.append(_Prompt(item, item.fed))

    def _preempt(self) -> None:
        """Cells ran out: the last in rank gives its own up and goes on later."""
        last = max(self._answers, key=lambda answer: answer.rank)
        self._answers.remove(last)
        heapq.heapify(self._answers)
        owed = last.ends - self.step
        held = _held(last, owed)
        self._own -= held
        self._depths -= last.item.depth(owed)
        # Saved states take no more than the caches they come from (plan.ledger).
        saved = held + sum(each.held for each in self._parked if each.saved) <= self._n_cells
        self._parked.append(_Parked(last, owed, saved))
        self.n_preempted += 1

    def _restore(self, parked: _Parked) -> None:
        answer, owed = parked.answer, parked.owed
        if not parked.saved:
            self._feed_again(parked.held)
        answer.ends = self.step + owed
        heapq.heappush(self._answers, answer)
        self._own += parked.held
        self._depths += answer.item.depth(owed)

    def _feed_again(self, held: float) -> None:
        """What it had is fed once more; beside a step of the others, which is counted elsewhere."""
        step = Step(n_decode=0, n_prefill=ceil(held), prefill_cells=held / 2, used_cells=self._own)
        for cause, seconds in self._costs.of(step).items():
            self._spend(cause, seconds)
        self.fed_again += held

    # -- steps

    def _advance(self) -> None:
        """Some steps that are alike, or one in which a prompt ends."""
        n = len(self._answers)
        free = self._n_cells - self._cells_with(self._n_running)
        while n > 1 and free < n:
            self._preempt()
            n -= 1
            free = self._n_cells - self._cells_with(self._n_running)
        room = float(max(0, self._settings.n_ubatch - n))
        n_steps = min(_MOST_AT_ONCE, self._answers[0].ends - self.step if n else _MOST_AT_ONCE)
        if not self._prompts or not room:
            n_steps = max(1, min(n_steps, int(free // n))) if n > 1 else n_steps
            return self._account(n_steps)
        head = self._prompts[0]
        if head.left > room:
            n_steps = min(n_steps, ceil(head.left / room) - 1)
            depth = head.item.found + head.item.fed - head.left + n_steps * room / 2
            head.left -= n_steps * room
            return self._account(
                n_steps, fed=room, fed_cells=depth, own=room * head.item.own_part, n_chunks=1
            )
        return self._feed(room)

    def _feed(self, room: float) -> None:
        """One step that ends at least the oldest prompt, and others as far as there is room."""
        fed = depths = own = 0.0
        n_chunks = 0
        ended: list[PlayedItem] = []
        while self._prompts and fed < room:
            head = self._prompts[0]
            chunk = min(head.left, room - fed)
            depths += chunk * (head.item.found + head.item.fed - head.left + chunk / 2)
            fed += chunk
            n_chunks += 1
            own += chunk * head.item.own_part
            head.left -= chunk
            if head.left <= 0:
                ended.append(self._prompts.popleft().item)
        self._account(
            1,
            fed=fed,
            fed_cells=depths / fed if fed else 0.0,
            own=own,
            n_chunks=n_chunks,
            n_ended=len(ended),
        )
        for item in ended:
            self._answer(item)

    def _answer(self, item: PlayedItem) -> None:
        """The prompt is fed, and the first token of the answer was sampled with it."""
        if item.output == 1:
            self._finish(item)
            return
        self._n_started += 1
        heapq.heappush(self._answers, _Answer(self.step + item.output - 1, self._n_started, item))
        self._depths += item.depth(item.output - 1)

    def _account(
        self,
        n_steps: int,
        *,
        fed: float = 0.0,
        fed_cells: float = 0.0,
        own: float = 0.0,
        n_chunks: int = 0,
        n_ended: int = 0,
    ) -> None:
        """Time of steps that are alike, by their middle one; then what they changed."""
        n = len(self._answers)
        grown = n * n_steps
        used = self._cells_with(self._n_running) + (grown + own * n_steps) / 2
        step = Step(
            n_decode=n,
            n_prefill=ceil(fed),
            n_outputs=n + n_ended,
            decode_cells=(self._depths + grown / 2) / n if n else 0.0,
            prefill_cells=fed_cells,
            used_cells=used,
            n_chunks=n_chunks,
        )
        for cause, seconds in self._costs.of(step, self._passes(step, n_chunks)).items():
            self._spend(cause, n_steps * seconds)
        if self._settings.n_seq_max > 1:
            driver_s = _DRIVER_STEP_S + _DRIVER_SEQUENCE_S * step.n_outputs
            self._spend("overhead", n_steps * driver_s)
        self.step += n_steps
        self.prefilled += fed * n_steps
        self.generated += grown + n_ended
        self._own += grown + own * n_steps
        self._depths += grown
        self.peak = max(self.peak, self._cells_with(self._n_running))
        while self._answers and self._answers[0].ends <= self.step:
            item = heapq.heappop(self._answers).item
            self._depths -= item.depth(0)
            self._finish(item)

    def _spend(self, cause: str, seconds: float) -> None:
        self.by_cause[cause] = self.by_cause.get(cause, 0.0) + seconds
        self.seconds += seconds

    def _passes(self, step: Step, n_chunks: int) -> tuple[Pass, ...]:
        """With a cache for each sequence the engine takes equally many tokens of all at once, of
        sequences whose ids follow each other (llama_batch_allocr::split_equal): a token of
        everyone, then what is left of each prompt. Where ids are free, those in use lie apart."""
        n_slots = self._settings.n_seq_max
        if self._settings.kv_unified or n_slots == 1:
            return ()
        n = max(1, min(self._n_running, step.n_tokens))
        n_runs = n * (n_slots - n + 1) / n_slots
        passes = [Pass(ceil(n / n_runs), ceil(step.n_outputs / n_runs), n_runs)]
        left = step.n_tokens - n
        if n_chunks and left > 0:
            passes.append(Pass(ceil(left / n_chunks), 0, n_chunks))
        return tuple(passes)

    def _finish(self, item: PlayedItem) -> None:
        self._own = max(0.0, self._own - item.own_fed - (item.output - 1))
        self.finished_s.append(self.seconds)


def _held(answer: _Answer, owed: int) -> float:
    """Cells of its own that an item has, which still owes so many tokens."""
    return answer.item.own_fed + answer.item.output - 1 - owed


def _prediction(play: _Play, basis: Basis) -> JobPrediction:
    return JobPrediction(
        seconds=play.seconds,
        n_items=len(play.finished_s),
        prefilled_tokens=round(play.prefilled + play.fed_again),
        generated_tokens=play.generated,
        n_steps=play.step,
        peak_cells=round(play.peak),
        n_preempted=play.n_preempted,
        costs=play.by_cause,
        basis=basis,
    )


def _prolonged(part: JobPrediction, play: _Play, job: JobOutline, n: int) -> JobPrediction:
    """The whole job: the part, and the rest at the rate between its first and its last round."""
    first, last = play.finished_s[n - 1], play.finished_s[-n - 1]
    rate = (len(play.finished_s) - 2 * n) / (last - first)
    rest_s = (job.n_items - part.n_items) / rate
    share = (part.seconds + rest_s) / part.seconds
    return replace(
        part,
        seconds=part.seconds + rest_s,
        n_items=job.n_items,
        prefilled_tokens=job.distinct_tokens + round(play.fed_again * share),
        generated_tokens=job.output_tokens,
        n_steps=round(part.n_steps * share),
        n_preempted=round(part.n_preempted * share),
        costs={cause: seconds * share for cause, seconds in part.costs.items()},
    )
