"""Putting items into the engine, and one inbox for everything that comes back of them."""

import itertools
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loadmaster.engine.types import GenerateEvent
from loadmaster.errors import EngineError, LoadmasterError
from loadmaster.tasks.api.openai_answers import Gathering
from loadmaster.tasks.api.openai_requests import EmbeddingRequest, stable_seed
from loadmaster.tasks.batch.flights import Flight
from loadmaster.tasks.batch.items import Ready
from loadmaster.tasks.batch.model import BatchModel, Vectors

ITEM_PRIORITY = 1  # behind a person who waits


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """Something of a request; `generation` counts the workers, for the dead may still speak."""

    generation: int
    request_id: str
    event: GenerateEvent | LoadmasterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """The vectors of a call, or why there are none."""

    generation: int
    flights: tuple[Flight, ...]
    outcome: Vectors | LoadmasterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """Look around: something is ready, or someone wants the run to stop."""


Message = RequestEvent | Embedded | Wake


class Launcher:
    """The way into the engine and out of it. One thread calls it, but for `wake`."""

    def __init__(self, model: BatchModel) -> None:
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.generation = 0
        self.n_embedding = 0  # calls under way
        self._model = model
        self._embedder = ThreadPoolExecutor(1, thread_name_prefix="batch-embed")

    def wake(self) -> None:
        """Have the inbox say something. From any thread, and from a signal handler."""
        self.inbox.put(Wake())

    def retire(self) -> None:
        """The worker is another from now on: what still comes from the last one is not ours."""
        self.generation += 1
        self.n_embedding = 0

    def close(self) -> None:
        """No more calls; the one under way is left to itself."""
        self.retire()
        self._embedder.shutdown(wait=False, cancel_futures=True)

    def start(self, flight: Flight) -> None:
        """Submit the requests of a chat or a completion.

        Raises:
            EngineError: the worker is gone.
            UsageError: the engine cannot run such a request.
        """
        ready, worker = flight.ready, self.generation
        assert not isinstance(ready.request, EmbeddingRequest)

        def sink(request_id: str, event: GenerateEvent | LoadmasterError) -> None:
            self.inbox.put(RequestEvent(generation=worker, request_id=request_id, event=event))

        for index, request_id in enumerate(flight.request_ids):
            number, choice = divmod(index, ready.n_choices)
            prompt = ready.prompts[number]
            request = ready.request.generation.request(
                request_id,
                prompt,
                index=choice,
                room=self._model.n_ctx - len(prompt),
                # Fixed for an item: computed again, it is comparable.
                default_seed=stable_seed(ready.item.custom_id),
                priority=ITEM_PRIORITY,
            )
            self._model.start(request, sink)

    def embed(self, flights: tuple[Flight, ...]) -> None:
        """Have all inputs of some items embedded in one call, on a thread of its own."""
        self.n_embedding += 1
        self._embedder.submit(self._embed, flights, self.generation)

    def _embed(self, flights: tuple[Flight, ...], worker: int) -> None:
        prompts = [prompt for flight in flights for prompt in flight.ready.prompts]
        outcome: Vectors | LoadmasterError
        try:
            outcome = self._model.embed(prompts)
        except LoadmasterError as error:
            outcome = error
        except Exception as error:  # a defect: the run must hear of it, whatever it is
            outcome = EngineError(f"embedding failed: {type(error).__name__}: {error}")
        self.inbox.put(Embedded(generation=worker, flights=flights, outcome=outcome))


_serials = itertools.count(1)


def new_flight(ready: Ready) -> Flight:
    """An item that is about to enter the engine."""
    request = ready.request
    is_embedding = isinstance(request, EmbeddingRequest)
    logprobs = not isinstance(request, EmbeddingRequest) and (
        request.generation.top_logprobs is not None
    )
    n_requests = 1 if is_embedding else len(ready.prompts) * ready.n_choices
    flight = Flight(
        ready=ready,
        serial=next(_serials),
        gatherings=[Gathering(index, logprobs=logprobs) for index in range(n_requests)],
    )
    flight.open.update(flight.request_ids)
    return flight
