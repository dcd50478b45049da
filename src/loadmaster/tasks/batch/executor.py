"""The executor of a job: keeps the engine supplied, commits what comes back, survives its deaths.

One thread owns the job. It waits on one inbox: events of requests, items made ready, and calls to
stop. Nothing counts before it is committed; what is lost on the way is computed again.
"""

import queue
from collections.abc import Collection

from loadmaster.errors import EngineCrashedError, EngineError, LoadmasterError, UsageError
from loadmaster.jobs.store import JobStore
from loadmaster.tasks.api.openai_requests import EmbeddingRequest
from loadmaster.tasks.batch.commits import Commits
from loadmaster.tasks.batch.flights import Flight, Flights, judge
from loadmaster.tasks.batch.gate import Gate
from loadmaster.tasks.batch.items import Ready, Refused, failed_result
from loadmaster.tasks.batch.landing import Landing
from loadmaster.tasks.batch.launcher import Launcher, new_flight
from loadmaster.tasks.batch.lives import Lives
from loadmaster.tasks.batch.model import BatchModel
from loadmaster.tasks.batch.policy import Clock, Policy, StopReason
from loadmaster.tasks.batch.progress import RunState, Tally, Watcher
from loadmaster.tasks.batch.supply import Supply

TICK_S = 0.5  # how often the clocks and the store's cancel flag are looked at


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
        self._lives = Lives(model, self._gate, watcher, self._clock)
        self._flights = Flights()
        now = self._clock.monotonic_s()
        self._tally = Tally(store.counts(), store.cost_left(), now)
        self._commits = Commits(store, self._tally, watcher, self._clock)
        self._landing = Landing(
            model,
            policy,
            self._clock,
            flights=self._flights,
            launcher=self._launcher,
            commits=self._commits,
            tally=self._tally,
            on_answer=self._lives.proved,
            on_death=self._recover,
            put_back=lambda ready: self._supply.put_back(ready),
        )
        self._looked_s = float("-inf")

    # -- from any thread

    def stop(self, reason: StopReason = "interrupted", *, at_once: bool = False) -> None:
        """End the run: what is in flight may end within the policy's `drain_s`, or not even that.

        Callable from a signal handler.
        """
        self._gate.stop(reason, at_once=at_once)
        self._launcher.wake()

    def wake(self) -> None:
        """Have the run look around now."""
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
            self._tally.idle(True, self._clock.monotonic_s())  # a person may be asked what next
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
        return n_sequences + min(self._model.pace.most_ahead, max(2, n_sequences // 2))

    def state(self) -> RunState:
        """How far the run is."""
        return self._tally.state(
            self._clock.monotonic_s(), in_flight=len(self._flights), waiting=self._gate.waiting
        )

    @property
    def idle_s(self) -> float:
        """Seconds that it waited so far, for its window or for others."""
        return self._tally.idle_s(self._clock.monotonic_s())

    # -- looking around

    def _look_around(self) -> None:
        now = self._clock.monotonic_s()
        is_tick = now - self._looked_s >= TICK_S
        self._gate.look(
            generated_tokens=self._tally.generated_tokens,
            run_s=self._tally.run_s(now),
            cancel_asked=is_tick and self._store.cancel_asked(),
            withheld=self._model.withheld,
        )
        if self._gate.drain_is_over:
            self._give_up()
        self._follow_gate(now)
        if is_tick:
            self._looked_s = now
            self._check_deadlines(now)
            self._watcher.state(self.state())

    def _check_deadlines(self, now: float) -> None:
        if self._policy.deadline_s is None:
            return
        for flight in self._flights:
            begun_s = now if flight.begun_s is None else flight.begun_s
            if now - begun_s > self._policy.deadline_s and not flight.expired:
                flight.expired = True
                self._landing.cancel(flight)

    def _give_up(self) -> None:
        """Cancel what is in flight; it is pending still."""
        for flight in self._flights:
            if not flight.given_up:
                flight.given_up = True
                self._landing.cancel(flight)

    def _follow_gate(self, now: float) -> None:
        """While the run waits, for its window or for others, its model is closed."""
        waiting = self._gate.waiting is not None and not self._flights
        self._tally.idle(waiting, now)
        if waiting and self._lives.is_open:
            self._watcher.say(f"{self._gate.waiting}; the model is closed until then")
            self._commits.commit()
            self._supply.settle()
            self._lives.close()
        elif self._gate.may_start and not self._lives.is_open:
            self._lives.go_on(patiently=self._policy.window is not None)

    # -- launching

    def _collect(self) -> None:
        refused: list[Refused] = []
        try:
            refused = self._supply.collect()
        except EngineError as error:
            if self._lives.is_open:
                self._recover(error)
        for entry in refused:
            self._commits.add(entry.item, failed_result(entry.item, entry.error))
        for entry in self._supply.take_guilty():
            self._commits.hold(entry.item, failed_result(entry.item, entry.error))

    def _launch(self) -> None:
        if not self._gate.may_start or not self._lives.is_open or self._flights.suspect:
            return
        if self._supply.is_careful:
            if not self._flights:
                self._supply.prepare_one()
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
            self._lives.is_open
            and not self._supply.has_suspects
            and self._flights.n_requests < self._n_wanted
            and self._launcher.n_embedding < self._model.pace.embed_calls
        )

    def _start(self, ready: Ready) -> None:
        flight = self._enter(ready)
        try:
            if isinstance(ready.request, EmbeddingRequest):
                self._launcher.embed((flight, *self._more_to_embed(ready)))
            else:
                self._launcher.start(flight)
        except UsageError as error:
            self._landing.fail(flight, error)
        except EngineError as error:
            self._recover(error)

    def _enter(self, ready: Ready) -> Flight:
        flight = new_flight(ready)
        self._flights.add(flight)
        return flight

    def _more_to_embed(self, first: Ready) -> list[Flight]:
        """Items that share a call with the first one."""
        flights: list[Flight] = []
        n_inputs, most = len(first.prompts), self._model.pace.embed_inputs
        while not first.alone and n_inputs < most and (ready := self._supply.next()):
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
            self._landing.take(inbox.get(timeout=self._commits.patience_s(TICK_S)))
            while True:
                self._landing.take(inbox.get_nowait())
        except queue.Empty:
            return

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
        self._supply.settle()
        self._lives.lost(death)

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
