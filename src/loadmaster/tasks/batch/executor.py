"""The executor of a job: keeps the engine supplied, commits what comes back, survives its deaths.

One thread owns the job. It waits on one inbox: events of requests, items made ready, and calls to
stop. Nothing counts before it is committed; what is lost on the way is computed again.
"""

import queue
from collections.abc import Collection

from loadmaster.engine.types import DoneEvent
from loadmaster.errors import EngineCrashedError, EngineError, LoadmasterError, UsageError
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import ItemResult
from loadmaster.tasks.api.openai_requests import EmbeddingRequest
from loadmaster.tasks.batch.commits import Commits
from loadmaster.tasks.batch.flights import Flight, Flights, judge
from loadmaster.tasks.batch.gate import Gate
from loadmaster.tasks.batch.items import (
    Ready,
    embedding_result,
    failed_result,
    generation_result,
)
from loadmaster.tasks.batch.launcher import Embedded, Launcher, Message, RequestEvent, new_flight
from loadmaster.tasks.batch.model import BatchModel
from loadmaster.tasks.batch.policy import Clock, Policy, StopReason
from loadmaster.tasks.batch.progress import RunState, Tally, Watcher
from loadmaster.tasks.batch.supply import Supply

TICK_S = 0.5  # how often the clocks and the store's cancel flag are looked at
MOST_DEATHS = 5  # workers in a row that died before an item ended
REOPEN_PAUSES_S = (5.0, 60.0)
EMBED_INPUTS = 64  # of one call
EMBED_CALLS = 2  # one under way, the next behind it


class DeadlineError(LoadmasterError):
    """An item took longer than its deadline."""

    code = "deadline_exceeded"


class Executor:
    """Runs a job, or some items of it, on an open model. `run` may be called again for others."""

    def __init__(
        self,
        store: JobStore,
        model: BatchModel,
        policy: Policy,
        watcher: Watcher,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._model = model
        self._policy = policy
        self._watcher = watcher
        self._clock = clock or Clock()
        self._gate = Gate(policy, self._clock)
        self._launcher = Launcher(model)
        self._is_open = True  # the model
        self._deaths_in_a_row = 0
        self._attempts: dict[int, int] = {}
        self._flights = Flights()
        now = self._clock.monotonic_s()
        self._tally = Tally(store.counts(), store.cost_left(), now)
        self._commits = Commits(store, self._tally, watcher, self._clock)
        self._looked_s = float("-inf")

    # -- from any thread

    def stop(self, reason: StopReason = "interrupted", *, at_once: bool = False) -> None:
        """End the run: what is in flight may end within the policy's `drain_s`, or not even that.

        Callable from a signal handler.
        """
        self._gate.stop(reason, at_once=at_once)
        self._launcher.wake()

    def close(self) -> None:
        """No more runs."""
        self._launcher.close()

    # -- the run

    def run(self, only: Collection[int] | None = None) -> StopReason:
        """Run until no item is left, or until something ends the run; committed either way.

        Raises:
            EngineError: the engine cannot be kept alive.
            JobStoreError: the disk refused a commit; what was acknowledged before is safe.
        """
        self._supply = Supply(
            self._store.pending(),
            self._model,
            n_ahead=self._n_wanted + 8,
            on_ready=self._launcher.wake,
            only=only,
        )
        try:
            self._loop()
        finally:
            self._give_up()
            self._flights.clear()
            self._launcher.retire()
            self._supply.close()
        return self._gate.reason or "finished"

    def _loop(self) -> None:
        while True:
            self._look_around()
            self._collect()
            self._launch()
            if self._is_over():
                break
            self._take_events()
            self._commits.commit_if_due()
        if self._gate.reason is None:
            self._commits.pass_verdicts()
        self._commits.commit()
        self._watcher.state(self.state())

    def _is_over(self) -> bool:
        if self._flights:
            return False
        return self._gate.reason is not None or self._supply.exhausted

    @property
    def _n_wanted(self) -> int:
        """Requests in the engine: those that run, and some for its scheduler to choose from."""
        n_sequences = self._model.n_sequences
        return n_sequences + min(32, max(2, n_sequences // 2))

    def state(self) -> RunState:
        """How far the run is."""
        return self._tally.state(
            self._clock.monotonic_s(), in_flight=len(self._flights), waiting=self._gate.waiting
        )

    # -- looking around

    def _look_around(self) -> None:
        now = self._clock.monotonic_s()
        is_tick = now - self._looked_s >= TICK_S
        self._gate.look(
            generated_tokens=self._tally.generated_tokens,
            run_s=self._tally.run_s(now),
            cancel_asked=is_tick and self._store.cancel_asked(),
        )
        if self._gate.drain_is_over:
            self._give_up()
        self._follow_window(now)
        if is_tick:
            self._looked_s = now
            self._check_deadlines(now)
            self._watcher.state(self.state())

    def _check_deadlines(self, now: float) -> None:
        if self._policy.deadline_s is None:
            return
        for flight in self._flights:
            if now - flight.started_s > self._policy.deadline_s and not flight.expired:
                flight.expired = True
                self._cancel(flight)

    def _give_up(self) -> None:
        """Cancel what is in flight; it is pending still."""
        for flight in self._flights:
            if not flight.given_up:
                flight.given_up = True
                self._cancel(flight)

    def _cancel(self, flight: Flight) -> None:
        for request_id in sorted(flight.open):
            self._model.cancel(request_id)

    def _follow_window(self, now: float) -> None:
        """A model that waits for its window gives its memory back."""
        waiting = self._gate.waiting is not None and not self._flights
        self._tally.idle(waiting, now)
        if waiting and self._is_open:
            self._watcher.say(f"{self._gate.waiting}; the model is closed until then")
            self._commits.commit()
            self._supply.settle()
            self._model.close()
            self._is_open = False
        elif self._gate.may_start and not self._is_open:
            self._watcher.say("the window is open")
            self._reopen()

    # -- launching

    def _collect(self) -> None:
        try:
            refused = self._supply.collect()
        except EngineError as error:
            if self._is_open:
                self._recover(error)
            return
        for entry in refused:
            self._commits.add(entry.item, failed_result(entry.item, entry.error))

    def _launch(self) -> None:
        if not self._gate.may_start or not self._is_open:
            return
        if self._supply.has_suspects:
            if not self._flights and (ready := self._supply.next_suspect()):
                self._start(ready)
            return
        while self._has_room and (ready := self._supply.next()):
            self._start(ready)

    @property
    def _has_room(self) -> bool:
        return (
            self._is_open
            and not self._supply.has_suspects
            and self._flights.n_requests < self._n_wanted
            and self._launcher.n_embedding < EMBED_CALLS
        )

    def _start(self, ready: Ready) -> None:
        flight = self._enter(ready)
        try:
            if isinstance(ready.request, EmbeddingRequest):
                self._launcher.embed((flight, *self._more_to_embed(ready)))
            else:
                self._launcher.start(flight)
        except UsageError as error:
            self._fail(flight, error)
        except EngineError as error:
            self._recover(error)

    def _enter(self, ready: Ready) -> Flight:
        flight = new_flight(ready, self._clock.monotonic_s())
        self._flights.add(flight)
        return flight

    def _more_to_embed(self, first: Ready) -> list[Flight]:
        """Items that share a call with the first one."""
        flights: list[Flight] = []
        n_inputs = len(first.prompts)
        while not first.alone and n_inputs < EMBED_INPUTS and (ready := self._supply.next()):
            if not isinstance(ready.request, EmbeddingRequest):
                self._supply.put_back(ready)
                break
            n_inputs += len(ready.prompts)
            flights.append(self._enter(ready))
        return flights

    # -- what comes back

    def _take_events(self) -> None:
        """Wait for one message, then take all that are there."""
        inbox = self._launcher.inbox
        try:
            self._take(inbox.get(timeout=self._commits.patience_s(TICK_S)))
            while True:
                self._take(inbox.get_nowait())
        except queue.Empty:
            return

    def _take(self, message: Message) -> None:
        if isinstance(message, RequestEvent):
            if message.generation == self._launcher.generation:
                self._take_event(message)
        elif isinstance(message, Embedded) and message.generation == self._launcher.generation:
            self._launcher.n_embedding -= 1
            self._take_vectors(message)

    def _take_event(self, message: RequestEvent) -> None:
        flight = self._flights.of(message.request_id)
        if flight is None:
            return
        event = message.event
        if isinstance(event, LoadmasterError):
            self._end_badly(flight, event)
            return
        gathering = flight.gathering(message.request_id)
        before = gathering.n_tokens
        gathering.take(event)
        self._tally.generated_tokens += gathering.n_tokens - before
        if isinstance(event, DoneEvent):
            flight.open.discard(message.request_id)
            self._take_done(flight, event)

    def _take_done(self, flight: Flight, done: DoneEvent) -> None:
        if done.finish_reason == "failed":
            reason = f"the engine failed after {done.n_generated} tokens: {done.error}"
            self._end_badly(flight, EngineError(reason))
        elif done.finish_reason == "cancelled":
            self._end_cancelled(flight)
        elif not flight.open:
            self._land(
                flight,
                generation_result(
                    flight.ready,
                    flight.gatherings,
                    model=self._model.name,
                    created=int(self._clock.wall_s()),
                ),
            )

    def _take_vectors(self, message: Embedded) -> None:
        flights = [flight for flight in message.flights if flight in self._flights]
        if isinstance(message.outcome, LoadmasterError):
            self._end_embedding_badly(flights, message.outcome)
            return
        vectors = iter(message.outcome)
        for flight in message.flights:
            own = [next(vectors) for _ in flight.ready.prompts]
            if flight.given_up or flight not in self._flights:
                continue
            self._land(flight, embedding_result(flight.ready, own, model=self._model.name))

    def _end_embedding_badly(self, flights: list[Flight], error: LoadmasterError) -> None:
        if isinstance(error, UsageError) and len(flights) > 1:
            for flight in flights:  # one of them is at fault: each by itself
                self._launcher.embed((flight,))
            return
        for flight in flights:
            if flight in self._flights:
                self._end_badly(flight, error)

    # -- ends of items

    def _land(self, flight: Flight, result: ItemResult) -> None:
        self._flights.land(flight)
        self._attempts.pop(flight.number, None)
        self._commits.add(flight.ready.item, result)
        if not result.failed:
            self._deaths_in_a_row = 0

    def _fail(self, flight: Flight, error: LoadmasterError) -> None:
        for request_id in sorted(flight.open):
            self._model.cancel(request_id)  # other choices of the item
        self._land(flight, failed_result(flight.ready.item, error, flight.dones))

    def _end_cancelled(self, flight: Flight) -> None:
        if flight.expired:
            deadline = self._policy.deadline_s
            self._fail(flight, DeadlineError(f"not done within its deadline of {deadline:g} s"))
        elif flight.given_up:
            self._cancel(flight)
            self._flights.land(flight)
        else:
            self._try_again(flight, EngineError("the engine cancelled it"))

    def _end_badly(self, flight: Flight, error: LoadmasterError) -> None:
        """A request ended with an error: the worker's death, the request's fault, or neither."""
        if self._model.failure is not None:
            self._recover(error)
        elif isinstance(error, EngineError):
            self._try_again(flight, error)
        else:
            self._fail(flight, error)

    def _try_again(self, flight: Flight, error: LoadmasterError) -> None:
        """Once more, while the policy's retries last."""
        attempts = self._attempts[flight.number] = self._attempts.get(flight.number, 0) + 1
        if attempts > self._policy.retries:
            self._fail(flight, error)
            return
        self._cancel(flight)
        self._flights.land(flight)
        self._supply.put_back(flight.ready)

    # -- deaths of workers

    def _recover(self, error: LoadmasterError) -> None:
        """The worker died: note who was in flight, and open the model again.

        Raises:
            EngineError: it died too often without an item's end, or does not open any more.
        """
        death = self._model.failure or error
        flights = self._flights.clear()
        self._launcher.retire()
        self._commits.commit()
        self._store.add_deaths(flight.number for flight in flights)
        self._judge(flights, death)
        self._deaths_in_a_row += 1
        self._supply.settle()
        if self._deaths_in_a_row > MOST_DEATHS:
            raise _hopeless(death, self._deaths_in_a_row)
        if self._gate.reason is None:
            self._watcher.say(f"{death.message}; opening the model again")
            self._reopen()

    def _judge(self, flights: list[Flight], death: LoadmasterError) -> None:
        verdict = judge(flights)
        for ready in reversed(verdict.others):
            self._supply.put_back(ready)
        for ready in reversed(verdict.alone):
            self._supply.put_back(ready)
        if verdict.guilty is not None:
            item = verdict.guilty.item
            reason = f"{item.deaths} workers died while it ran: {death.message}"
            self._commits.hold(item, failed_result(item, EngineCrashedError(reason)))
            self._supply.release_suspects()

    def _reopen(self) -> None:
        """Open the model again; a driver may take a while to give a dead process's memory back."""
        for pause_s in REOPEN_PAUSES_S:
            try:
                self._model.reopen()
                break
            except LoadmasterError as error:
                if self._gate.reason is not None:
                    raise
                self._watcher.say(f"{error.message}; trying again in {pause_s:.0f} s")
                self._clock.sleep(pause_s)
        else:
            self._model.reopen()
        self._is_open = True


def _hopeless(death: LoadmasterError, count: int) -> EngineError:
    return EngineError(
        f"{count} workers in a row died before any item ended, the last one with: {death.message}",
        hint="`loadmaster doctor` checks the machine; `batch resume` goes on from here",
    )
