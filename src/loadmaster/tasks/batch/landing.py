"""What comes back of the items in flight: gathered, and each item ended once, well or badly."""

from collections.abc import Callable

from loadmaster.engine.types import DoneEvent
from loadmaster.errors import EngineError, LoadmasterError, UsageError
from loadmaster.jobs.types import ItemResult
from loadmaster.tasks.batch.commits import Commits
from loadmaster.tasks.batch.flights import Flight, Flights
from loadmaster.tasks.batch.items import (
    Ready,
    embedding_result,
    failed_result,
    generation_result,
)
from loadmaster.tasks.batch.launcher import Embedded, Launcher, Message, RequestEvent
from loadmaster.tasks.batch.model import BatchModel
from loadmaster.tasks.batch.policy import Clock, Policy
from loadmaster.tasks.batch.progress import Tally


class DeadlineError(LoadmasterError):
    """An item took longer than its deadline."""

    code = "deadline_exceeded"


class Landing:
    """Takes messages of the engine, and ends flights. One thread calls it."""

    def __init__(
        self,
        model: BatchModel,
        policy: Policy,
        clock: Clock,
        *,
        flights: Flights,
        launcher: Launcher,
        commits: Commits,
        tally: Tally,
        on_answer: Callable[[], None],
        on_death: Callable[[LoadmasterError], None],
        put_back: Callable[[Ready], None],
    ) -> None:
        """`on_answer`: an item ended well. `on_death`: the worker is gone, nothing has landed.
        `put_back`: an item is to be run once more."""
        self._model = model
        self._policy = policy
        self._clock = clock
        self._flights = flights
        self._launcher = launcher
        self._commits = commits
        self._tally = tally
        self._on_answer = on_answer
        self._on_death = on_death
        self._put_back = put_back
        self._attempts: dict[int, int] = {}

    def take(self, message: Message) -> None:
        """One message of this worker; those of an earlier one are dropped."""
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
        if flight.begun_s is None:
            flight.begun_s = self._clock.monotonic_s()
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
            if flight in self._flights:
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

    def fail(self, flight: Flight, error: LoadmasterError) -> None:
        """The item ends with an error, its other requests with it."""
        self.cancel(flight)
        self._land(flight, failed_result(flight.ready.item, error, flight.dones))

    def cancel(self, flight: Flight) -> None:
        """Ask the engine to end what is open of a flight; its events still come."""
        for request_id in sorted(flight.open):
            self._model.cancel(request_id)

    def _land(self, flight: Flight, result: ItemResult) -> None:
        self._flights.land(flight)
        self._attempts.pop(flight.number, None)
        self._commits.add(flight.ready.item, result)
        if not result.failed:
            self._on_answer()

    def _end_cancelled(self, flight: Flight) -> None:
        if flight.expired:
            deadline = self._policy.deadline_s
            self.fail(flight, DeadlineError(f"not done within its deadline of {deadline:g} s"))
        elif flight.given_up:
            self._once_more(flight)  # the run may go on, when its gate opens again
        else:
            self._try_again(flight, EngineError("the engine cancelled it"))

    def _end_badly(self, flight: Flight, error: LoadmasterError) -> None:
        """A request ended with an error: the worker's death, the request's fault, or neither."""
        if self._model.failure is not None:
            self._on_death(error)
        elif isinstance(error, EngineError):
            self._try_again(flight, error)
        else:
            self.fail(flight, error)

    def _try_again(self, flight: Flight, error: LoadmasterError) -> None:
        """Once more, while the policy's retries last."""
        attempts = self._attempts[flight.number] = self._attempts.get(flight.number, 0) + 1
        if attempts > self._policy.retries:
            self.fail(flight, error)
        else:
            self._once_more(flight)

    def _once_more(self, flight: Flight) -> None:
        self.cancel(flight)
        self._flights.land(flight)
        self._put_back(flight.ready)
